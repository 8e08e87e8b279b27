"""Inflating spans at any bit offset and whole layers, with both decoders. (Spans of real layers: test_ztoc_build.)"""

from __future__ import annotations

import gzip
import random
import tracemalloc
import zlib

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotter.errors import InvalidTar, SpanInflateError, UnsupportedLayer
from snapshotter.ztoc.inflate import BACKENDS, _decoders, bit_prefix, decompress_stream, inflate_span
from snapshotter.ztoc.model import Algorithm, Buffer
from tests.support.gzip_forms import FORMS, deflated, members

DATA = random.Random(4).randbytes(3000) * 40 + bytes(50_000)

backends = pytest.mark.parametrize("backend", BACKENDS)


def span(
    compressed: Buffer, length: int, *, bits: int = 0, window: Buffer | None = None, backend: str = "isal"
) -> bytes:
    out = inflate_span(
        compressed, algorithm=Algorithm.GZIP, bits=bits, window=window, length=length, backend=backend
    )
    return bytes(out)


def shifted(raw: bytes, bits: int) -> bytes:
    """Return a raw stream moved so that its first bits are the highest `bits` of the first byte."""
    return (int.from_bytes(raw, "little") << (8 - bits)).to_bytes(len(raw) + 1, "little")


@backends
@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("junk", [0, 255])
def test_any_bit_offset(bits: int, junk: int, backend: str) -> None:
    compressed = bytearray(shifted(deflated(DATA, window_bits=-15), bits))
    compressed[0] |= junk & ((1 << (8 - bits)) - 1)
    assert span(compressed, len(DATA), bits=bits, backend=backend) == DATA


@pytest.mark.parametrize("bits", range(1, 8))
def test_a_prefix_is_whole_bytes_that_inflate_to_nothing(bits: int) -> None:
    for decoder in (zlib.decompressobj(-15), _decoders(("isal",)).decompressobj(-15)):
        assert decoder.decompress(bit_prefix(bits, 0), 100) == b""


@backends
@pytest.mark.parametrize("bits", [0, 1, 2, 3, 4, 5, 6, 7])
def test_the_window_is_what_came_before(bits: int, backend: str) -> None:
    window = random.Random(6).randbytes(32768)
    encoder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, window)
    raw = encoder.compress(window[5000:25_000]) + encoder.flush()
    assert len(raw) < 1000
    compressed = shifted(raw, bits) if bits else raw
    assert (
        span(compressed, 20_000, bits=bits, window=memoryview(window), backend=backend) == window[5000:25_000]
    )


@backends
@pytest.mark.parametrize("length", [1, 100, 131_072, len(DATA) - 1])
def test_no_more_than_asked(length: int, backend: str) -> None:
    assert span(deflated(DATA, window_bits=-15), length, backend=backend) == DATA[:length]


@backends
@pytest.mark.parametrize("length", [0, -5])
def test_nothing(length: int, backend: str) -> None:
    assert span(b"", length, backend=backend) == b""
    assert span(b"\xff", length, bits=3, backend=backend) == b""


@backends
@pytest.mark.parametrize("sizes", [[70_000], [0], [0, 0, 1, 5, 60_000, 0], [100] * 900])
def test_over_the_ends_of_members(sizes: list[int], backend: str) -> None:
    stream = members(DATA, sizes)[10:]
    for length in (1, 5, 60_000, 70_000, 70_001, len(DATA)):
        assert span(stream, length, backend=backend) == DATA[:length]


@backends
def test_what_does_not_inflate_to_its_length(backend: str) -> None:
    raw = deflated(DATA, window_bits=-15)
    two = members(DATA, [70_000])[10:]
    at = two.index(b"\x1f\x8b\x08")
    for compressed, bits in [
        (b"", 0),
        (b"", 5),
        (b"\xff", 5),
        (raw[:-5], 0),
        (raw, 3),
        (raw, 0),
        (b"\xff" * 50, 0),
        (two[: at - 9], 0),
        (two[:-9], 0),
        (two[:at] + b"x" + two[at + 1 :], 0),
        (members(DATA, [70_000, len(DATA) - 70_000])[10:], 0),
    ]:
        with pytest.raises(SpanInflateError, match=r"span (inflates to|does not inflate)"):
            span(compressed, len(DATA) + 1, bits=bits, backend=backend)


@backends
def test_a_member_with_a_wrong_checksum(backend: str) -> None:
    stream = bytearray(members(DATA, [10, 20])[10:])
    stream[-8 - len(deflated(DATA[30:])) - 1] ^= 1
    with pytest.raises(SpanInflateError, match="does not inflate"):
        span(stream, len(DATA), backend=backend)


