"""One range on its way, over real HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotter.errors import RegistryTimeout, ShortBody
from snapshotter.fetch.flight import Flight
from snapshotter.fetch.layerstate import ActiveLayer, LayerFiles
from snapshotter.fetch.memory import Buffers
from snapshotter.fetch.readers import Reader
from snapshotter.fetch.schedule import Priority
from snapshotter.fetch.transfer import Transfer
from snapshotter.layer.spans import SpanState
from snapshotter.layer.store import LayerStore
from snapshotter.registry.ranges import RangeClient
from snapshotter.registry.source import BlobSource
from tests.fetch.rig import Layer, make_layer, put
from tests.support.process import wait_until
from tests.support.registry import Registry, Stall, Truncate


class Download:
    """A transfer of the spans `[first, end)` and what it delivered."""

    def __init__(self, active: ActiveLayer, source: BlobSource, first: int, end: int) -> None:
        self.flights: list[Flight[Reader]] = [Flight(span, SpanState.FETCHED) for span in range(first, end)]
        self.transfer = Transfer(active, self.flights, Priority.BACKGROUND, Buffers(0), now=0.0)
        self.delivered: list[tuple[int, bytes, bytes]] = []
        self._source = source
        self._client = RangeClient(connections=1)

    def run(self, seconds: float = 60.0) -> None:
        try:
            self.transfer.run(self._client, self._source, time.monotonic() + seconds, self._deliver)
        finally:
            self._client.close()

    def _deliver(self, flight: Flight[Reader], compressed: memoryview, header: memoryview) -> None:
        self.delivered.append((flight.span, bytes(compressed), bytes(header)))


@pytest.fixture
def layer() -> Layer:
    return make_layer()


@pytest.fixture
def active(tmp_path: Path, layer: Layer) -> Iterator[ActiveLayer]:
    store = LayerStore(tmp_path)
    put(store, layer)
    active = ActiveLayer(LayerFiles.open(store, layer.digest, boot_id="boot", span_max=1 << 30))
    yield active
    active.close()


@pytest.fixture
def source(registry: Registry, layer: Layer) -> BlobSource:
    return BlobSource(f"{registry.url}/v2/app/blobs/{registry.add_blob(layer.blob)}", {}, registry.host)


def test_spans_are_delivered_in_order_and_exact(
    active: ActiveLayer, source: BlobSource, layer: Layer
) -> None:
    download = Download(active, source, 3, 9)
    download.run()
    assert download.delivered == [(span, layer.compressed(span), b"") for span in range(3, 9)]
    assert download.transfer.undelivered() == []
    assert download.transfer.remaining() == 0


def test_span_0_brings_what_lies_before_it(active: ActiveLayer, source: BlobSource, layer: Layer) -> None:
    download = Download(active, source, 0, 2)
    download.run()
    header = layer.blob[: layer.spans[0].compressed_start]
    assert header
    assert download.delivered == [(0, layer.compressed(0), header), (1, layer.compressed(1), b"")]


def test_what_did_not_come_is_known(
    active: ActiveLayer, source: BlobSource, layer: Layer, registry: Registry
) -> None:
    registry.fault(Truncate(path="/blobs/", after=len(layer.compressed(3)) + 5))
    download = Download(active, source, 3, 6)
    with pytest.raises(ShortBody):
        download.run()
    assert [span for span, _, _ in download.delivered] == [3]
    assert download.transfer.undelivered() == download.flights[1:]
    assert download.transfer.delivered() == 1


def test_a_cut_lets_the_arriving_span_come_and_gives_up_the_rest(
    active: ActiveLayer, source: BlobSource, layer: Layer, registry: Registry
) -> None:
    stall = registry.fault(Stall(path="/blobs/", after=len(layer.compressed(3)) + 5))
    download = Download(active, source, 3, 9)
    thread = threading.Thread(target=download.run)
    thread.start()
    wait_until(lambda: download.delivered, timeout=60, what="the first span")
    assert download.transfer.distance(8) > 0
    assert download.transfer.cut() == download.flights[2:]
    assert download.transfer.cut() == []
    stall.release()
    thread.join(60)
    assert not thread.is_alive()
    assert [(span, data) for span, data, _ in download.delivered] == [
        (3, layer.compressed(3)),
        (4, layer.compressed(4)),
    ]
    assert download.transfer.undelivered() == []


def test_a_cut_after_the_end_gives_up_nothing(active: ActiveLayer, source: BlobSource) -> None:
    download = Download(active, source, 3, 5)
    download.run()
    assert download.transfer.cut() == []
    assert download.transfer.delivered() == 2


def test_a_deadline_ends_it(active: ActiveLayer, source: BlobSource, registry: Registry) -> None:
    registry.fault(Stall(path="/blobs/", seconds=60))
    download = Download(active, source, 3, 5)
    began = time.monotonic()
    with pytest.raises(RegistryTimeout):
        download.run(0.3)
    assert time.monotonic() - began < 30
    assert download.transfer.undelivered() == download.flights
