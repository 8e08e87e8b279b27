"""What can be seen of a layer's files, from a directory on disk and from a compiled tree, in one form to compare.

Concurrency: plain functions and values.
"""

from __future__ import annotations

import os
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from snapshotter.layer.compile import DirAttributes, compile_tree
from snapshotter.layer.tree import Tree
from snapshotter.ztoc.build import build
from snapshotter.ztoc.model import Algorithm, Ztoc
from tests.support import unpacking


class Facts(NamedTuple):
    """One path. `same_as` is the first path of its inode; sizes of directories and unset times do not count."""

    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    mtime_ns: int
    content: bytes
    xattrs: tuple[tuple[bytes, bytes], ...]
    same_as: bytes


@contextmanager
def deep_root() -> Iterator[bytes]:
    """Give an empty directory, deep enough that no relative link in a test leads to anything of the host."""
    scratch = tempfile.mkdtemp()
    try:
        root = Path(scratch, *"123456789")
        root.mkdir(parents=True)
        root.chmod(0o755)
        yield os.fsencode(root)
    finally:
        # shutil.rmtree recurses, and gives up on the depth of some of these trees.
        subprocess.run(["rm", "-rf", scratch], check=True)


def ztoc_of(tar: bytes, *, span_size: int = 1 << 22) -> Ztoc:
    """Return the zTOC of an uncompressed layer."""
    return build([tar], algorithm=Algorithm.UNCOMPRESSED, span_size=span_size).ztoc


def open_tree(compiled: bytes) -> Tree:
    """Return the reader of a tree that is in memory only. The caller closes it."""
    fd = os.memfd_create("tree", os.MFD_CLOEXEC)
    try:
        os.write(fd, compiled)
        return Tree(fd)
    finally:
        os.close(fd)


def tree_of(tar: bytes, *, base: bool = False, inherited: dict[bytes, DirAttributes] | None = None) -> Tree:
    """Return the tree of an uncompressed layer. The caller closes it."""
    return open_tree(compile_tree(ztoc_of(tar), base=base, inherited=inherited or {}))


def facts_of_tree(tree: Tree, tar: bytes) -> dict[bytes, Facts]:
    """Return what `tree` shows, file contents taken from `tar`."""
    first_path: dict[int, bytes] = {}
    return {path: _tree_facts(tree, tar, path, ino, first_path) for path, ino in walk(tree)}


def walk(tree: Tree) -> Iterator[tuple[bytes, int]]:
    """Yield (path, inode) of everything in the tree, `b""` for the root, names sorted."""
    stack = [(b"", 1)]
    while stack:
        path, ino = stack.pop()
        yield path, ino
        below = [(os.path.join(path, name), child) for _, name, child in tree.children(ino, 0)]
        stack += reversed(below)


def facts_of_directory(root: bytes, *, since_ns: int) -> dict[bytes, Facts]:
    """Return what is on disk below `root`; a time between `since_ns` and now was set by nobody and reads 0."""
    first_path: dict[int, bytes] = {}
    unset = range(since_ns, time.time_ns())
    return {path: _disk_facts(root, path, unset, first_path) for path in unpacking.paths(root)}


def _tree_facts(tree: Tree, tar: bytes, path: bytes, ino: int, first_path: dict[int, bytes]) -> Facts:
    node = tree.row(ino)
    content = b""
    if stat.S_ISREG(node.mode):
        content = tar[node.data_offset : node.data_offset + node.size]
    elif stat.S_ISLNK(node.mode):
        content = tree.readlink(ino)
    names = tree.xattr_names(ino)
    return Facts(
        mode=node.mode,
        nlink=node.nlink,
        uid=node.uid,
        gid=node.gid,
        rdev=node.rdev,
        size=0 if stat.S_ISDIR(node.mode) else node.size,
        mtime_ns=node.mtime_ns,
        content=content,
        xattrs=tuple((name, tree.xattr(ino, name) or b"") for name in names),
        same_as=first_path.setdefault(ino, path),
    )


def _disk_facts(root: bytes, path: bytes, unset: range, first_path: dict[int, bytes]) -> Facts:
    full = os.path.join(root, path)
    info = os.lstat(full)
    content = b""
    if stat.S_ISREG(info.st_mode):
        with open(full, "rb") as file:
            content = file.read()
    elif stat.S_ISLNK(info.st_mode):
        content = os.readlink(full)
    names = sorted(map(os.fsencode, os.listxattr(full, follow_symlinks=False)))
    return Facts(
        mode=info.st_mode,
        nlink=info.st_nlink,
        uid=info.st_uid,
        gid=info.st_gid,
        rdev=info.st_rdev,
        size=0 if stat.S_ISDIR(info.st_mode) else info.st_size,
        mtime_ns=0 if info.st_mtime_ns in unset else info.st_mtime_ns,
        content=content,
        xattrs=tuple((name, os.getxattr(full, name, follow_symlinks=False)) for name in names),
        same_as=first_path.setdefault(info.st_ino, path),
    )
