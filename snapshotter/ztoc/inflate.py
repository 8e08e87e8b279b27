"""Inflating: one span from its checkpoint, or a whole layer as a stream.

A checkpoint may lie inside a byte, and the usual way to start there, zlib's inflatePrime, is not to
be had from Python. But deflate has blocks that produce nothing: with a few of them put in front, the
leftover bits of the shared byte come to lie where a decoder that starts at a byte border expects
them. So any decoder with a raw mode and a preset dictionary will do, and isal is the fastest (700 to
850 MB/s; zlib 400).

Memory is bounded by what is asked for, not by what the data claims. The heavy part is in the
decoders, which release the interpreter lock. Nothing is shared between calls.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import zstandard

from snapshotter.errors import InvalidTar, SpanInflateError, UnsupportedLayer
from snapshotter.ztoc.model import Algorithm, Buffer

BACKENDS = {"isal": "isal.isal_zlib", "zlib": "zlib"}
"""Modules that can inflate, in the order of preference."""

_RAW = -15
_GZIP = 31
_GZIP_TRAILER = 8

_PIECE = 32 << 10
"""Input per call where many small members may follow each other: a decoder copies what is left of its
input when a member ends, and some layers have a member per file."""

_OUTPUT = 1 << 20
"""Most output per step of a gzip stream."""

_ZSTD_PIECE = 2 << 10
"""Input per call for zstd, whose decoder cannot be told to stop: 2 KiB may become 64 MiB, no more.
Costs a tenth of the speed."""

_ZSTD_OUTPUT = 256 << 10
"""Least output per step of a zstd stream, but for the last one."""


def inflate_span(
    compressed: Buffer,
    *,
    algorithm: Algorithm,
    bits: int,
    window: Buffer | None,
    length: int,
    backend: str | None = None,
) -> bytes | memoryview:
    """Return the first `length` uncompressed bytes of a span.

    `compressed` holds exactly the span's bytes of the blob, `bits` says how many high bits of the
    first one belong to it (0: all of it), and `window` is the output before the span, None for
    nothing but zeros. The span may run over the ends of gzip members. For an uncompressed layer the
    result is a view of `compressed`. `backend` is one of BACKENDS, by default the best there is.
    Raises SpanInflateError when that many bytes do not come out.
    """
    view = memoryview(compressed)
    if algorithm is Algorithm.UNCOMPRESSED:
        result: bytes | memoryview = view[: max(length, 0)]
    elif length <= 0:
        return b""
    else:
        decoders = _decoders(tuple([backend] if backend else BACKENDS))
        try:
            result = _inflate(decoders, view, bits, window, length)
        except decoders.error as error:
            raise SpanInflateError(f"span does not inflate: {error}") from None
    if len(result) < length:
        raise SpanInflateError(f"span inflates to {len(result)} bytes, not to {length}")
    return result


def decompress_stream(
    chunks: Iterable[Buffer], compression: str, *, backend: str | None = None
) -> Iterator[bytes]:
    """Yield the tar stream of a layer whose blob is the concatenation of `chunks`, in pieces of some KiB to MiB.

    `compression` is "gzip" (any number of members), "zstd" (any number of frames) or "uncompressed";
    anything else raises UnsupportedLayer. A stream that is damaged, ends early or has anything behind
    its last member raises InvalidTar. `backend` is one of BACKENDS and only matters to gzip.
    """
    if compression == "gzip":
        return _gunzip(_decoders(tuple([backend] if backend else BACKENDS)), _pieces(chunks, _PIECE))
    if compression == "zstd":
        return _unzstd(_pieces(chunks, _ZSTD_PIECE))
    if compression == "uncompressed":
        return map(bytes, chunks)
    raise UnsupportedLayer(f"layers with compression {compression!r} are not supported")


class _Decoder(Protocol):
    """A decompressobj of zlib or of a module made in its image."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    @property
    def unconsumed_tail(self) -> bytes: ...

    def decompress(self, data: Buffer, max_length: int, /) -> bytes: ...


class _Decoders(Protocol):
    """The module zlib, or one made in its image."""

    error: type[Exception]
    decompressobj: Callable[..., _Decoder]


@functools.cache
def _decoders(names: tuple[str, ...]) -> _Decoders:
    """Return the first of the named modules that is installed. Raises ImportError when none is."""
    for name in names:
        try:
            return importlib.import_module(BACKENDS[name])
        except ImportError:
            continue
    raise ImportError(f"none of the modules to inflate with is installed: {', '.join(names)}")


def _inflate(decoders: _Decoders, view: memoryview, bits: int, window: Buffer | None, length: int) -> bytes:
    """Return up to `length` bytes; fewer when the input ends."""
    decoder = decoders.decompressobj(_RAW) if window is None else decoders.decompressobj(_RAW, zdict=window)
    if bits and view:
        decoder.decompress(bit_prefix(bits, view[0]), length)
        view = view[1:]
    out = decoder.decompress(view, length)
    if len(out) == length or not decoder.eof:
        return out
    rest = view[len(view) - len(decoder.unused_data) + _GZIP_TRAILER :]
    return b"".join([out, *_inflate_members(decoders, rest, length - len(out))])


