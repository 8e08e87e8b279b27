"""Giving parts of a sparse file back to the file system.

Only whole blocks are given back, so what lies around the range is never touched: neighbouring spans may share
a byte, and the remains of a block are not worth a write. The remains keep what they held.

Concurrency: plain functions; the call may take as long as the disk does.
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

_BLOCK: Final = 4096
"""The largest block of ext4, xfs and btrfs; on smaller blocks a little more stays."""

_KEEP_SIZE: Final = 0x01
_PUNCH_HOLE: Final = 0x02

_fallocate = ctypes.CDLL(None, use_errno=True).fallocate64
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong)


def punch_hole(fd: int, start: int, end: int) -> None:
    """Free the whole blocks in `[start, end)`; the file's size stays. Raises OSError (EOPNOTSUPP among others)."""
    first, last = -(-start // _BLOCK) * _BLOCK, end // _BLOCK * _BLOCK
    if first < last and _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, first, last - first) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
