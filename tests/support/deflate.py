"""gzip streams put together by hand, bit by bit: the same bytes whatever compressors a machine has.

A stream is a header, blocks, and a trailer. The functions that make blocks return whole bytes: the last of their
blocks is an empty stored one, which aligns, as a sync flush does.

Concurrency: plain functions.
"""

from __future__ import annotations

import struct
import zlib

_FIXED_END = "0" * 7
_SYNC = "000"
_EMPTY_STORED = b"\0\0\xff\xff"
_FINAL = b"\x01" + _EMPTY_STORED
_LONGEST = 258
_FHCRC, _FEXTRA, _FNAME, _FCOMMENT = 2, 4, 8, 16


def member(
    blocks: bytes, crc: int, size: int, *, extra: bytes = b"", name: bytes = b"", comment: bytes = b""
) -> bytes:
    """Return a gzip member of `blocks`, which hold `size` bytes of that CRC-32; optional header fields if given.

    With a comment the header has a checksum of its own.
    """
    flags = _FEXTRA * bool(extra) | _FNAME * bool(name) | (_FCOMMENT | _FHCRC) * bool(comment)
    header = b"\x1f\x8b\x08" + struct.pack("<BIBB", flags, 0, 0, 255)
    header += struct.pack("<H", len(extra)) + extra if extra else b""
    header += b"".join(text + b"\0" for text in (name, comment) if text)
    if comment:
        header += struct.pack("<H", zlib.crc32(header) & 0xFFFF)
    return header + blocks + _FINAL + struct.pack("<II", crc, size & 0xFFFFFFFF)


def gzipped(data: bytes, blocks: bytes, **fields: bytes) -> bytes:
    """Return the member of `blocks`, which are those of `data`; `fields` as of `member`."""
    return member(blocks, zlib.crc32(data), len(data), **fields)


def stored(data: bytes, size: int = 0xFFFF) -> bytes:
    """Return stored blocks of `size` bytes each."""
    pieces = (data[start : start + size] for start in range(0, len(data), size))
    return b"".join(struct.pack("<BHH", 0, len(piece), len(piece) ^ 0xFFFF) + piece for piece in pieces)


def fixed(data: bytes, size: int) -> bytes:
    """Return blocks of `size` literals each in the fixed code, every one where the bits of the last one end."""
    pieces = (data[start : start + size] for start in range(0, len(data), size))
    bits = ["010" + "".join(map(_LITERALS.__getitem__, piece)) + _FIXED_END for piece in pieces]
    return _packed("".join([*bits, _SYNC])) + _EMPTY_STORED


def zeros(matches: int) -> tuple[bytes, int]:
    """Return a block with a code of its own, and how many zeros it holds: one and `matches` repeats of 258.

    Four repeats take a byte, so that a block of megabytes is small.
    """
    # Lengths of the codes: 0 and 256 have two bits, 285 has one, the only distance one. Written with a code in which
    # "18" (many zeros) has one bit, "1" and "2" have two.
    lengths = "11" + _skip(138) + _skip(117) + "11" + _skip(28) + "10" + "10"
    order = ["000"] * 18
    order[2], order[15], order[17] = "100", "010", "010"
    head = "001" + _number(29, 5) + _number(0, 5) + _number(14, 4) + "".join(order) + lengths
    bits = head + "10" + "00" * matches + "11" + _SYNC
    return _packed(bits) + _EMPTY_STORED, 1 + _LONGEST * matches


def _skip(count: int) -> str:
    return "0" + _number(count - 11, 7)


def _number(value: int, width: int) -> str:
    """Return the bits of a number in the order of the stream: lowest first."""
    return f"{value:0{width}b}"[::-1]


def _packed(bits: str) -> bytes:
    """Return the bytes of a stream of bits, filled up with zeros."""
    return int(bits[::-1], 2).to_bytes(-(-len(bits) // 8), "little")


def _literal(byte: int) -> str:
    return f"{0x30 + byte:08b}" if byte < 144 else f"{0x190 + byte - 144:09b}"


_LITERALS = [_literal(byte) for byte in range(256)]
