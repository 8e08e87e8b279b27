"""PAX extended headers: records, the values that replace header fields, and GNU's sparse maps.

The reading is that of Go's archive/tar, because the records and what they override go into the zTOC.
Sparse files come in three dialects (0.0, 0.1 and 1.0); a zTOC describes such a file by its logical
size, and only the check that its map is sound happens here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from snapshotter.errors import InvalidTar

MAX_PAYLOAD = 1 << 20
"""Largest payload of an extended header or sparse map, as in Go; real ones have a few KiB."""

_SHORTEST_RECORD = 5

_TEXT_KEYS = frozenset({b"path", b"linkpath", b"uname", b"gname"})

_SPARSE_MAP = b"GNU.sparse.map"
_SPARSE_OFFSET = b"GNU.sparse.offset"
_SPARSE_LENGTH = b"GNU.sparse.numbytes"

_INTEGER = re.compile(rb"[+-]?[0-9]+")
_INT64_MAX = (1 << 63) - 1
_SAFE_DIGITS = 18
"""Any number of as many digits fits 64 bits."""


def parse_records(payload: bytes) -> dict[bytes, bytes]:
    """Return the records of an extended header; of records with equal keys the last one counts.

    The repeated offset/length records of sparse dialect 0.0 are replaced by the one map record that
    dialect 0.1 has. Raises InvalidTar.
    """
    records: dict[bytes, bytes] = {}
    sparse: list[bytes] = []
    at = 0
    while at < len(payload):
        key, value, at = _record(payload, at)
        if key in {_SPARSE_OFFSET, _SPARSE_LENGTH}:
            expected = _SPARSE_LENGTH if len(sparse) % 2 else _SPARSE_OFFSET
            if key != expected or b"," in value:
                raise InvalidTar("PAX header: sparse map records out of order")
            sparse.append(value)
        else:
            records[key] = value
    if sparse:
        records[_SPARSE_MAP] = b",".join(sparse)
    return records


def _record(payload: bytes, at: int) -> tuple[bytes, bytes, int]:
    """Return key, value and the position behind the record `<length> <key>=<value>\\n` at `at`."""
    space = payload.find(b" ", at)
    length = _integer_or_none(payload[at:space]) if space >= 0 else None
    if length is None or length < _SHORTEST_RECORD or length > len(payload) - at:
        raise InvalidTar(f"PAX header: impossible record length at {at}")
    end = at + length
    key, equals, value = payload[space + 1 : end - 1].partition(b"=")
    if space + 1 >= end or payload[end - 1 : end] != b"\n" or not equals or not key:
        raise InvalidTar(f"PAX header: record at {at} is not `length key=value`")
    if b"\0" in (value if key in _TEXT_KEYS else key):
        raise InvalidTar(f"PAX header: NUL in record {key!r}")
    return key, value, end


def integer(value: bytes, what: object) -> int:
    """Return a decimal number that fits 64 bits. Raises InvalidTar naming `what`."""
    number = _integer_or_none(value)
    if number is None:
        raise InvalidTar(f"PAX header: {what} is not a number: {value[:40]!r}")
    return number


def _integer_or_none(value: bytes) -> int | None:
    if len(value) <= _SAFE_DIGITS and value.isdigit():
        return int(value)
    # The length is looked at first: Python refuses to convert absurdly long digit strings.
    if not _INTEGER.fullmatch(value):
        return None
    digits = value.lstrip(b"+-").lstrip(b"0")
    if len(digits) > 19:
        return None
    number = -int(digits or b"0") if value.startswith(b"-") else int(digits or b"0")
    return number if -_INT64_MAX - 1 <= number <= _INT64_MAX else None


def time(value: bytes, what: object) -> tuple[int, int]:
    """Return `[+-]seconds[.fraction]` as seconds and nanoseconds since 1970, the latter in 0..999999999.

    The fraction is cut behind nine digits and counts away from zero. Raises InvalidTar naming `what`.
    """
    whole, _, fraction = value.partition(b".")
    seconds = integer(whole, what)
    if fraction and not fraction.isdigit():
        raise InvalidTar(f"PAX header: {what} is not a time: {value[:40]!r}")
    nanoseconds = int(fraction[:9].ljust(9, b"0")) if fraction else 0
    if nanoseconds and whole.startswith(b"-"):
        return seconds - 1, 1_000_000_000 - nanoseconds
    return seconds, nanoseconds


def sparse_dialect(records: Mapping[bytes, bytes]) -> int | None:
    """Return the major version of the sparse dialect of a file (0 or 1), None when it is not sparse."""
    if not records:
        return None
    version = records.get(b"GNU.sparse.major", b""), records.get(b"GNU.sparse.minor", b"")
    if version in {(b"0", b"0"), (b"0", b"1")}:
        return 0
    if version == (b"1", b"0"):
        return 1
    if version == (b"", b"") and records.get(_SPARSE_MAP):
        return 0
    return None


def sparse_size(records: Mapping[bytes, bytes], stored: int) -> int:
    """Return the logical size of a sparse file of which `stored` bytes are in the archive."""
    value = records.get(b"GNU.sparse.size") or records.get(b"GNU.sparse.realsize")
    return integer(value, "GNU.sparse.size") if value else stored


def sparse_records(records: Mapping[bytes, bytes]) -> list[int]:
    """Return the numbers of a dialect 0 map, which is in the records. Raises InvalidTar."""
    value = records.get(_SPARSE_MAP)
    numbers = [integer(number, "sparse map") for number in value.split(b",")] if value else []
    count = integer(records.get(b"GNU.sparse.numblocks", b""), "GNU.sparse.numblocks")
    if len(numbers) != 2 * count:
        raise InvalidTar(f"PAX header: sparse map has {len(numbers)} numbers for {count} blocks")
    return numbers


def check_sparse_map(numbers: Sequence[int], size: int) -> None:
    """Check that (offset, length) pairs are in order and within a file of `size` bytes. Raises InvalidTar."""
    end = 0
    for offset, length in zip(numbers[::2], numbers[1::2], strict=True):
        if offset < end or length < 0 or offset + length > size:
            raise InvalidTar(f"sparse map: block of {length} bytes at {offset} in a file of {size}")
        end = offset + length
    if size < 0:
        raise InvalidTar(f"sparse file of {size} bytes")


class SparseMapReader:
    """Reads the map of dialect 1.0, which is in blocks in front of the data: a count, then pairs, one a line."""

    def __init__(self) -> None:
        self._text = bytearray()
        self._lines = 0
        self._count: int | None = None

    def add(self, block: bytes) -> bool:
        """Take the next block; True when it is the last one of the map. Raises InvalidTar."""
        self._text += block
        self._lines += block.count(b"\n")
        if len(self._text) > MAX_PAYLOAD:
            raise InvalidTar("sparse map: too long")
        if self._count is None and self._lines:
            self._count = integer(bytes(self._text[: self._text.index(b"\n")]), "sparse map count")
            if self._count < 0:
                raise InvalidTar("sparse map: negative count")
        return self._count is not None and self._lines > 2 * self._count

    def numbers(self) -> list[int]:
        """Return the numbers behind the count, once the map is complete. Raises InvalidTar."""
        count = 2 * (self._count or 0)
        lines = bytes(self._text).split(b"\n", count + 1)[1 : count + 1]
        return [integer(line, "sparse map") for line in lines]
