"""Tar blocks put together by hand, for headers that no library writes.

Concurrency: plain functions.
"""

from __future__ import annotations

BLOCK = 512
END = bytes(2 * BLOCK)
"""The two zero blocks at the end of an archive."""

USTAR = b"ustar\x0000"
GNU = b"ustar  \x00"
V7 = bytes(8)

_PLACES = {
    "name": (0, 100),
    "mode": (100, 8),
    "uid": (108, 8),
    "gid": (116, 8),
    "size": (124, 12),
    "mtime": (136, 12),
    "flag": (156, 1),
    "linkname": (157, 100),
    "magic": (257, 8),
    "uname": (265, 32),
    "gname": (297, 32),
    "devmajor": (329, 8),
    "devminor": (337, 8),
    "prefix": (345, 155),
    "star_prefix": (345, 131),
    "gnu_atime": (345, 12),
    "gnu_ctime": (357, 12),
    "star_atime": (476, 12),
    "star_ctime": (488, 12),
    "trailer": (508, 4),
}
_CHECKSUM = slice(148, 156)


def header(**fields: bytes | int) -> bytes:
    """Return a header block, ustar by default; numbers become octal digits, bytes stand as they are."""
    block = bytearray(BLOCK)
    values: dict[str, bytes | int] = {"name": b"f", "mode": 0o644, "flag": b"0", "magic": USTAR, **fields}
    for key, value in values.items():
        start, size = _PLACES[key]
        text = b"%0*o\0" % (size - 1, value) if isinstance(value, int) else value
        block[start : start + len(text)] = text
    return summed(bytes(block))


def summed(block: bytes, *, signed: bool = False) -> bytes:
    """Return a header block with its checksum, of signed bytes if asked."""
    block = with_checksum(block, b" " * 8)
    return with_checksum(
        block, b"%06o\0 " % sum(byte - 256 if signed and byte > 127 else byte for byte in block)
    )


def with_checksum(block: bytes, checksum: bytes) -> bytes:
    """Return a header block with those eight bytes in place of its checksum."""
    return block[: _CHECKSUM.start] + checksum + block[_CHECKSUM.stop :]


def padded(data: bytes) -> bytes:
    """Return `data` filled up with zeros to whole blocks."""
    return data + bytes(-len(data) % BLOCK)


def entry(data: bytes = b"", **fields: bytes | int) -> bytes:
    """Return a header that says the size of `data`, and the data in whole blocks."""
    return header(**{"size": len(data), **fields}) + padded(data)


def pax(*records: tuple[bytes, bytes]) -> bytes:
    """Return an extended header with these records."""
    return pax_payload(b"".join(record(key, value) for key, value in records))


def pax_payload(payload: bytes) -> bytes:
    """Return an extended header with this payload, well formed or not."""
    return entry(payload, name=b"PaxHeaders/f", flag=b"x")


def record(key: bytes, value: bytes) -> bytes:
    """Return one PAX record; its length counts itself."""
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest)
    while len(b"%d" % length) + len(rest) != length:
        length += 1
    return b"%d" % length + rest


def gnu_long(flag: bytes, text: bytes) -> bytes:
    """Return a GNU pseudo-entry of type `L` (name) or `K` (link name)."""
    return entry(text, name=b"././@LongLink", flag=flag, magic=GNU)