def _inflate_members(decoders: _Decoders, view: memoryview, missing: int) -> Iterator[bytes]:
    """Yield the output of the members in `view`, up to `missing` bytes."""
    decoder = decoders.decompressobj(_GZIP)
    at = 0
    while missing and at < len(view):
        piece = view[at : at + _PIECE]
        out = decoder.decompress(piece, missing)
        missing -= len(out)
        at += len(piece) - len(decoder.unused_data)
        if decoder.eof:
            decoder = decoders.decompressobj(_GZIP)
        yield out


class _BitString:
    """A string of bits in deflate's order, lowest bit of a byte first."""

    def __init__(self, *fields: tuple[int, int]) -> None:
        """Concatenate (value, number of bits) pairs, each with its lowest bit first."""
        self.value = 0
        self.size = 0
        for value, size in fields:
            self.value |= value << self.size
            self.size += size


def _empty_blocks() -> dict[int, _BitString]:
    """Return strings of blocks that inflate to nothing, by their number of bits modulo 8 (0 is left out).

    A block with fixed codes is 10 bits of header and end-of-block, which gives the even numbers. For
    the odd ones a block with codes of its own is put in front, here one of 91 bits: literal 0 and
    end-of-block get the one-bit codes 0 and 1, distance 0 a one-bit code.
    """
    fixed = [(0b0, 1), (0b01, 2), (0, 7)]
    # Code lengths are themselves coded: "1" as bit 0, and symbol 18, "11 to 138 zeros", as bit 1.
    # Their code lengths come in a fixed odd order, in which 18 is third and 1 the last of 18.
    lengths_of_codes = [(1, 3) if place in {2, 17} else (0, 3) for place in range(18)]
    literals = [(0, 1), (1, 1), (138 - 11, 7), (1, 1), (117 - 11, 7), (0, 1)]
    dynamic = [
        (0b0, 1),
        (0b10, 2),
        (257 - 257, 5),
        (0, 5),
        (18 - 4, 4),
        *lengths_of_codes,
        *literals,
        (0, 1),
        (1, 1),
    ]
    strings = [_BitString(*start, *fixed * count) for start in ([], dynamic) for count in range(4)]
    return {string.size % 8: string for string in strings if string.size % 8}


_EMPTY_BLOCKS = _empty_blocks()


def bit_prefix(bits: int, shared: int) -> bytes:
    """Return whole bytes to feed to a raw decoder in place of the highest `bits` (1..7) bits of `shared`.

    They hold blocks that produce nothing and then just those bits, the decoder's state staying as it is.
    """
    blocks = _EMPTY_BLOCKS[8 - bits]
    value = blocks.value | (shared >> (8 - bits)) << blocks.size
    return value.to_bytes((blocks.size + bits) // 8, "little")


def _gunzip(decoders: _Decoders, pieces: Iterable[bytes]) -> Iterator[bytes]:
    decoder: _Decoder | None = decoders.decompressobj(_GZIP)
    try:
        for piece in pieces:
            data = piece
            full = False
            while data or full:
                decoder = decoder or decoders.decompressobj(_GZIP)
                out = decoder.decompress(data, _OUTPUT)
                if out:
                    yield out
                full = len(out) == _OUTPUT
                data = decoder.unconsumed_tail
                if decoder.eof:
                    data, decoder, full = decoder.unused_data, None, False
    except decoders.error as error:
        raise InvalidTar(f"gzip stream: {error}") from None
    if decoder is not None:
        raise InvalidTar("gzip stream ends where a member should go on")


def _unzstd(pieces: Iterable[bytes]) -> Iterator[bytes]:
    frames = zstandard.ZstdDecompressor()
    decoder: zstandard.ZstdDecompressionObj | None = frames.decompressobj()
    outputs: list[bytes] = []
    size = 0
    try:
        for piece in pieces:
            data = piece
            while data:
                decoder = decoder or frames.decompressobj()
                outputs.append(decoder.decompress(data))
                size += len(outputs[-1])
                data = b""
                if decoder.eof:
                    data, decoder = decoder.unused_data, None
            if size >= _ZSTD_OUTPUT:
                yield b"".join(outputs)
                outputs.clear()
                size = 0
    except zstandard.ZstdError as error:
        raise InvalidTar(f"zstd stream: {error}") from None
    if decoder is not None:
        raise InvalidTar("zstd stream ends where a frame should go on")
    yield b"".join(outputs)


def _pieces(chunks: Iterable[Buffer], size: int) -> Iterator[bytes]:
    for chunk in chunks:
        view = memoryview(chunk)
        for start in range(0, len(view), size):
            yield bytes(view[start : start + size])
