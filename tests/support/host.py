"""The machine's own state, as tests see and restore it: mounts and the page cache.

Owns nothing. Nothing here resolves a path at or below a mount of somebody else's file system: a server that
does not answer would hold the caller for ever. Mounts are found in mountinfo and detached, never visited.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
from pathlib import Path
from typing import NamedTuple

_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8
_ESCAPE = re.compile(rb"\\([0-7]{3})")
_libc = ctypes.CDLL(None, use_errno=True)


class MountEntry(NamedTuple):
    """One line of mountinfo: where, what kind, with which options of the file system."""

    target: Path
    fstype: str
    source: str
    options: str
    device: str


def _unescape(field: bytes) -> str:
    return os.fsdecode(_ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), field))


def mount_table() -> list[MountEntry]:
    """Return every mount of this mount namespace, in the order in which they were made."""
    with open("/proc/self/mountinfo", "rb") as table:
        lines = table.read().splitlines()
    entries = []
    for line in lines:
        first, _, second = line.partition(b" - ")
        _, _, device, _, target, *_ = first.split(b" ")
        fstype, source, options = second.split(b" ", 2)
        entries.append(
            MountEntry(
                Path(_unescape(target)), fstype.decode(), _unescape(source), options.decode(), device.decode()
            )
        )
    return entries


def mounts_below(directory: Path) -> list[MountEntry]:
    """Return the mounts at or below `directory` (an absolute path without symlinks), outermost first."""
    return [
        entry for entry in mount_table() if entry.target == directory or directory in entry.target.parents
    ]


def detach(target: Path) -> None:
    """Take the topmost mount off `target` at once, busy or not. Raises OSError; a missing mount is fine."""
    if _libc.umount2(os.fsencode(target), _MNT_DETACH | _UMOUNT_NOFOLLOW) != 0:
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOENT):
            raise OSError(code, os.strerror(code), str(target))


def detach_below(directory: Path) -> int:
    """Detach every mount at or below `directory`, the inner ones first; return how many there were."""
    entries = mounts_below(directory)
    for entry in reversed(entries):
        detach(entry.target)
    return len(entries)


def drop_caches() -> None:
    """Write dirty pages and drop page cache, dentries and inodes of the whole machine. Needs root."""
    os.sync()
    with open("/proc/sys/vm/drop_caches", "wb", buffering=0) as knob:
        knob.write(b"3\n")
