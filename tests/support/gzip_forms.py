"""The many shapes that the gzip stream of one and the same tar can have.

Concurrency: plain functions; the same bytes at every run.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable

from isal import isal_zlib
from zlib_ng import zlib_ng

_GZIP = 31
_RAW = -15

_FHCRC, _FEXTRA, _FNAME, _FCOMMENT = 2, 4, 8, 16


def deflated(
    data: bytes,
    *,
    level: int = 6,
    strategy: int = zlib.Z_DEFAULT_STRATEGY,
    flush: int = zlib.Z_NO_FLUSH,
    every: int = 1 << 30,
    window_bits: int = _GZIP,
) -> bytes:
    """Return zlib's stream of `data`, with a flush of kind `flush` behind every so many bytes."""
    encoder = zlib.compressobj(level, zlib.DEFLATED, window_bits, 8, strategy)
    out = []
    for start in range(0, len(data), every):
        out += [encoder.compress(data[start : start + every]), encoder.flush(flush)]
    return b"".join([*out, encoder.flush()])


def members(data: bytes, sizes: Iterable[int]) -> bytes:
    """Return members of the given sizes (0 for an empty one), and one of what is left."""
    out = []
    for size in sizes:
        out.append(deflated(data[:size]))
        data = data[size:]
    return b"".join([*out, deflated(data)])


def with_header(data: bytes, *, extra: bytes = b"", name: bytes = b"", comment: bytes = b"") -> bytes:
    """Return a member whose header has optional fields, its own checksum among them."""
    flags = (_FHCRC | _FEXTRA | _FNAME | _FCOMMENT) if comment else _FEXTRA
    header = b"\x1f\x8b\x08" + struct.pack("<BIBB", flags, 12345, 2, 3)
    header += struct.pack("<H", len(extra)) + extra
    if comment:
        header += name + b"\0" + comment + b"\0"
        header += struct.pack("<H", zlib.crc32(header) & 0xFFFF)
    trailer = struct.pack("<II", zlib.crc32(data), len(data) & 0xFFFFFFFF)
    return header + deflated(data, window_bits=_RAW) + trailer


def _empty_blocks_first(data: bytes) -> bytes:
    """Return a stream that begins with empty blocks: stored ones, and fixed ones that end within a byte."""
    body = zlib.compressobj(6, zlib.DEFLATED, _RAW)
    blocks = body.flush(zlib.Z_FULL_FLUSH) + body.flush(zlib.Z_PARTIAL_FLUSH) + b"\0\0\0\xff\xff" * 3
    blocks += body.compress(data) + body.flush()
    trailer = struct.pack("<II", zlib.crc32(data), len(data))
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + blocks + trailer


def _isal(data: bytes) -> bytes:
    encoder = isal_zlib.compressobj(2, zlib.DEFLATED, _GZIP)
    return bytes(encoder.compress(data) + encoder.flush())


def _zlib_ng(data: bytes) -> bytes:
    encoder = zlib_ng.compressobj(3, zlib.DEFLATED, _GZIP)
    return bytes(encoder.compress(data) + encoder.flush())


FORMS: dict[str, Callable[[bytes], bytes]] = {
    "level 1": lambda data: deflated(data, level=1),
    "level 6": deflated,
    "level 9": lambda data: deflated(data, level=9),
    "stored blocks": lambda data: deflated(data, level=0),
    "fixed codes": lambda data: deflated(data, strategy=zlib.Z_FIXED),
    "huffman only": lambda data: deflated(data, strategy=zlib.Z_HUFFMAN_ONLY),
    "run lengths": lambda data: deflated(data, strategy=zlib.Z_RLE),
    "isal": _isal,
    "zlib-ng": _zlib_ng,
    "tiny blocks": lambda data: deflated(data, flush=zlib.Z_PARTIAL_FLUSH, every=100),
    "sync flushes": lambda data: deflated(data, flush=zlib.Z_SYNC_FLUSH, every=5000),
    "full flushes": lambda data: deflated(data, flush=zlib.Z_FULL_FLUSH, every=3000),
    "empty blocks first": _empty_blocks_first,
    "extra field": lambda data: with_header(data, extra=b"ab\x04\x00wxyz"),
    "all header fields": lambda data: with_header(
        data, extra=b"E" * 300, name=b"layer.tar", comment=b"no comment"
    ),
    "two members": lambda data: members(data, [len(data) // 3]),
    "empty first member": lambda data: members(data, [0]),
    "empty members": lambda data: members(data, [0, 0, 10_000, 0, 1, 0, len(data)]),
    "member per file": lambda data: members(data, [1500] * (len(data) // 1500)),
    "members of all kinds": lambda data: b"".join(
        [
            deflated(data[:40_000], level=0),
            with_header(data[40_000:80_000], extra=b"x" * 1000),
            deflated(data[80_000:], flush=zlib.Z_PARTIAL_FLUSH, every=999),
        ]
    ),
}
"""Every form by its name; a function from the data to the stream."""
