"""Span arithmetic: geometry, and the property that slices tile a range exactly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.units import Digest
from snapshotter.ztoc.model import Algorithm, CompressionInfo, Ztoc
from snapshotter.ztoc.spans import covering, spans_of
from snapshotter.ztoc.zinfo import WINDOW_SIZE, write_gzip, write_tar

POINTS = [(10, 0, 0), (100, 1000, 3), (200, 2000, 0), (300, 3000, 7)]


def ztoc_of(algorithm: Algorithm, zinfo: bytes, spans: int, sizes: tuple[int, int]) -> Ztoc:
    digests = tuple(Digest(f"sha256:{i:064x}") for i in range(spans))
    info = CompressionInfo(algorithm, spans - 1, digests, zinfo)
    return Ztoc("0.9", "t", *sizes, (), (), info, 40)


def gzip_ztoc(uncompressed_size: int, *, version: int = 2) -> Ztoc:
    zinfo = write_gzip(1, [(*point, bytes(WINDOW_SIZE)) for point in POINTS], version=version)
    return ztoc_of(Algorithm.GZIP, zinfo, 4, (400, uncompressed_size))


def test_a_shared_byte_belongs_to_both_spans() -> None:
    spans = spans_of(gzip_ztoc(3500))
    assert [(one.compressed_start, one.compressed_end) for one in spans] == [
        (10, 100),
        (99, 200),
        (200, 300),
        (299, 400),
    ]
    assert [(one.uncompressed_start, one.uncompressed_end) for one in spans] == [
        (0, 1000),
        (1000, 2000),
        (2000, 3000),
        (3000, 3500),
    ]
    assert [(one.id, one.bits, one.digest[-1]) for one in spans] == [
        (0, 0, "0"),
        (1, 3, "1"),
        (2, 0, "2"),
        (3, 7, "3"),
    ]


@pytest.mark.parametrize(("size", "end"), [(3001, 3001), (3000, 3000), (2999, 3000), (0, 3000)])
def test_the_last_span_is_clamped(size: int, end: int) -> None:
    assert spans_of(gzip_ztoc(size))[3].uncompressed_end == end


def test_where_windows_are() -> None:
    second = spans_of(gzip_ztoc(3500))[1]
    assert second.window_offset == 40 + 12 + (17 + WINDOW_SIZE) + 17
    first, second, *_ = spans_of(gzip_ztoc(3500, version=1))
    assert (first.window_offset, second.window_offset) == (-1, 40 + 12 + 17)


@pytest.mark.parametrize(
    ("size", "archive", "expected"),
    [
        (250, 240, [(0, 100, 100), (100, 200, 200), (200, 250, 240)]),
        (200, 200, [(0, 100, 100), (100, 200, 200)]),
        (201, 150, [(0, 100, 100), (100, 200, 200), (200, 201, 200)]),
        (0, 0, []),
    ],
)
def test_uncompressed(size: int, archive: int, expected: list[tuple[int, int, int]]) -> None:
    ztoc = ztoc_of(Algorithm.UNCOMPRESSED, write_tar(100, size), len(expected), (size, archive))
    spans = spans_of(ztoc)
    assert [(one.compressed_start, one.compressed_end, one.uncompressed_end) for one in spans] == expected
    assert all((one.bits, one.window_offset) == (0, -1) for one in spans)
    assert all(one.uncompressed_start == one.compressed_start for one in spans)


def test_a_range_that_ends_on_a_border_touches_no_further_span() -> None:
    starts = [0, 1000, 2000, 3000]
    assert covering(starts, 0, 1000) == range(1)
    assert covering(starts, 500, 2000) == range(2)
    assert covering(starts, 1000, 1001) == range(1, 2)
    assert covering(starts, 999, 1001) == range(2)
    assert covering(starts, 3500, 9000) == range(3, 4)


@pytest.mark.parametrize("at", [0, 5, 1000, 5000])
def test_an_empty_range_touches_nothing(at: int) -> None:
    assert covering([0, 1000], at, at) == range(0)
    assert covering([0, 1000], at, at - 1) == range(0)
    assert covering([], at, at) == range(0)


def test_empty_spans_at_the_front_are_left_out() -> None:
    assert covering([0, 0, 0, 50], 0, 10) == range(2, 3)
    assert covering([0, 0, 0, 50], 0, 60) == range(2, 4)


@given(
    starts=st.sets(st.integers(1, 300), max_size=12).map(lambda more: [0, *sorted(more)]),
    start=st.integers(0, 400),
    length=st.integers(0, 400),
)
def test_slices_tile_the_range_exactly(starts: list[int], start: int, length: int) -> None:
    end = start + length
    borders = [*starts, 1000]
    pieces = [(max(start, borders[i]), min(end, borders[i + 1])) for i in covering(starts, start, end)]
    assert all(low < high for low, high in pieces)
    assert [at for low, high in pieces for at in range(low, high)] == list(range(start, end))
