"""What directories that a layer only implies take over from the layers below it.

A tar may hold `usr/share/x` without `usr` and `usr/share`. Unpacking onto parent layers, containerd makes such
directories with the owner, mode, time and attributes of the same path in the nearest parent that has it; a
lazy layer has to show the same, or an upper layer would quietly reset the mode of `/tmp`. It looks at each parent
by itself: links are followed within that parent, and what other parents hide of it does not matter.

Parents are compiled trees (lazy layers) or ordinary directories (layers that were unpacked); a lazy layer's
mount is never touched.

Concurrency: pure functions but for the reads of directories that no mount is on.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from snapshotter.layer.apply import DirAttributes
from snapshotter.layer.layout import ROOT_INO
from snapshotter.layer.tree import Tree

_UNINHERITED = b"trusted."
_MAX_LINKS = 255
"""As containerd: a loop is no directory."""

_Place = TypeVar("_Place")


@dataclass(frozen=True, slots=True)
class Parent:
    """One layer below: exactly one of the two is given."""

    tree: Path | None = None
    """The compiled tree of a lazy layer."""
    directory: Path | None = None
    """The top directory of an unpacked layer."""


class _NotADirectory(Exception):
    """The nearest parent that has the path has something else there: nothing is taken over."""


def inherited_attributes(tree: Tree, parents: Sequence[Parent]) -> dict[bytes, DirAttributes]:
    """Return the attributes for the implicit directories of `tree`, by path; `parents` are nearest first.

    A path that no parent has is absent. Raises OSError when a parent's directory cannot be read, and
    InvalidLayerFile when its tree is damaged.
    """
    wanted = [path for path, _ino in tree.implicit_dirs()]
    found: dict[bytes, DirAttributes] = {}
    for parent in parents:
        if not wanted:
            break
        missing = []
        with _open(parent) as files:
            for path in wanted:
                try:
                    attributes = _find(files, path)
                except _NotADirectory:
                    continue
                if attributes is None:
                    missing.append(path)
                else:
                    found[path] = attributes
        wanted = missing
    return found


class _Files(Protocol[_Place]):
    """One parent's files; a place is what one of them is known by."""

    root: _Place

    def child(self, place: _Place, name: bytes) -> _Place | None:
        """Return what a directory has by this name."""

    def target(self, place: _Place) -> bytes | None:
        """Return where a symbolic link leads, None for anything else."""

    def attributes(self, place: _Place) -> DirAttributes | None:
        """Return the attributes of a directory, None for anything else."""


def _find(files: _Files[_Place], path: bytes) -> DirAttributes | None:
    """Return what the directory at `path` has, None when there is nothing at that path. Raises _NotADirectory."""
    above = [files.root]
    todo = path.split(b"/")[::-1]
    links = 0
    while todo:
        name = todo.pop()
        if name == b"..":
            del above[max(len(above) - 1, 1) :]
        if name in {b"", b".", b".."}:
            continue
        place = files.child(above[-1], name)
        if place is None:
            return None
        target = files.target(place)
        if target is not None:
            links += 1
            if links > _MAX_LINKS:
                raise _NotADirectory
            del above[1 if target.startswith(b"/") else len(above) :]
            todo += target.split(b"/")[::-1]
            continue
        if todo and files.attributes(place) is None:
            raise _NotADirectory
        above.append(place)
    attributes = files.attributes(above[-1])
    if attributes is None:
        raise _NotADirectory
    return attributes


@contextmanager
def _open(parent: Parent) -> Iterator[_Files[Any]]:
    if parent.tree is None:
        assert parent.directory is not None
        yield _Unpacked(os.fsencode(parent.directory))
        return
    with open(parent.tree, "rb") as file:
        tree = Tree(file.fileno())
    try:
        yield _Lazy(tree)
    finally:
        tree.close()


class _Lazy:
    """A compiled tree; places are inode numbers."""

    root = ROOT_INO

    def __init__(self, tree: Tree) -> None:
        self._tree = tree

    def child(self, place: int, name: bytes) -> int | None:
        return self._tree.lookup(place, name) or None

    def target(self, place: int) -> bytes | None:
        return self._tree.readlink(place) if stat.S_ISLNK(self._tree.row(place).mode) else None

    def attributes(self, place: int) -> DirAttributes | None:
        tree, node = self._tree, self._tree.row(place)
        if not stat.S_ISDIR(node.mode):
            return None
        xattrs = tuple((name, tree.xattr(place, name) or b"") for name in tree.xattr_names(place))
        return _attributes(node.mode, node.uid, node.gid, node.mtime_ns, xattrs)


class _Unpacked:
    """A directory; places are paths without a link in them."""

    def __init__(self, root: bytes) -> None:
        self.root = root

    def child(self, place: bytes, name: bytes) -> bytes | None:
        path = place + b"/" + name
        try:
            os.lstat(path)
        except FileNotFoundError:
            return None
        return path

    def target(self, place: bytes) -> bytes | None:
        return os.readlink(place) if stat.S_ISLNK(os.lstat(place).st_mode) else None

    def attributes(self, place: bytes) -> DirAttributes | None:
        status = os.lstat(place)
        if not stat.S_ISDIR(status.st_mode):
            return None
        names = [os.fsencode(name) for name in os.listxattr(place, follow_symlinks=False)]
        xattrs = tuple((name, os.getxattr(place, name, follow_symlinks=False)) for name in names)
        return _attributes(status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, xattrs)


def _attributes(
    mode: int, uid: int, gid: int, mtime_ns: int, xattrs: tuple[tuple[bytes, bytes], ...]
) -> DirAttributes:
    kept = tuple((name, value) for name, value in sorted(xattrs) if not name.startswith(_UNINHERITED))
    return DirAttributes(stat.S_IMODE(mode), uid, gid, mtime_ns, kept)
