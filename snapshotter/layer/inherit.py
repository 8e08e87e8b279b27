"""What directories that a layer only implies take over from the layers below it.

A tar may hold `usr/share/x` without `usr` and `usr/share`. Unpacking onto parent layers, containerd makes such
directories with the owner, mode, time and attributes of the same path in the nearest parent that has it; a
lazy layer has to show the same, or an upper layer would quietly reset the mode of `/tmp`.

Parents are compiled trees (lazy layers) or ordinary directories (layers that were unpacked); a lazy layer's
mount is never touched.

Concurrency: pure functions but for the reads of directories that no mount is on.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from snapshotter.layer.apply import DirAttributes
from snapshotter.layer.layout import ROOT_INO
from snapshotter.layer.tree import Tree

_UNINHERITED = b"trusted."


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
        with _Layer(parent) as layer:
            for path in wanted:
                try:
                    attributes = layer.directory(path)
                except _NotADirectory:
                    continue
                if attributes is None:
                    missing.append(path)
                else:
                    found[path] = attributes
        wanted = missing
    return found


class _Layer:
    """One parent, open."""

    def __init__(self, parent: Parent) -> None:
        self._parent = parent
        self._tree: Tree | None = None

    def __enter__(self) -> _Layer:
        if self._parent.tree is not None:
            with open(self._parent.tree, "rb") as file:
                self._tree = Tree(file.fileno())
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._tree is not None:
            self._tree.close()

    def directory(self, path: bytes) -> DirAttributes | None:
        """Return what the directory at `path` has, None when there is nothing at that path."""
        if self._tree is not None:
            return _from_tree(self._tree, path)
        assert self._parent.directory is not None
        return _from_disk(os.fsencode(self._parent.directory), path)


def _from_tree(tree: Tree, path: bytes) -> DirAttributes | None:
    ino = ROOT_INO
    for name in path.split(b"/"):
        ino = tree.lookup(ino, name)
        if not ino:
            return None
    node = tree.row(ino)
    if not stat.S_ISDIR(node.mode):
        raise _NotADirectory
    xattrs = tuple((name, tree.xattr(ino, name) or b"") for name in tree.xattr_names(ino))
    return _attributes(node.mode, node.uid, node.gid, node.mtime_ns, xattrs)


def _from_disk(root: bytes, path: bytes) -> DirAttributes | None:
    here = root
    for name in path.split(b"/"):
        here += b"/" + name
        try:
            status = os.lstat(here)
        except (FileNotFoundError, NotADirectoryError):
            return None
    if not stat.S_ISDIR(status.st_mode):
        raise _NotADirectory
    names = [os.fsencode(name) for name in os.listxattr(here, follow_symlinks=False)]
    xattrs = tuple((name, os.getxattr(here, name, follow_symlinks=False)) for name in names)
    return _attributes(status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, xattrs)


def _attributes(
    mode: int, uid: int, gid: int, mtime_ns: int, xattrs: tuple[tuple[bytes, bytes], ...]
) -> DirAttributes:
    kept = tuple((name, value) for name, value in sorted(xattrs) if not name.startswith(_UNINHERITED))
    return DirAttributes(stat.S_IMODE(mode), uid, gid, mtime_ns, kept)
