"""What workers do with the bytes of a span, on real files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotter.errors import InvalidLayerFile, SpanDigestMismatch
from snapshotter.fetch import pipeline
from snapshotter.fetch.layerstate import ActiveLayer, LayerFiles
from snapshotter.fetch.pipeline import Outcome
from snapshotter.layer.spans import SpanState
from snapshotter.layer.store import LayerStore
from tests.fetch.rig import Layer, make_layer, put
from tests.support.process import open_descriptors

NOTHING = memoryview(b"")
NUMBER = 5


@pytest.fixture(params=["gzip", "uncompressed"])
def layer(request: pytest.FixtureRequest) -> Layer:
    return make_layer(compression=request.param)


@pytest.fixture
def store(tmp_path: Path, layer: Layer) -> LayerStore:
    store = LayerStore(tmp_path)
    put(store, layer)
    return store


def open_files(store: LayerStore, layer: Layer) -> LayerFiles:
    return LayerFiles.open(store, layer.digest, boot_id="boot", span_max=1 << 30)


@pytest.fixture
def files(store: LayerStore, layer: Layer) -> Iterator[LayerFiles]:
    files = open_files(store, layer)
    yield files
    files.states.close()
    files.close()


def stored(fd: int, start: int, end: int) -> bytes:
    return os.pread(fd, end - start, start)


def test_a_span_is_stored_and_inflated(files: LayerFiles, layer: Layer) -> None:
    span = layer.spans[NUMBER]
    compressed = memoryview(layer.compressed(NUMBER))
    outcome = pipeline.store(files, NUMBER, compressed, NOTHING, lambda: SpanState.INFLATED)
    assert outcome == Outcome(SpanState.INFLATED, pipeline.checksum_of(layer.content(NUMBER)))
    assert stored(files.blob_fd, span.compressed_start, span.compressed_end) == compressed
    assert stored(files.data_fd, span.uncompressed_start, span.uncompressed_end) == layer.content(NUMBER)


def test_a_span_for_the_background_is_only_stored_and_can_be_inflated_later(
    files: LayerFiles, layer: Layer
) -> None:
    span = layer.spans[NUMBER]
    compressed = memoryview(layer.compressed(NUMBER))
    outcome = pipeline.store(files, NUMBER, compressed, NOTHING, lambda: SpanState.FETCHED)
    assert outcome == Outcome(SpanState.FETCHED)
    assert files.shared or not any(stored(files.data_fd, span.uncompressed_start, span.uncompressed_end))
    assert pipeline.inflate(files, NUMBER).state is SpanState.INFLATED
    assert stored(files.data_fd, span.uncompressed_start, span.uncompressed_end) == layer.content(NUMBER)


def test_the_bytes_before_span_0_are_stored_with_it(files: LayerFiles, layer: Layer) -> None:
    header = memoryview(layer.blob)[: files.header_end]
    pipeline.store(files, 0, memoryview(layer.compressed(0)), header, lambda: SpanState.FETCHED)
    assert (
        stored(files.blob_fd, 0, layer.spans[0].compressed_end) == layer.blob[: layer.spans[0].compressed_end]
    )


@pytest.mark.parametrize("at", [0, 100, -1])
def test_wrong_bytes_are_refused_and_nothing_is_written(files: LayerFiles, layer: Layer, at: int) -> None:
    wrong = bytearray(layer.compressed(NUMBER))
    wrong[at] ^= 0x80
    with pytest.raises(SpanDigestMismatch, match=f"span {NUMBER}"):
        pipeline.store(files, NUMBER, memoryview(wrong), NOTHING, lambda: SpanState.INFLATED)
    assert not any(os.pread(files.blob_fd, len(layer.blob), 0))
    assert not any(os.pread(files.data_fd, len(layer.tar), 0))


def test_a_span_that_cannot_be_inflated_is_kept_compressed(tmp_path: Path) -> None:
    layer = make_layer()
    store = LayerStore(tmp_path / "other")
    put(store, layer)
    files = open_files(store, layer)
    os.truncate(files.paths.ztoc, layer.spans[NUMBER].window_offset)
    compressed = memoryview(layer.compressed(NUMBER))
    outcome = pipeline.store(files, NUMBER, compressed, NOTHING, lambda: SpanState.INFLATED)
    ActiveLayer(files).close()
    assert outcome.state is SpanState.FETCHED
    assert isinstance(outcome.error, OSError)


def test_a_damaged_ztoc_is_refused_because_its_windows_would_make_wrong_bytes(
    store: LayerStore, layer: Layer
) -> None:
    path = store.paths(layer.digest).ztoc
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InvalidLayerFile, match="zTOC"):
        open_files(store, layer)


def test_checking_finds_out_what_is_right(files: LayerFiles, layer: Layer) -> None:
    span = layer.spans[NUMBER]
    assert pipeline.check(files, NUMBER, 1).state is SpanState.MISSING, "nothing is stored"
    pipeline.store(files, NUMBER, memoryview(layer.compressed(NUMBER)), NOTHING, lambda: SpanState.FETCHED)
    assert pipeline.check(files, NUMBER, 0) == Outcome(SpanState.FETCHED)
    checksum = pipeline.checksum_of(layer.content(NUMBER))
    if not files.shared:
        assert pipeline.check(files, NUMBER, checksum) == Outcome(SpanState.FETCHED), "data is missing"
    pipeline.inflate(files, NUMBER)
    assert pipeline.check(files, NUMBER, checksum) == Outcome(SpanState.INFLATED, checksum)
    if not files.shared:
        os.pwrite(files.data_fd, b"?", span.uncompressed_end - 1)
        assert pipeline.check(files, NUMBER, checksum) == Outcome(SpanState.FETCHED)
    os.pwrite(files.blob_fd, b"?", span.compressed_end - 1)
    assert pipeline.check(files, NUMBER, checksum) == Outcome(SpanState.MISSING)


def test_a_file_that_was_cut_off_is_no_error(files: LayerFiles, layer: Layer) -> None:
    pipeline.store(files, NUMBER, memoryview(layer.compressed(NUMBER)), NOTHING, lambda: SpanState.INFLATED)
    checksum = pipeline.checksum_of(layer.content(NUMBER))
    if not files.shared:
        os.ftruncate(files.data_fd, layer.spans[NUMBER].uncompressed_end - 1)
        assert pipeline.check(files, NUMBER, checksum) == Outcome(SpanState.FETCHED)
    os.ftruncate(files.blob_fd, layer.spans[NUMBER].compressed_end - 1)
    assert pipeline.check(files, NUMBER, checksum) == Outcome(SpanState.MISSING)


def test_a_checksum_is_never_that_of_nothing() -> None:
    assert pipeline.checksum_of(b"") != 0
    assert pipeline.checksum_of(b"a") != pipeline.checksum_of(b"b")
    assert pipeline.checksum_of(bytes(100)) < 1 << 64


def test_the_whole_blob_is_recognised(files: LayerFiles, layer: Layer) -> None:
    assert not pipeline.blob_has_digest(files)
    os.pwrite(files.blob_fd, layer.blob, 0)
    assert pipeline.blob_has_digest(files)
    os.pwrite(files.blob_fd, b"?", 3)
    assert not pipeline.blob_has_digest(files)


def test_opening_and_closing_leaves_no_descriptor(store: LayerStore, layer: Layer) -> None:
    before = open_descriptors()
    files = open_files(store, layer)
    ActiveLayer(files).close()
    assert open_descriptors() == before
    store.paths(layer.digest).ztoc.unlink()
    with pytest.raises(FileNotFoundError):
        open_files(store, layer)
    store.paths(layer.digest).tree.unlink()
    with pytest.raises(InvalidLayerFile, match="tree"):
        open_files(store, layer)
    assert open_descriptors() == before


def test_a_closed_layer_keeps_its_descriptors_for_tasks_under_way(store: LayerStore, layer: Layer) -> None:
    active = ActiveLayer(open_files(store, layer))
    active.pin()
    active.close()
    compressed = memoryview(layer.compressed(NUMBER))
    pipeline.store(active.files, NUMBER, compressed, NOTHING, lambda: SpanState.INFLATED)
    again = ActiveLayer(open_files(store, layer))
    assert again.state(NUMBER) is SpanState.MISSING, "nobody was told"
    active.unpin()
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(active.files.blob_fd)
    again.close()
