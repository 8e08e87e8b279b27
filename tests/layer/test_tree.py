"""Reading a compiled tree, whole and damaged."""

from __future__ import annotations

import dataclasses
import os
import random
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotter.errors import InvalidLayerFile
from snapshotter.layer import layout
from snapshotter.layer.compile import compile_tree
from snapshotter.layer.layout import HEADER_SIZE, ROOT_INO
from snapshotter.layer.tree import Tree, TreeFlags
from tests.support.facts import open_tree, walk, ztoc_of
from tests.support.images import Entry, directory, hardlink, symlink, tar
from tests.support.nasty import xattr_records

TAR = tar(
    [
        ("etc/", directory(0o751, uid=1, gid=2, mtime=1000)),
        ("etc/hosts", Entry(b"127.0.0.1", mode=0o640, mtime=2000)),
        ("etc/passwd", b"root"),
        ("usr/bin/tool", Entry(b"#!", mode=0o755, pax=xattr_records({"user.b": b"2", "user.a": b""}))),
        ("usr/bin/link", symlink("../../etc/hosts")),
        ("hard", hardlink("etc/hosts")),
        (".wh.gone", b""),
        ("opaque/.wh..wh..opq", b""),
    ]
)
ZTOC = ztoc_of(TAR, span_size=1024)
COMPILED = compile_tree(ZTOC)


@pytest.fixture
def tree() -> Iterator[Tree]:
    with closing(open_tree(COMPILED)) as tree:
        yield tree


def find(tree: Tree, path: bytes) -> int:
    ino = ROOT_INO
    for name in path.split(b"/"):
        ino = tree.lookup(ino, name)
    return ino


def test_a_regular_file(tree: Tree) -> None:
    node = tree.row(find(tree, b"etc/hosts"))
    entry = ZTOC.entries[1]
    assert (node.mode, node.nlink, node.size, node.rdev) == (0o100644, 2, 9, 0)  # the hard link's mode
    assert TAR[node.data_offset : node.data_offset + node.size] == b"127.0.0.1"
    assert (node.header_start, node.data_offset) == (ZTOC.header_starts[1], entry.offset)
    assert node.fingerprint != bytes(16)


def test_attributes_are_the_head_of_the_row(tree: Tree) -> None:
    for _, ino in walk(tree):
        assert tree.attributes(ino) == tree.row(ino)[:7]


def test_inode_numbers_are_entries_in_order(tree: Tree) -> None:
    paths = [b"etc", b"etc/hosts", b"etc/passwd", b"usr/bin/tool", b"usr/bin/link", None, b"gone", None]
    for i, path in enumerate(paths):
        if path is not None:
            assert find(tree, path) == i + 2
    assert find(tree, b"hard") == find(tree, b"etc/hosts") == 3
    assert {find(tree, path) for path in (b"usr", b"usr/bin", b"opaque")} == {10, 11, 12}


@pytest.mark.parametrize("ino", [-1, 0, 7, 9, 13, 1 << 40], ids=str)
def test_numbers_that_are_no_inode(tree: Tree, ino: int) -> None:
    for read in (
        tree.row,
        tree.attributes,
        tree.readlink,
        tree.xattr_names,
        lambda i: list(tree.children(i)),
    ):
        with pytest.raises(KeyError):
            read(ino)


def test_lookup_of_what_is_not_there(tree: Tree) -> None:
    assert tree.lookup(ROOT_INO, b"nothing") == 0
    assert tree.lookup(ROOT_INO, b"") == 0
    assert tree.lookup(find(tree, b"etc/hosts"), b"x") == 0
    assert tree.lookup(999, b"etc") == 0


