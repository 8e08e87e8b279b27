"""Compiling: what is written from a zTOC beyond the files themselves, and from which bytes."""

from __future__ import annotations

import dataclasses
import gc
import gzip
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from snapshotter.errors import DigestMismatch, InvalidZtoc, UnsupportedLayer
from snapshotter.layer.compile import DirAttributes, compile_files, compile_tree
from snapshotter.layer.layout import ROOT_INO
from snapshotter.layer.tree import Tree, TreeFlags
from snapshotter.units import Digest, sha256_digest
from snapshotter.ztoc.build import build
from snapshotter.ztoc.model import Algorithm
from snapshotter.ztoc.spans import covering, spans_of
from tests.support.facts import open_tree, walk, ztoc_of
from tests.support.images import Entry, directory, symlink, tar
from tests.support.nasty import nasty_layers

BLOB = gzip.compress(nasty_layers()[0], mtime=0)
BUILT = build([BLOB], algorithm=Algorithm.GZIP, span_size=64 << 10)


@contextmanager
def memory_file(content: bytes = b"") -> Iterator[int]:
    fd = os.memfd_create("file")
    try:
        os.write(fd, content)
        yield fd
    finally:
        os.close(fd)


def test_the_same_ztoc_gives_the_same_bytes() -> None:
    assert compile_tree(BUILT.ztoc) == compile_tree(BUILT.ztoc)
    assert compile_tree(BUILT.ztoc) != compile_tree(BUILT.ztoc, base=True)


def test_spans_are_those_of_the_ztoc() -> None:
    spans = spans_of(BUILT.ztoc)
    assert len(spans) > 5
    starts = [span.uncompressed_start for span in spans]
    with closing(open_tree(compile_tree(BUILT.ztoc))) as tree:
        assert tree.algorithm is Algorithm.GZIP
        assert tuple(tree.span(i) for i in range(tree.span_count)) == spans
        assert tree.blob_header_end == spans[0].compressed_start > 0
        for wrong in (-1, tree.span_count):
            with pytest.raises(IndexError):
                tree.span(wrong)
        border = starts[3]
        for start, end in (
            (0, 1),
            (border - 1, border),
            (border - 1, border + 1),
            (border, border),
            (5, starts[-1] + 1),
        ):
            assert tree.spans_for(start, end) == covering(starts, start, end)


def test_compiling_files() -> None:
    with memory_file(BUILT.data) as ztoc, memory_file() as out:
        compile_files(ztoc, out, digest=BUILT.digest, base=True)
        with closing(Tree(out)) as tree:
            assert tree.ztoc_digest == BUILT.digest
            assert tree.flags & TreeFlags.BASE
            in_memory = compile_tree(BUILT.ztoc, base=True, ztoc_digest=BUILT.digest)
            assert os.pread(out, 1 << 24, 0) == in_memory
            assert tree.compressed_size == len(BLOB)
    assert gc.isenabled()


def test_a_ztoc_file_with_another_digest_is_not_parsed() -> None:
    with memory_file(BUILT.data[:-1] + b"?") as ztoc, memory_file() as out:
        with pytest.raises(DigestMismatch, match=BUILT.digest):
            compile_files(ztoc, out, digest=BUILT.digest)
        assert os.fstat(out).st_size == 0
    assert gc.isenabled()


@pytest.mark.parametrize("content", [b"", b"nonsense", BUILT.data[:1000]])
def test_files_that_are_no_ztoc(content: bytes) -> None:
    with memory_file(content) as ztoc, memory_file() as out, pytest.raises(InvalidZtoc):
        compile_files(ztoc, out, digest=sha256_digest(content))


@pytest.mark.parametrize("change", [{"uid": 1 << 32}, {"size": -1}, {"offset": 1 << 64}, {"size": 1 << 64}])
def test_numbers_that_no_file_has(change: dict[str, int]) -> None:
    ztoc = ztoc_of(tar({"file": b"x"}))
    entries = (ztoc.entries[0]._replace(**change),)
    with pytest.raises(InvalidZtoc, match="out of range"):
        compile_tree(dataclasses.replace(ztoc, entries=entries))


def test_kinds_that_are_not_known() -> None:
    ztoc = ztoc_of(tar({"file": b"x"}))
    odd = dataclasses.replace(ztoc, entries=(ztoc.entries[0]._replace(kind="socket"),))
    with pytest.raises(UnsupportedLayer, match="tar entry 'file': entries of kind 'socket'"):
        compile_tree(odd)


@pytest.mark.parametrize("field", ["name", "linkname"])
@pytest.mark.parametrize("kind", ["reg", "symlink", "hardlink"])
@pytest.mark.parametrize("text", [b"a\0b", b"d\0/b", b"c/.wh.\0"])
def test_names_with_a_nul(kind: str, field: str, text: bytes) -> None:
    ztoc = ztoc_of(tar({"a": b"x", "file": symlink("a")}))
    bad = ztoc.entries[1]._replace(kind=kind, **{field: text})
    if (kind, field) == ("reg", "linkname"):
        compile_tree(dataclasses.replace(ztoc, entries=(ztoc.entries[0], bad)))  # means nothing there
        return
    with pytest.raises(UnsupportedLayer, match=r"impossible name|can have this"):
        compile_tree(dataclasses.replace(ztoc, entries=(ztoc.entries[0], bad)))


def test_inherited_attributes_go_to_implicit_directories_only() -> None:
    entries = [
        ("named/", directory(0o700)),
        ("named/f", b""),
        ("implied/deep/f", b""),
        ("mail/", directory(0o2770, gid=8)),
    ]
    attributes = DirAttributes(0o41755, 5, 6, 7, ((b"user.x", b"1"), (b"trusted.overlay.opaque", b"y")))
    paths = (b"named", b"implied", b"implied/deep", b"nowhere")
    ztoc = ztoc_of(tar(entries))
    with closing(open_tree(compile_tree(ztoc, inherited=dict.fromkeys(paths, attributes)))) as tree:
        found = {path: tree.row(ino) for path, ino in walk(tree)}
        for path in (b"implied", b"implied/deep"):
            assert (found[path].mode, found[path].uid, found[path].gid, found[path].mtime_ns) == (
                0o041755,
                5,
                6,
                7,
            )
            assert tree.xattr_names(6) == tree.xattr_names(7) == (b"user.x",)
        assert (found[b"named"].mode, found[b"named"].uid) == (0o040700, 0)
        assert set(tree.implicit_dirs()) == {(b"implied", 6), (b"implied/deep", 7)}


def test_an_empty_layer() -> None:
    with closing(open_tree(compile_tree(ztoc_of(bytes(1024))))) as tree:
        assert (tree.node_count, tree.entry_count, tree.content_bytes) == (1, 0, 0)
        assert list(walk(tree)) == [(b"", ROOT_INO)]
        assert tree.row(ROOT_INO).nlink == 2


def test_the_digest_of_the_ztoc_is_optional() -> None:
    with closing(open_tree(compile_tree(ztoc_of(tar({"f": Entry(b"x")}))))) as tree:
        assert tree.ztoc_digest == Digest("sha256:" + "0" * 64)
