"""The checkpoint scan by itself, and the library below it. (Against the oracle: test_ztoc_build.)"""

from __future__ import annotations

import sys

import pytest

from snapshotter.errors import InvalidTar
from snapshotter.ztoc import blockinflate
from snapshotter.ztoc.blockinflate import BACKENDS, BlockInflater
from snapshotter.ztoc.checkpoints import OUTPUT_SIZE, CheckpointScanner, Point
from snapshotter.ztoc.zinfo import WINDOW_SIZE
from tests.support.gzip_forms import deflated, members, with_header

backends = pytest.mark.parametrize("backend", BACKENDS)


class Scan:
    """A scan of a whole stream: its points and its output."""

    def __init__(
        self, blob: bytes, span_size: int, *, chunk: int = 1 << 20, backend: str | None = None
    ) -> None:
        self.points: list[Point] = []
        self.pieces: list[bytes] = []
        with CheckpointScanner(
            span_size, lambda view: self.pieces.append(bytes(view)), backend=backend
        ) as scanner:
            for at in range(0, len(blob), chunk):
                self.points += scanner.feed(bytearray(blob[at : at + chunk]))
            scanner.close()
        self.output = b"".join(self.pieces)


@backends
def test_the_first_is_behind_the_header_and_starts_from_zeros(backend: str) -> None:
    blob = with_header(b"data", extra=b"1234")
    assert Scan(blob, 0, backend=backend).points == [Point(10 + 2 + 4, 0, 0, bytes(WINDOW_SIZE))]


@backends
def test_a_span_is_longer_than_the_span_size(backend: str) -> None:
    blob = deflated(bytes(range(256)) * 100, flush=2, every=1000)
    for span_size, distance in [(999, 1000), (1000, 2000), (1001, 2000)]:
        points = Scan(blob, span_size, backend=backend).points
        assert [point.uncompressed_out for point in points[:4]] == [0, distance, 2 * distance, 3 * distance]


@backends
@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_windows_over_members_and_buffers(backend: str, chunk: int) -> None:
    data = b"".join(b"%08d" % i for i in range(40_000)) + bytes(OUTPUT_SIZE)
    blob = members(data, [5, 0, 10_000, 300_000, OUTPUT_SIZE // 2])
    scan = Scan(blob, 4000, chunk=chunk, backend=backend)
    assert scan.output == data
    assert len(scan.points) > 3
    for point in scan.points:
        assert point.window == (bytes(WINDOW_SIZE) + data[: point.uncompressed_out])[-WINDOW_SIZE:]


def test_output_comes_in_full_buffers_and_a_rest() -> None:
    scan = Scan(deflated(bytes(3 * OUTPUT_SIZE + 5)), 1)
    assert [len(piece) for piece in scan.pieces] == [OUTPUT_SIZE] * 3 + [5]
    assert [len(piece) for piece in Scan(deflated(bytes(OUTPUT_SIZE)), 1).pieces] == [OUTPUT_SIZE, 0]


def test_a_view_is_valid_until_the_next_call_is_over() -> None:
    data = b"".join(bytes([i]) * OUTPUT_SIZE for i in range(6))[: 5 * OUTPUT_SIZE + 1]
    views: list[memoryview] = []

    def sink(view: memoryview) -> None:
        views.append(view)
        for i in range(max(0, len(views) - 2), len(views)):
            assert views[i][:1] == data[i * OUTPUT_SIZE : i * OUTPUT_SIZE + 1]

    with CheckpointScanner(1, sink) as scanner:
        scanner.feed(deflated(data))
        scanner.close()
    assert len(views) == 6


def test_the_sink_may_raise() -> None:
    def sink(view: memoryview) -> None:
        raise LookupError(len(view))

    with CheckpointScanner(1, sink) as scanner, pytest.raises(LookupError, match=str(OUTPUT_SIZE)):
        scanner.feed(deflated(bytes(2 * OUTPUT_SIZE)))


def test_empty_chunks_change_nothing() -> None:
    with CheckpointScanner(1, lambda view: None) as scanner:
        assert scanner.feed(b"") == []
        assert len(scanner.feed(deflated(b"x"))) == 1
        assert scanner.feed(b"") == []
        scanner.close()


@backends
def test_errors_name_what_is_wrong(backend: str) -> None:
    with pytest.raises(InvalidTar, match="gzip stream: incorrect header check"):
        Scan(b"not gzip", 1, backend=backend)
    with pytest.raises(InvalidTar, match="gzip stream: invalid"):
        Scan(deflated(b"")[:10] + b"\xff" * 10, 1, backend=backend)
    with pytest.raises(InvalidTar, match="ends at 12, in the middle of a member"):
        Scan(deflated(b"some data")[:12], 1, backend=backend)


def test_a_missing_library_is_replaced_by_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zlib_ng.zlib_ng", None)
    blockinflate._library.cache_clear()
    try:
        assert blockinflate._library(BACKENDS).stream_type is blockinflate._ZlibStream
        with pytest.raises(OSError, match=r"no library to scan gzip streams with .zlib-ng: "):
            BlockInflater("zlib-ng")
    finally:
        blockinflate._library.cache_clear()


def test_the_preferred_library_is_there() -> None:
    assert blockinflate._library(BACKENDS).stream_type is blockinflate._ZlibNgStream


def test_a_library_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = blockinflate._library(("zlib",))._replace(init=lambda stream: -4)
    monkeypatch.setattr(blockinflate, "_library", lambda names: broken)
    with pytest.raises(MemoryError):
        BlockInflater()


def test_a_code_without_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = blockinflate._library(("zlib",))._replace(inflate=lambda stream, flush: -2)
    monkeypatch.setattr(blockinflate, "_library", lambda names: broken)
    with CheckpointScanner(1, lambda view: None) as scanner, pytest.raises(InvalidTar, match="zlib error -2"):
        scanner.feed(b"x")
