"""A whole layer written as ordinary files, from its tree and its tar stream: for layers that cannot be lazy.

What comes out is what a lazy mount of the same tree would show, and so what containerd would have unpacked: a
whiteout is a character device 0:0, an opaque directory has `trusted.overlay.opaque`.

Every name is used relative to a descriptor of its directory, so neither the depth of a layer nor its links can lead
anywhere else. The mode and owner of the target itself stay: it belongs to the snapshot, not to the layer.

Concurrency: one call owns its target. It does not check digests (the caller has checked the diffID of the tar)
and does not clean up after a failure: a target that is not whole is thrown away by whoever made it.
"""

from __future__ import annotations

import ctypes
import os
import stat
from pathlib import Path
from typing import Final, NamedTuple

from snapshotter.errors import InvalidLayerFile
from snapshotter.layer.layout import ROOT_INO
from snapshotter.layer.tree import Node, Tree

_COPY: Final = 1 << 24  # bytes per sendfile call: a signal is noticed within milliseconds
_DIRECTORY_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

_libc = ctypes.CDLL(None, use_errno=True)


class LayerUsage(NamedTuple):
    """What a layer occupies: bytes on disk, and inodes."""

    size: int
    inodes: int


def materialize(tree: Tree, tar: int, target: Path) -> LayerUsage:
    """Write everything in `tree` below the empty directory `target`; file contents come from the descriptor `tar`.

    Nothing need be on disk when it returns: see `sync`. Raises OSError (ENOSPC and the like), InvalidLayerFile when
    the tar stream is shorter than the tree says. Needs root.
    """
    root = os.open(target, _DIRECTORY_FLAGS)
    try:
        return _Writer(tree, tar).run(root)
    finally:
        os.close(root)


def sync(directory: Path) -> None:
    """Return when everything below `directory` is on disk, and all else in its file system. Raises OSError."""
    fd = os.open(directory, _DIRECTORY_FLAGS)
    try:
        if _libc.syncfs(fd) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(directory))
    finally:
        os.close(fd)


class _Writer:
    """One run: where it is, and what it has written."""

    def __init__(self, tree: Tree, tar: int) -> None:
        self._tree = tree
        self._tar = tar
        self._root = -1
        self._first_paths: dict[int, bytes] = {}
        """Inode of more than one name -> its first path below the root."""
        self._size = 0
        self._inodes = 0

    def run(self, root: int) -> LayerUsage:
        """Write the tree below the directory `root`."""
        self._root = root
        directories = [(ROOT_INO, b".")]
        for ino, path in directories:  # grows while it is walked
            directories += self._fill(ino, path)
        # Only now: a file made in a directory would change its time.
        for ino, path in directories:
            self._finish_directory(ino, path)
        return LayerUsage(self._size, self._inodes)

    def _fill(self, ino: int, path: bytes) -> list[tuple[int, bytes]]:
        """Make everything in the directory `path`; return the directories among it, still empty."""
        directories = []
        parent = os.open(path, _DIRECTORY_FLAGS, dir_fd=self._root)
        try:
            for _, name, child in self._tree.children(ino):
                node = self._tree.row(child)
                child_path = path + b"/" + name
                if stat.S_ISDIR(node.mode):
                    os.mkdir(name, 0o700, dir_fd=parent)
                    directories.append((child, child_path))
                elif child in self._first_paths:
                    first = self._first_paths[child]
                    os.link(first, name, src_dir_fd=self._root, dst_dir_fd=parent, follow_symlinks=False)
                else:
                    self._make(child, node, name, parent)
                    if node.nlink > 1:
                        self._first_paths[child] = child_path
        finally:
            os.close(parent)
        return directories

    def _make(self, ino: int, node: Node, name: bytes, parent: int) -> None:
        if stat.S_ISREG(node.mode):
            self._make_file(ino, node, name, parent)
            return
        if stat.S_ISLNK(node.mode):
            os.symlink(self._tree.readlink(ino), name, dir_fd=parent)
        else:
            os.mknod(name, stat.S_IFMT(node.mode) | 0o600, node.rdev, dir_fd=parent)
        os.chown(name, node.uid, node.gid, dir_fd=parent, follow_symlinks=False)
        self._set_xattrs(ino, b"/proc/self/fd/%d/%b" % (parent, name))
        if not stat.S_ISLNK(node.mode):
            os.chmod(name, stat.S_IMODE(node.mode), dir_fd=parent)
        times = (node.mtime_ns, node.mtime_ns)
        os.utime(name, ns=times, dir_fd=parent, follow_symlinks=False)
        self._count(os.stat(name, dir_fd=parent, follow_symlinks=False))

    def _make_file(self, ino: int, node: Node, name: bytes, parent: int) -> None:
        fd = os.open(name, _NEW_FILE_FLAGS, 0o600, dir_fd=parent)
        try:
            self._copy(node, fd)
            self._set_attributes(ino, node, fd)
        finally:
            os.close(fd)

    def _copy(self, node: Node, target: int) -> None:
        offset, end = node.data_offset, node.data_offset + node.size
        while offset < end:
            copied = os.sendfile(target, self._tar, offset, min(end - offset, _COPY))
            if not copied:
                raise InvalidLayerFile(f"tar stream ends at {offset}; the tree has a file up to {end}")
            offset += copied

    def _finish_directory(self, ino: int, path: bytes) -> None:
        fd = os.open(path, _DIRECTORY_FLAGS, dir_fd=self._root)
        try:
            if ino == ROOT_INO:
                self._set_xattrs(ino, fd)
                self._count(os.fstat(fd))
            else:
                self._set_attributes(ino, self._tree.row(ino), fd)
        finally:
            os.close(fd)

    def _set_attributes(self, ino: int, node: Node, fd: int) -> None:
        """Set owner before attributes (it drops file capabilities), and mode behind it (it drops set-user-id)."""
        os.fchown(fd, node.uid, node.gid)
        self._set_xattrs(ino, fd)
        os.fchmod(fd, stat.S_IMODE(node.mode))
        os.utime(fd, ns=(node.mtime_ns, node.mtime_ns))
        self._count(os.fstat(fd))

    def _set_xattrs(self, ino: int, file: int | bytes) -> None:
        for name in self._tree.xattr_names(ino):
            value = self._tree.xattr(ino, name) or b""
            if isinstance(file, int):
                os.setxattr(file, name, value)
            else:
                os.setxattr(file, name, value, follow_symlinks=False)

    def _count(self, info: os.stat_result) -> None:
        self._size += info.st_blocks * 512
        self._inodes += 1
