"""What a directory tree occupies on disk, counted as containerd counts it.

Only for directories that are known to be ordinary ones: it opens and stats everything below.

A container owns what is counted here and goes on changing it. So depth is not limited by recursion, by
path length or by open files, links are not followed, and what vanishes meanwhile is not an error.
"""

from __future__ import annotations

import os
from pathlib import Path

from snapshotter.snapshot.model import Usage

_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_ATTEMPTS = 3
"""Counts of a tree in which directories are moved around, before the last partial count is returned."""


def disk_usage(top: Path) -> Usage:
    """Return allocated bytes and inodes of `top` and everything below, each inode once.

    Raises FileNotFoundError when `top` itself does not exist.
    """
    for _ in range(_ATTEMPTS):
        count = _Count()
        if count.walk(top):
            break
    return Usage(count.size, len(count.inodes))


class _Count:
    """One pass over a tree, with one directory open at a time."""

    def __init__(self) -> None:
        self.size = 0
        self.inodes: set[tuple[int, int]] = set()

    def walk(self, top: Path) -> bool:
        """Count everything; return False when a directory was moved away under our feet."""
        fd = os.open(top, _FLAGS)
        try:
            self._add(os.fstat(fd))
            above: list[tuple[int, int]] = []
            unseen = [self._entries(fd)]
            while unseen:
                if unseen[-1]:
                    child = _open_child(fd, unseen[-1].pop())
                    if child < 0:
                        continue
                    above.append(_identity(os.fstat(fd)))
                    fd = _replace(fd, child)
                    unseen.append(self._entries(fd))
                else:
                    unseen.pop()
                    if above:
                        fd = _replace(fd, os.open("..", _FLAGS, dir_fd=fd))
                        if _identity(os.fstat(fd)) != above.pop():
                            return False
            return True
        finally:
            os.close(fd)

    def _entries(self, fd: int) -> list[str]:
        """Count the entries of a directory and return the names of those that are directories."""
        directories = []
        with os.scandir(fd) as entries:
            for entry in entries:
                try:
                    self._add(entry.stat(follow_symlinks=False))
                except FileNotFoundError:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    directories.append(entry.name)
        return directories

    def _add(self, status: os.stat_result) -> None:
        identity = _identity(status)
        if identity not in self.inodes:
            self.inodes.add(identity)
            self.size += status.st_blocks * 512


def _open_child(fd: int, name: str) -> int:
    try:
        return os.open(name, _FLAGS, dir_fd=fd)
    except (FileNotFoundError, NotADirectoryError):
        return -1  # removed, or replaced by something else, since it was listed


def _replace(fd: int, successor: int) -> int:
    os.close(fd)
    return successor


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
