"""Paths in the in-memory upper directory; `test_apply` compares whole layers with the disk."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.errors import UnsupportedLayer
from snapshotter.layer.scratch import Inode, Scratch, clean

DIRECTORY, FILE, LINK = 0o040755, 0o100644, 0o120777

Tree = dict[str, "Tree | bytes | None"]


def inode(value: Tree | bytes | None) -> Inode:
    """Return a directory for a dict, a link for bytes, a file for None."""
    if isinstance(value, dict):
        node = Inode(9, DIRECTORY, gid=0)
        assert node.children is not None
        node.children.update({os.fsencode(name): inode(child) for name, child in value.items()})
        return node
    node = Inode(9, FILE if value is None else LINK, gid=0)
    node.target = value or b""
    return node


@pytest.fixture
def scratch() -> Scratch:
    return Scratch(
        inode(
            {
                "dir": {"file": None, "up": b"..", "sub": {}, "out": b"../../etc"},
                "file": None,
                "to-dir": b"dir",
                "to-to-dir": b"to-dir",
                "absolute": b"/dir/sub",
                "loop": b"loop",
                "to-file": b"file",
                "slash": b"file/",
            }
        )
    )


@pytest.mark.parametrize(
    ("path", "resolved"),
    [
        (b"", b"/"),
        (b"/", b"/"),
        (b".", b"/"),
        (b"../..", b"/"),
        (b"dir/", b"/dir"),
        (b"//dir//sub//", b"/dir/sub"),
        (b"dir/../dir/./sub", b"/dir/sub"),
        (b"new/../to-dir/x", b"/dir/x"),
        (b"to-dir", b"/dir"),
        (b"to-to-dir/sub", b"/dir/sub"),
        (b"absolute/x/y", b"/dir/sub/x/y"),
        (b"dir/up/dir/up", b"/"),
        (b"dir/out", b"/etc"),
        (b"to-file", b"/file"),
        (b"slash", b"/file"),
        (b"new/..", b"/"),
        (b"new/./x/../y", b"/new/y"),
    ],
)
def test_resolve(scratch: Scratch, path: bytes, resolved: bytes) -> None:
    assert scratch.resolve(path) == resolved


@pytest.mark.parametrize(
    "path", [b"loop", b"loop/x", b"file/x/y", b"to-file/x", b"x" * 256, b"dir/" + b"x" * 256]
)
def test_paths_that_do_not_resolve(scratch: Scratch, path: bytes) -> None:
    with pytest.raises(UnsupportedLayer):
        scratch.resolve(path)


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        (b"/", DIRECTORY),
        (b"/file", FILE),
        (b"/to-dir", LINK),
        (b"/to-dir/file", FILE),
        (b"/to-to-dir/up", LINK),
        (b"/dir/up/file", FILE),
        (b"/nothing/at/all", None),
        (b"/absolute/x", None),  # the kernel would look at the host
        (b"/dir/out/x", None),  # and here too
    ],
)
def test_find(scratch: Scratch, path: bytes, mode: int | None) -> None:
    found = scratch.find(path)
    assert (found and found.mode) == mode


@pytest.mark.parametrize(
    "path", [b"/file/x", b"/to-file/x", b"/slash/x", b"/loop/x", b"/" + b"n" * 256, b"/n" * 2100]
)
def test_paths_that_lstat_refuses(scratch: Scratch, path: bytes) -> None:
    with pytest.raises(UnsupportedLayer):
        scratch.find(path)


def test_as_many_links_as_the_kernel_follows() -> None:
    chain: Tree = {f"l{i}": f"l{i + 1}".encode() for i in range(41)}
    scratch = Scratch(inode({**chain, "l41": {"file": None}}))
    assert scratch.find(b"/l1/file") is not None
    with pytest.raises(UnsupportedLayer, match="too many links"):
        scratch.find(b"/l0/file")


def test_following_links_costs_a_bounded_number_of_steps() -> None:
    links: Tree = {f"l{i}": f"/{'x/../' * 50}l{i + 1}".encode() for i in range(200)}
    with pytest.raises(UnsupportedLayer, match="to follow"):
        Scratch(inode(links), steps=10_000).resolve(b"l0")


@given(st.lists(st.sampled_from(["", ".", "..", "...", ".a", "a", "a.", "b"]), max_size=6).map("/".join))
def test_clean_is_lexical(path: str) -> None:
    expected = os.path.normpath(path)
    expected = expected[1:] if expected.startswith("//") else expected
    assert clean(path.encode()) == expected.encode()
