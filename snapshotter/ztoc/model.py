"""The values of a zTOC: one FileEntry per tar entry, the compression info, and the whole.

Plain immutable values without behaviour: `parse` and `build` make them, everybody reads them. Names
and links are raw bytes as in the tar (`./` prefixes, trailing slashes and non-UTF-8 included); how
they become a file tree is the business of the layer package, not of this one.
"""

from __future__ import annotations

import mmap
import re
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from snapshotter.units import Digest

Buffer: TypeAlias = bytes | bytearray | memoryview | mmap.mmap
"""What functions of this package accept as bytes: any contiguous buffer of unsigned bytes."""

KINDS = ("reg", "dir", "symlink", "hardlink", "char", "block", "fifo")
"""The values of FileEntry.kind; only `reg` has data in the tar stream."""

VERSION = "0.9"
"""The only version of the format that exists."""

TAR_BLOCK = 512
"""Headers and data of a tar stream start at multiples of this."""

XATTR_PREFIX = b"SCHILY.xattr."


class Algorithm(IntEnum):
    """How the layer blob is compressed; the numbers are those of the format."""

    GZIP = 1
    UNCOMPRESSED = 2


class FileEntry(NamedTuple):
    """One tar entry.

    `offset` is the position in the tar stream of the first data byte (behind the header blocks) and
    `size` the recorded size in bytes; `mode` is the raw number of the header; `mod_time` is RFC 3339
    text, empty when the year does not fit; `pax` holds all records of the entry's PAX header, sorted
    by key when built here, in file order when parsed.
    """

    name: bytes
    kind: str
    offset: int
    size: int
    linkname: bytes
    mode: int
    uid: int
    gid: int
    uname: bytes
    gname: bytes
    mod_time: str
    devmajor: int
    devminor: int
    pax: tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class CompressionInfo:
    """How to start inflating in the middle, and what each span must hash to.

    There are `max_span_id + 1` spans and as many digests; `zinfo` is the raw checkpoint blob.
    """

    algorithm: Algorithm
    max_span_id: int
    span_digests: tuple[Digest, ...]
    zinfo: bytes


@dataclass(frozen=True, slots=True)
class Ztoc:
    """A zTOC.

    `entries` are sorted by offset (stable). `header_starts[i]` is where the tar header of entry i
    begins, so its header region is `[header_starts[i], entries[i].offset)`; it is derived, not
    stored. `zinfo_offset` is the position of the zinfo blob inside the serialized zTOC; a value that
    was not read from (or written to) bytes has 0.
    """

    version: str
    build_tool: str
    compressed_size: int
    uncompressed_size: int
    entries: tuple[FileEntry, ...]
    header_starts: tuple[int, ...]
    compression: CompressionInfo
    zinfo_offset: int = 0


def header_starts(entries: tuple[FileEntry, ...]) -> tuple[int, ...]:
    """Return where the header region of each entry begins, for entries in tar order.

    A region begins where the data of the entry before ends, rounded up to a block. Only regular
    files have data: some writers record a size for links and directories though none follows.
    """
    starts = []
    start = 0
    for entry in entries:
        starts.append(start)
        end = entry.offset + entry.size if entry.kind == "reg" else entry.offset
        start = -(-end // TAR_BLOCK) * TAR_BLOCK
    return tuple(starts)


def xattrs(entry: FileEntry) -> tuple[tuple[bytes, bytes], ...]:
    """Return the extended attributes among the entry's PAX records, prefix removed, in their order."""
    skip = len(XATTR_PREFIX)
    return tuple([(key[skip:], value) for key, value in entry.pax if key.startswith(XATTR_PREFIX)])


_RFC3339 = re.compile(
    r"(\d{4})-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])T([01]\d|2[0-3]):([0-5]\d):([0-5]\d)"
    r"(?:\.(\d{1,9})\d*)?(?:Z|([+-])([01]\d|2[0-3]):([0-5]\d))",
    re.ASCII,
)

_DAYS_BEFORE_EPOCH = 719_468
"""From 1 March of year 0 to 1 January 1970, proleptic Gregorian."""


def days_from_civil(year: int, month: int, day: int) -> int:
    """Return the days from 1970-01-01 to a date of the proleptic Gregorian calendar, year 0 included."""
    # Counting years from March puts the leap day last, so month lengths follow one linear formula.
    year -= month <= 2
    day_of_year = (153 * ((month + 9) % 12) + 2) // 5 + day - 1
    return 365 * year + year // 4 - year // 100 + year // 400 + day_of_year - _DAYS_BEFORE_EPOCH


def civil_from_days(days: int) -> tuple[int, int, int]:
    """Return (year, month, day) of a number of days since 1970-01-01; the inverse of days_from_civil."""
    days += _DAYS_BEFORE_EPOCH
    era, day_of_era = divmod(days, 146_097)
    year = (day_of_era - day_of_era // 1460 + day_of_era // 36_524 - day_of_era // 146_096) // 365
    day_of_year = day_of_era - (365 * year + year // 4 - year // 100)
    month = (5 * day_of_year + 2) // 153
    day = day_of_year - (153 * month + 2) // 5 + 1
    month = month + 3 if month < 10 else month - 9
    return year + era * 400 + (month <= 2), month, day


def mod_time_ns(text: str) -> int:
    """Return RFC 3339 `text` as nanoseconds since 1970-01-01 UTC; 0 for text that does not parse.

    Empty text is how the format writes a year outside 0..9999, so "cannot say" is an ordinary value
    here and not an error. A day that its month does not have (31 April) counts as the day after.
    """
    fraction = text[20:-1]
    if text[19:20] == "." and text[-1] == "Z" and fraction.isascii() and fraction.isdigit():
        # Files that were written in the same second differ in the fraction alone.
        second = _moment_ns(text[:19] + "Z")
        return 0 if second is None else second + int(fraction[:9].ljust(9, "0"))
    return _moment_ns(text) or 0


@lru_cache(maxsize=4096)
def _moment_ns(text: str) -> int | None:
    match = _RFC3339.fullmatch(text)
    if match is None:
        return None
    year, month, day, hour, minute, second, fraction, sign, zone_hour, zone_minute = match.groups()
    seconds = days_from_civil(int(year), int(month), int(day)) * 86_400
    seconds += int(hour) * 3600 + int(minute) * 60 + int(second)
    if sign is not None:
        zone = int(zone_hour) * 3600 + int(zone_minute) * 60
        seconds += zone if sign == "-" else -zone
    return seconds * 1_000_000_000 + int((fraction or "").ljust(9, "0"))