def test_children_are_sorted_and_can_be_resumed(tree: Tree) -> None:
    whole = list(tree.children(ROOT_INO))
    assert [name for _, name, _ in whole] == [b"etc", b"gone", b"hard", b"opaque", b"usr"]
    assert [index for index, _, _ in whole] == [1, 2, 3, 4, 5]
    assert list(tree.children(ROOT_INO, 3)) == whole[3:]
    assert list(tree.children(ROOT_INO, 5)) == []
    assert list(tree.children(find(tree, b"hard"))) == []


def test_links_and_attributes(tree: Tree) -> None:
    tool = find(tree, b"usr/bin/tool")
    assert tree.readlink(find(tree, b"usr/bin/link")) == b"../../etc/hosts"
    with pytest.raises(KeyError):
        tree.readlink(tool)
    assert tree.xattr_names(tool) == (b"user.a", b"user.b")
    assert (tree.xattr(tool, b"user.a"), tree.xattr(tool, b"user.b")) == (b"", b"2")
    assert tree.xattr(tool, b"user.c") is None
    assert tree.xattr(find(tree, b"opaque"), b"trusted.overlay.opaque") == b"y"


def test_numbers_of_the_whole(tree: Tree) -> None:
    everything = (
        TreeFlags.HAS_XATTRS | TreeFlags.HAS_OPAQUE | TreeFlags.HAS_WHITEOUTS | TreeFlags.HAS_IMPLICIT_DIRS
    )
    assert tree.flags == everything
    assert tree.algorithm == ZTOC.compression.algorithm
    assert (tree.compressed_size, tree.uncompressed_size) == (ZTOC.compressed_size, ZTOC.uncompressed_size)
    assert tree.blob_header_end == 0
    assert tree.entry_count == 8
    assert tree.node_count == len({ino for _, ino in walk(tree)}) == 10
    assert tree.highest_ino == 12
    assert tree.content_bytes == 9 + 4 + 2


