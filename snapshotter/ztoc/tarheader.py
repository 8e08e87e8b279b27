"""One 512-byte tar header block -> its fields, under the rules of Go's archive/tar.

Four formats share the first 257 bytes (V7); ustar, star and GNU tell themselves apart by magic
numbers and differ in what follows. Checksums, numbers and strings are read as leniently and as
strictly as Go does, since a block that Go refuses cannot be in a zTOC and one that it takes must be.
"""

from __future__ import annotations

import re
import struct
import zlib
from functools import lru_cache
from typing import NamedTuple

from snapshotter.errors import InvalidTar
from snapshotter.ztoc.model import civil_from_days

_BLOCK = struct.Struct("100s24s12s12s8sc100s8s80s155s12x")
_USTAR = b"ustar\0"
_GNU = b"ustar  \0"
_NO_OWNER = bytes(80)
_CHECKSUM = slice(148, 156)
_STAR_PREFIX = slice(345, 476)
_STAR_TIMES = (slice(476, 488), slice(488, 500))
_STAR_TRAILER = slice(508, 512)
_GNU_TIMES = (slice(345, 357), slice(357, 369))

HEADER_ONLY = frozenset({b"1", b"2", b"3", b"4", b"5", b"6"})
"""Types of entries without data, whatever their size field says."""

_OCTAL = re.compile(rb"[0-7]+")
_INT64_MAX = (1 << 63) - 1


class Header(NamedTuple):
    """The fields of a header block before any extended header is merged in; `mtime` in seconds since 1970."""

    flag: bytes
    name: bytes
    linkname: bytes
    size: int
    mtime: int
    mode: int
    uid: int
    gid: int
    uname: bytes
    gname: bytes
    devmajor: int
    devminor: int


def decode(block: bytes) -> Header:
    """Return the fields of a header block. Raises InvalidTar when the checksum or a number is wrong."""
    name, ids, size, mtime, checksum, flag, linkname, magic, owner, prefix = _BLOCK.unpack(block)
    if not _checksum_fits(block, checksum):
        raise InvalidTar("tar header: wrong checksum")
    name = text(name)
    if magic.startswith(_USTAR):
        if block[_STAR_TRAILER] == b"tar\0":
            prefix = block[_STAR_PREFIX]
            for field in _STAR_TIMES:
                number(block[field])
        prefix = text(prefix)
    elif magic == _GNU:
        prefix = _gnu_prefix(block, prefix)
    else:
        prefix = b""
        owner = _NO_OWNER
    if prefix:
        name = prefix + b"/" + name
    data_size = number(size)
    if data_size < 0 and flag not in HEADER_ONLY:
        raise InvalidTar(f"tar header of {name!r}: negative size")
    mode, uid, gid = _ids(ids)
    uname, gname, devmajor, devminor = _owner(owner)
    seconds = number(mtime)
    return Header(
        flag, name, text(linkname), data_size, seconds, mode, uid, gid, uname, gname, devmajor, devminor
    )


@lru_cache(maxsize=1024)
def _ids(fields: bytes) -> tuple[int, int, int]:
    """Return mode, uid and gid; cached, as other fields are, because few differ from entry to entry."""
    return number(fields[:8]), number(fields[8:16]), number(fields[16:])


@lru_cache(maxsize=1024)
def _owner(fields: bytes) -> tuple[bytes, bytes, int, int]:
    """Return uname, gname, devmajor and devminor."""
    return text(fields[:32]), text(fields[32:64]), number(fields[64:72]), number(fields[72:])


def text(field: bytes) -> bytes:
    """Return a string field up to its first NUL."""
    return field.partition(b"\0")[0]


@lru_cache(maxsize=4096)
def number(field: bytes) -> int:
    """Return a numeric field: octal digits, or base-256 when the top bit is set. Raises InvalidTar."""
    if field[0] & 0x80:
        return _base256(field)
    value = _octal(field)
    if value is None:
        raise InvalidTar(f"tar header: not a number: {field!r}")
    return value


def _octal(field: bytes) -> int | None:
    """Return octal digits among spaces and NULs, none of them being 0; None for anything else."""
    digits = field.strip(b" \0")
    if digits.isdigit():
        return int(digits, 8) if _OCTAL.fullmatch(digits) else None
    digits = text(digits)
    if _OCTAL.fullmatch(digits):
        return int(digits, 8)
    return None if digits else 0


def _base256(field: bytes) -> int:
    """Return a two's complement number that fills the field but for its top bit."""
    sign = 1 << (8 * len(field) - 1)
    value = int.from_bytes(field) & (sign - 1)
    if field[0] & 0x40:
        value -= sign
    if not -_INT64_MAX - 1 <= value <= _INT64_MAX:
        raise InvalidTar(f"tar header: number does not fit 64 bits: {field!r}")
    return value


def _gnu_prefix(block: bytes, field: bytes) -> bytes:
    """Return the prefix of a GNU header, which has none, unless an old Go writer put one there.

    That writer left a ustar prefix in place of the access and change times; it shows by their not
    being numbers.
    """
    try:
        for times in _GNU_TIMES:
            if block[times.start]:
                number(block[times])
    except InvalidTar:
        prefix = text(field)
        return prefix if prefix.isascii() else b""
    return b""


def _checksum_fits(block: bytes, field: bytes) -> bool:
    # The low half of an Adler-32 is 1 + the sum of the bytes mod 65521; half a block cannot reach
    # that, so two of them give the exact sum at a fifth of the cost of sum().
    expected, excess = _checksum_field(field)
    halves = (zlib.adler32(block[:256]) & 0xFFFF) + (zlib.adler32(block[256:]) & 0xFFFF) - 2
    unsigned = halves - excess
    if unsigned == expected:
        return True
    # Some old writers summed signed characters.
    high = sum(byte > 0x7F for byte in block) - sum(byte > 0x7F for byte in field)
    return unsigned - 256 * high == expected


@lru_cache(maxsize=8192)
def _checksum_field(field: bytes) -> tuple[int | None, int]:
    """Return the checksum in its field, and how much more the field adds to a sum than the spaces it stands for."""
    return _octal(field), sum(field) - len(field) * 0x20


@lru_cache(maxsize=4096)
def rfc3339(seconds: int, nanoseconds: int = 0) -> str:
    """Return a time since 1970 as RFC 3339 in UTC, the fraction without trailing zeros.

    Empty when the year is not in 0..9999, as in the format.
    """
    day, second = divmod(seconds, 86_400)
    date = _date(day)
    if not date:
        return ""
    minute, second = divmod(second, 60)
    fraction = f".{nanoseconds:09d}".rstrip("0") if nanoseconds else ""
    return f"{date}T{minute // 60:02d}:{minute % 60:02d}:{second:02d}{fraction}Z"


@lru_cache(maxsize=1024)
def _date(day: int) -> str:
    year, month, day_of_month = civil_from_days(day)
    return f"{year:04d}-{month:02d}-{day_of_month:02d}" if 0 <= year <= 9999 else ""