def test_uncompressed_spans_are_views() -> None:
    out = inflate_span(DATA, algorithm=Algorithm.UNCOMPRESSED, bits=0, window=None, length=100)
    assert isinstance(out, memoryview)
    assert (out, out.obj is DATA) == (DATA[:100], True)
    for length in (0, -1):
        assert not inflate_span(DATA, algorithm=Algorithm.UNCOMPRESSED, bits=0, window=None, length=length)
    with pytest.raises(SpanInflateError, match="span inflates to 5 bytes, not to 6"):
        inflate_span(b"12345", algorithm=Algorithm.UNCOMPRESSED, bits=0, window=None, length=6)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 7), st.integers(0, 5000), st.sampled_from(sorted(BACKENDS)))
def test_any_bytes_give_the_length_or_the_error(data: bytes, bits: int, length: int, backend: str) -> None:
    try:
        out = span(data, length, bits=bits, window=bytes(32768), backend=backend)
    except SpanInflateError:
        return
    assert len(out) == length


def test_the_fallback_is_taken_where_the_better_one_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "isal", "no_such_module")
    _decoders.cache_clear()
    try:
        assert _decoders(tuple(BACKENDS)) is zlib
        with pytest.raises(ImportError, match="none of the modules to inflate with is installed: isal"):
            _decoders(("isal",))
    finally:
        _decoders.cache_clear()


class TestStreams:
    """Whole layers."""

    @backends
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("chunk", [999, 1 << 20])
    def test_gzip(self, form: str, chunk: int, backend: str) -> None:
        blob = FORMS[form](DATA)
        chunks = (memoryview(blob)[at : at + chunk] for at in range(0, len(blob), chunk))
        assert b"".join(decompress_stream(chunks, "gzip", backend=backend)) == DATA

    @backends
    def test_gzip_in_bounded_pieces(self, backend: str) -> None:
        blob = gzip.compress(bytes(40 << 20))
        tracemalloc.start()
        sizes = [len(piece) for piece in decompress_stream([blob], "gzip", backend=backend)]
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
        tracemalloc.stop()
        assert (sum(sizes), max(sizes) <= 1 << 20) == (40 << 20, True)

    @backends
    @pytest.mark.parametrize(
        "blob",
        [
            b"",
            gzip.compress(DATA)[:-1],
            gzip.compress(DATA)[:2000],
            gzip.compress(DATA) + b"\x1f",
            gzip.compress(DATA) + bytes(512),
            gzip.compress(DATA) + b"garbage",
            gzip.compress(DATA)[:-8] + bytes(8),
            deflated(DATA, window_bits=15),
            DATA,
        ],
    )
    def test_damaged_gzip(self, blob: bytes, backend: str) -> None:
        with pytest.raises(InvalidTar, match="gzip stream"):
            list(decompress_stream([blob], "gzip", backend=backend))

    @pytest.mark.parametrize("chunk", [1000, 1 << 20])
    def test_zstd(self, chunk: int) -> None:
        data = random.Random(8).randbytes(700_000) + bytes(1 << 20)
        frame = zstandard.ZstdCompressor().compress
        blob = frame(data) + frame(b"") + frame(data[:5]) + b"\x50\x2a\x4d\x18\x03\0\0\0xyz" + frame(data)
        chunks = (blob[at : at + chunk] for at in range(0, len(blob), chunk))
        pieces = list(decompress_stream(chunks, "zstd"))
        assert b"".join(pieces) == data + data[:5] + data
        assert max(map(len, pieces)) <= 1 << 21

    def test_zstd_in_bounded_pieces(self) -> None:
        blob = zstandard.ZstdCompressor().compress(bytes(300 << 20))
        assert max(len(piece) for piece in decompress_stream([blob], "zstd")) <= 80 << 20

    @pytest.mark.parametrize(
        "blob",
        [
            b"",
            zstandard.ZstdCompressor().compress(DATA)[:-1],
            zstandard.ZstdCompressor().compress(DATA) + b"garbage here",
            zstandard.ZstdCompressor().compress(DATA) + b"\x28\xb5",
            DATA,
        ],
    )
    def test_damaged_zstd(self, blob: bytes) -> None:
        with pytest.raises(InvalidTar, match="zstd stream"):
            list(decompress_stream([blob], "zstd"))

    def test_uncompressed(self) -> None:
        assert list(decompress_stream([b"a", memoryview(b"bc")], "uncompressed")) == [b"a", b"bc"]

    def test_anything_else(self) -> None:
        with pytest.raises(UnsupportedLayer, match="compression 'xz'"):
            decompress_stream([b""], "xz")
