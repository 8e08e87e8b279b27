"""mount(2), umount2(2) and what the kernel tells of mounts, without ever resolving a path below one.

Whoever holds a `/dev/fuse` descriptor must not stat, list or open anything at or under the mount it
belongs to: the thread would wait for itself, and not even SIGKILL helps. So this module works with
descriptors, /proc/self/mountinfo and /sys, and detaches without following.

Concurrency: stateless; each call is one or two system calls and may be made from any thread.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
from typing import NamedTuple

DEVICE = os.makedev(10, 229)
"""The number of /dev/fuse, the same everywhere (Documentation/admin-guide/devices.txt)."""

FS_TYPE = "fuse.soci"
SOURCE = "soci"

_MS_RDONLY = 1
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8
_OCTAL = re.compile(rb"\\([0-7]{3})")

_libc = ctypes.CDLL(None, use_errno=True)


class MountInfo(NamedTuple):
    """One line of /proc/self/mountinfo."""

    target: bytes
    fs_type: str
    source: str
    device: str
    """As major:minor."""


def open_device() -> int:
    """Return a new descriptor of /dev/fuse: blocking, because O_NONBLOCK would be shared by all copies."""
    return os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)


def mount(fd: int, target: str) -> None:
    """Mount the file system behind `fd` at `target`, an existing directory.

    Read-only and nothing more: a View bind-mounts this mount, so `nosuid` or `nodev` would show in
    containers; the 0700 root directory keeps others out. Raises OSError.
    """
    options = f"fd={fd},rootmode=40755,user_id=0,group_id=0,allow_other,default_permissions"
    result = _libc.mount(SOURCE.encode(), os.fsencode(target), FS_TYPE.encode(), _MS_RDONLY, options.encode())
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"mount of a lazy layer: {os.strerror(number)}", target)


def detach(target: str) -> bool:
    """Take the mount at `target` out of the tree; it ends when its last user is gone.

    Returns whether something was mounted there. Raises OSError for anything but "not a mount".
    """
    if _libc.umount2(os.fsencode(target), _MNT_DETACH | _UMOUNT_NOFOLLOW) == 0:
        return True
    number = ctypes.get_errno()
    if number in {errno.EINVAL, errno.ENOENT}:  # not a mount point; no such directory
        return False
    raise OSError(number, f"umount2: {os.strerror(number)}", target)


def mounts_below(directory: str) -> list[MountInfo]:
    """Return the mounts at or below `directory` of this mount namespace, in mount order.

    `directory` has to be a real path already: resolving it here could touch a lazy mount.
    """
    prefix = os.fsencode(directory)
    return [info for info in _mountinfo() if info.target == prefix or info.target.startswith(prefix + b"/")]


def set_read_ahead(target: str, kilobytes: int) -> None:
    """Set how far the kernel reads ahead on the mount at `target`. Raises OSError.

    The entry in /sys is named by the device number, which is in mountinfo: of the target only its parent is resolved.
    """
    parent, name = os.path.split(target)
    wanted = os.fsencode(os.path.join(os.path.realpath(parent), name))
    devices = [info.device for info in _mountinfo() if info.target == wanted]
    if not devices:
        raise OSError(errno.ENOENT, "nothing is mounted there", target)
    with open(f"/sys/class/bdi/{devices[-1]}/read_ahead_kb", "w", encoding="ascii") as control:
        control.write(str(kilobytes))


def _mountinfo() -> list[MountInfo]:
    with open("/proc/self/mountinfo", "rb") as lines:
        return [_parse(line) for line in lines]


def _parse(line: bytes) -> MountInfo:
    fields = line.rstrip(b"\n").split(
        b" "
    )  # the kernel escapes spaces, but no other white space than tabs and newlines
    tail = fields[fields.index(b"-") + 1 :]
    target = _OCTAL.sub(lambda match: bytes([int(match[1], 8)]), fields[4])
    return MountInfo(target, tail[0].decode(), tail[1].decode(errors="replace"), fields[2].decode())