@pytest.mark.parametrize(
    ("entries", "flags"),
    [
        ({"d/": directory(), "d/f": b""}, TreeFlags.NONE),
        ({"f": Entry(b"", pax=xattr_records({"user.x": b"1"}))}, TreeFlags.HAS_XATTRS),
        ({"f": Entry(b"", pax=xattr_records({"trusted.x": b"1"}))}, TreeFlags.NONE),
        ({".wh..wh..opq": b""}, TreeFlags.HAS_XATTRS | TreeFlags.HAS_OPAQUE),
        ({".wh.f": b""}, TreeFlags.HAS_WHITEOUTS),
        ({"tty": Entry(type=tarfile.CHRTYPE, major=5)}, TreeFlags.NONE),
        ({"disk": Entry(type=tarfile.BLKTYPE)}, TreeFlags.NONE),
        ({"d/f": b""}, TreeFlags.HAS_IMPLICIT_DIRS),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_flags(entries: dict[str, Entry | bytes], flags: TreeFlags) -> None:
    with closing(open_tree(compile_tree(ztoc_of(tar(entries))))) as tree:
        assert tree.flags == flags


def test_paths_and_implicit_directories(tree: Tree) -> None:
    for path, ino in walk(tree):
        assert tree.path(ino) in (path, b"hard")
    assert dict(tree.implicit_dirs()) == {b"opaque": 12, b"usr": 10, b"usr/bin": 11}


def test_the_descriptor_may_be_closed_and_files_are_not_changed(tree: Tree) -> None:
    fd = os.memfd_create("tree")
    os.write(fd, COMPILED)
    with closing(Tree(fd)) as again:
        os.close(fd)
        assert list(walk(again)) == list(walk(tree))


@pytest.mark.parametrize("size", [0, 1, HEADER_SIZE - 1, HEADER_SIZE, len(COMPILED) - 1, len(COMPILED) + 1])
def test_files_of_another_size(size: int) -> None:
    with pytest.raises(InvalidLayerFile):
        open_tree(COMPILED[:size].ljust(size, b"\0"))


def with_header(**changes: int) -> bytes:
    """Return the tree with some numbers of its header changed, the check of the header being right."""
    return layout.Header.unpack(COMPILED[:HEADER_SIZE])._replace(**changes).pack() + COMPILED[HEADER_SIZE:]


@pytest.mark.parametrize(
    "field", ["rows", "slot_count", "span_count", "entry_count", "xattr_count", "heap_size"]
)
def test_headers_that_do_not_fit_their_file(field: str) -> None:
    value = getattr(layout.Header.unpack(COMPILED[:HEADER_SIZE]), field)
    for wrong in (0, value + 1, value * 2 + 8, 1 << 60):
        with pytest.raises(InvalidLayerFile):
            open_tree(with_header(**{field: wrong}))


def test_headers_that_are_wrong_in_themselves() -> None:
    with pytest.raises(InvalidLayerFile, match="algorithm"):
        open_tree(with_header(algorithm=7))
    with pytest.raises(InvalidLayerFile, match="not a tree"):
        open_tree(b"SOMETREE" + COMPILED[8:])
    with pytest.raises(InvalidLayerFile, match="version 2 instead of 1"):
        open_tree(COMPILED[:8] + struct.pack("<I", 2) + COMPILED[12:])
    for position in range(12, HEADER_SIZE):
        damaged = bytearray(COMPILED)
        damaged[position] ^= 0x10
        with pytest.raises(InvalidLayerFile, match="damaged header"):
            open_tree(bytes(damaged))


def use_everything(tree: Tree) -> None:
    """Ask a damaged tree everything; it may say InvalidLayerFile or KeyError, and nothing else."""
    allowed = (InvalidLayerFile, KeyError)
    inodes = range(14)
    for ino in inodes:
        for read in (tree.row, tree.attributes, tree.readlink, tree.xattr_names, tree.path):
            with suppress(*allowed):
                read(ino)
        with suppress(*allowed):
            tree.xattr(ino, b"user.a")
        with suppress(*allowed):
            list(tree.children(ino))
        for name in (b"etc", b"hosts", b"usr", b"nothing"):
            with suppress(*allowed):
                tree.lookup(ino, name)
    with suppress(*allowed):
        list(tree.implicit_dirs())
    for i in range(tree.span_count):
        tree.span(i)
    tree.spans_for(100, 3000)


@given(
    st.lists(
        st.tuples(st.integers(HEADER_SIZE, len(COMPILED) - 1), st.binary(min_size=1, max_size=8)), max_size=6
    )
)
@settings(max_examples=200, deadline=None)
def test_damage_anywhere(patches: list[tuple[int, bytes]]) -> None:
    damaged = bytearray(COMPILED)
    for position, patch in patches:
        damaged[position : position + len(patch)] = patch
    with closing(open_tree(bytes(damaged[: len(COMPILED)]))) as tree:
        use_everything(tree)


@pytest.mark.parametrize("fill", [0x00, 0xFF, 0x01])
def test_damage_everywhere(fill: int) -> None:
    body = bytes([fill]) * (len(COMPILED) - HEADER_SIZE)
    with closing(open_tree(COMPILED[:HEADER_SIZE] + body)) as tree:
        use_everything(tree)


SECTIONS = layout.Sections.of(layout.Header.unpack(COMPILED[:HEADER_SIZE]))
TOOL_ROW = SECTIONS.nodes + (5 - 1) * layout.NODE.size  # usr/bin/tool
ROOT_ROW = SECTIONS.nodes


@pytest.mark.parametrize(
    ("position", "number", "use"),
    [
        (SECTIONS.entries, 0xFFFFFFF0, lambda tree: list(tree.children(ROOT_INO))),  # offset of a name
        (SECTIONS.entries + 4, 0xFFFFFFF0, lambda tree: list(tree.children(ROOT_INO))),  # length of a name
        (ROOT_ROW + 76, 1000, lambda tree: list(tree.children(ROOT_INO))),  # count of entries
        (ROOT_ROW + 72, 1000, lambda tree: list(tree.children(ROOT_INO))),  # first entry
        (TOOL_ROW + 80, 1000, lambda tree: tree.xattr_names(5)),  # first attribute
        (TOOL_ROW + 84, 1000, lambda tree: tree.xattr(5, b"user.z")),  # count of attributes
        (TOOL_ROW + 20, 1000, lambda tree: tree.path(5)),  # the entry that leads there
        (SECTIONS.entries + 12, 1000, lambda tree: tree.path(2)),  # the directory of an entry
        (SECTIONS.implicit, 1000, lambda tree: list(tree.implicit_dirs())),
        (SECTIONS.xattrs + 8, 0xFFFFFFF0, lambda tree: tree.xattr(12, b"trusted.overlay.opaque")),
    ],
)
def test_numbers_that_lead_out_of_their_section(
    position: int, number: int, use: Callable[[Tree], object]
) -> None:
    damaged = bytearray(COMPILED)
    struct.pack_into("<I", damaged, position, number)
    with closing(open_tree(bytes(damaged))) as tree, pytest.raises(InvalidLayerFile, match="tree file"):
        use(tree)


def test_directories_that_form_a_loop() -> None:
    damaged = bytearray(COMPILED)
    for index in range(5):
        struct.pack_into("<II", damaged, SECTIONS.entries + index * layout.ENTRY.size + 8, 2, 2)
    with (
        closing(open_tree(bytes(damaged))) as tree,
        pytest.raises(InvalidLayerFile, match="not below the root"),
    ):
        tree.path(2)


def forged(parent: int, count: int, crc: int) -> list[bytes]:
    """Return names whose crc32 in `parent` is `crc`: four bytes in front of it undo whatever came before."""
    table = [zlib.crc32(bytes([i])) ^ zlib.crc32(b"\0") for i in range(256)]
    by_top = {value >> 24: i for i, value in enumerate(table)}
    names: list[bytes] = []
    source = random.Random(5)
    while len(names) < count:
        name = source.randbytes(8).hex().encode()
        state = crc ^ 0xFFFFFFFF
        steps = []
        for _ in range(4):
            index = by_top[state >> 24]
            steps.append(index)
            state = (state ^ table[index]) << 8 & 0xFFFFFFFF
        current = zlib.crc32(name, parent) ^ 0xFFFFFFFF
        for index in reversed(steps):
            byte = (current ^ index) & 0xFF
            name += bytes([byte])
            current = current >> 8 ^ table[index]
        assert zlib.crc32(name, parent) == crc
        if not set(name) & set(b"/\0") and name[-1:] not in (b".", b"/"):
            names.append(name)
    return names


def test_names_made_to_collide_are_found_all_the_same() -> None:
    names = forged(ROOT_INO, 400, 0x12345678)
    absent = names.pop()
    entries = [(name.decode("utf-8", "surrogateescape"), b"") for name in names]
    with closing(open_tree(compile_tree(ztoc_of(tar(entries))))) as tree:
        assert [tree.lookup(ROOT_INO, name) for name in names] == list(range(2, 401))
        assert tree.lookup(ROOT_INO, absent) == 0
        assert len({tree.lookup(ROOT_INO, name) for _, name, _ in tree.children(ROOT_INO)}) == 399


def test_a_large_directory() -> None:
    template = ZTOC.entries[2]
    names = [b"file-%d" % i for i in range(30_000)]
    entries = tuple(template._replace(name=name) for name in names)
    large = dataclasses.replace(ZTOC, entries=entries, header_starts=(0,) * len(entries))
    with closing(open_tree(compile_tree(large))) as tree:
        found = {name: ino for _, name, ino in tree.children(ROOT_INO)}
        assert list(found) == sorted(names)
        assert all(tree.lookup(ROOT_INO, name) == ino for name, ino in found.items())
        assert not any(tree.lookup(ROOT_INO, name + b"x") for name in names)
