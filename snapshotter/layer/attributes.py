"""What Linux and containerd make of the attributes in a tar entry: times, device numbers, extended attributes.

Pure functions. They answer as a host's ext4 would to root, because that is what an unpacked layer shows; what the
kernel or containerd would refuse raises UnsupportedLayer with the reason, and the caller adds the entry.
"""

from __future__ import annotations

import struct
from typing import Final

from snapshotter.errors import UnsupportedLayer

OPAQUE: Final = b"trusted.overlay.opaque"
"""Set to b"y", it hides what the layers below have in a directory."""

CAPABILITY: Final = b"security.capability"
"""File capabilities; the kernel drops them whenever the owner of a file is set."""

KEEP_OWNER: Final = 0xFFFFFFFF
"""chown(2) reads this uid or gid, which is how a zTOC writes -1, as "leave it"."""

_MAX_TIME_NS: Final = (1 << 63) - 1
_MAX_XATTR_NAME: Final = 255
_MAX_XATTR_VALUE: Final = 65536
_CAPABILITY_SIZES: Final = {0x02000000: 20, 0x03000000: 24}  # revision: bytes
_REVISION: Final = struct.Struct("<I")
_REVISION_MASK: Final = 0xFF000000
_MAX_DEVICE: Final = 0xFFFFFFFF

_REGULAR, _DIRECTORY = 0o10, 0o4


def bound_time(mtime_ns: int) -> int:
    """Return the modification time as it is set: what lies before 1970 or beyond 64 bits of nanoseconds is 0."""
    return mtime_ns if 0 <= mtime_ns <= _MAX_TIME_NS else 0


def device_number(major: int, minor: int) -> int:
    """Return st_rdev of a node made with these numbers: 12 bits of the major one and 20 of the minor one.

    Raises UnsupportedLayer for numbers beyond 32 bits, which containerd refuses.
    """
    if not (0 <= major <= _MAX_DEVICE and 0 <= minor <= _MAX_DEVICE):
        raise UnsupportedLayer(f"device number {major}:{minor} out of range")
    return (major & 0xFFF) << 8 | minor & 0xFF | (minor & 0xFFF00) << 12


def settable(name: bytes, value: bytes, mode: int) -> bool:
    """Return whether setting this extended attribute on an inode of `mode` stores it; False: it is ignored.

    Raises UnsupportedLayer where unpacking would fail, and for POSIX ACLs, which interact with mode bits.
    """
    if not 0 < len(name) <= _MAX_XATTR_NAME or b"\0" in name:
        raise UnsupportedLayer("extended attribute with an impossible name")
    if name.startswith(b"trusted."):
        return False
    if len(value) > _MAX_XATTR_VALUE:
        raise UnsupportedLayer(f"extended attribute of {len(value)} bytes")
    if name.startswith(b"user."):
        if mode >> 12 not in (_REGULAR, _DIRECTORY):
            return False
    elif name.startswith(b"system.posix_acl_"):
        raise UnsupportedLayer("POSIX ACL")
    elif not name.startswith(b"security."):
        return False
    if name.endswith(b".") and name.count(b".") == 1:
        raise UnsupportedLayer("extended attribute with an impossible name")
    if name == CAPABILITY and value:
        _check_capability(value)
    return True


def _check_capability(value: bytes) -> None:
    revision = _REVISION.unpack_from(value)[0] & _REVISION_MASK if len(value) >= _REVISION.size else 0
    if _CAPABILITY_SIZES.get(revision) != len(value):
        raise UnsupportedLayer("file capability that the kernel would refuse")
