"""What the kernel makes of attributes: asked the kernel itself where that is possible."""

from __future__ import annotations

import errno
import os
import stat
import struct
from pathlib import Path

import pytest

from snapshotter.errors import UnsupportedLayer
from snapshotter.layer.attributes import bound_time, device_number, settable
from tests.support.nasty import BIND_CAPABILITY

FILE, DIRECTORY, LINK, FIFO = 0o100644, 0o040755, 0o120777, 0o010600
ROOTID_CAPABILITY = struct.pack("<6I", 0x03000001, 1 << 10, 0, 0, 0, 1000)


@pytest.mark.parametrize(
    ("mtime_ns", "bounded"),
    [(-1, 0), (0, 0), (1, 1), ((1 << 63) - 1, (1 << 63) - 1), (1 << 63, 0), (253402300799 * 10**9, 0)],
)
def test_times(mtime_ns: int, bounded: int) -> None:
    assert bound_time(mtime_ns) == bounded


@pytest.mark.parametrize(
    "numbers", [(0, 0), (1, 3), (511, 70000), (4095, 0xFFFFF), (4096 + 7, (1 << 20) + 5)]
)
def test_device_numbers_as_the_kernel_keeps_them(tmp_path: Path, numbers: tuple[int, int]) -> None:
    node = tmp_path / "node"
    major, minor = numbers
    os.mknod(node, stat.S_IFCHR, os.makedev(major & 0xFFF, minor & 0xFFFFF))
    assert device_number(major, minor) == node.lstat().st_rdev


@pytest.mark.parametrize("numbers", [(-1, 0), (0, -1), (1 << 32, 0), (0, 1 << 32)])
def test_device_numbers_out_of_range(numbers: tuple[int, int]) -> None:
    with pytest.raises(UnsupportedLayer, match="out of range"):
        device_number(*numbers)


def by_the_kernel(directory: Path, name: bytes, value: bytes, mode: int) -> bool | None:
    """Set the attribute on a real inode; return True when it is stored, False when ignored, None when refused."""
    path = directory / "inode"
    match stat.S_IFMT(mode):
        case stat.S_IFDIR:
            path.mkdir()
        case stat.S_IFLNK:
            path.symlink_to("nowhere")
        case kind:
            os.mknod(path, kind | 0o600)
    if name.startswith(b"trusted."):
        return False  # containerd does not try
    try:
        os.setxattr(path, name, value, follow_symlinks=False)
    except OSError as error:
        ignored = error.errno == errno.ENOTSUP or (
            error.errno == errno.EPERM and name.startswith(b"user.") and mode not in (FILE, DIRECTORY)
        )
        return False if ignored else None
    return True


@pytest.mark.parametrize("mode", [FILE, DIRECTORY, LINK, FIFO], ids=["file", "directory", "link", "fifo"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"user.x", b"1"),
        (b"user.x", b""),
        (b"user.", b"1"),
        (b"user", b"1"),
        (b"user." + b"n" * 250, b"1"),
        (b"user." + b"n" * 251, b"1"),
        (b"user.x", b"v" * 65537),
        (b"trusted.x", b"1"),
        (b"security.x", b"label"),
        (b"security.", b"1"),
        (b"security.capability", BIND_CAPABILITY),
        (b"security.capability", ROOTID_CAPABILITY),
        (b"security.capability", b""),
        (b"security.capability", BIND_CAPABILITY[:12]),
        (b"security.capability", ROOTID_CAPABILITY[:20]),
        (b"system.x", b"1"),
        (b"other", b"1"),
        (b".", b"1"),
    ],
)
def test_extended_attributes(tmp_path: Path, name: bytes, value: bytes, mode: int) -> None:
    expected = by_the_kernel(tmp_path, name, value, mode)
    if expected is None:
        with pytest.raises(UnsupportedLayer):
            settable(name, value, mode)
    else:
        assert settable(name, value, mode) is expected


@pytest.mark.parametrize("name", [b"", b"user.\0x"])
def test_names_that_never_reach_the_kernel(name: bytes) -> None:
    with pytest.raises(UnsupportedLayer, match="impossible name"):
        settable(name, b"1", FILE)
