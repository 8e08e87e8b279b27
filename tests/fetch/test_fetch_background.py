"""Layers become complete by themselves, in the right order, and the whole is proved."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest

from snapshotter.events import Kind
from snapshotter.fetch import control, trace
from snapshotter.fetch.counters import OFFLINE_NAMES
from snapshotter.layer import wire
from snapshotter.layer.compile import compile_tree
from snapshotter.layer.spans import SpanState, SpanView
from snapshotter.units import sha256_digest
from snapshotter.ztoc.parse import parse
from tests.conftest import ExpectedLogs
from tests.fetch.rig import Layer, Rig, make_layer, misnamed, settle
from tests.support.registry import FlipByte, Registry, Stall, Status

BLOBS = "/blobs/"
ONE_RANGE = {"background_connections": 1, "range_max_bytes": 100_000}


def blob_of(rig: Rig, layer: Layer) -> bytes:
    return rig.store.paths(layer.digest).blob.read_bytes()


def offline_after(rig: Rig, layer: Layer) -> float | None:
    with rig.store.paths(layer.digest).spans.open("rb") as file:
        view = SpanView(file.fileno())
    try:
        return view.offline_after
    finally:
        view.close()


@pytest.mark.parametrize("compression", ["gzip", "uncompressed"])
def test_a_layer_becomes_complete_and_verified(rig: Rig, compression: str) -> None:
    layer = rig.add(make_layer(compression=compression))
    rig.open(layer, background=True)
    rig.wait_verified(layer)
    assert rig.completions[-1].diff_id == sha256_digest(layer.tar)
    assert blob_of(rig, layer) == layer.blob, "the bytes before span 0 too"
    assert set(rig.states(layer)) == {SpanState.FETCHED}, "compressed only"
    assert max(rig.times_fetched(layer).values()) == 1
    assert rig.count("background_bytes") == sum(end - start for start, end in rig.ranges())
    assert rig.count("ondemand_ranges") == 0
    assert len(rig.ranges()) < len(layer.spans)


def test_the_time_until_the_network_is_not_needed_is_counted_once(rig: Rig) -> None:
    layer = rig.add(make_layer())
    rig.open(layer, background=True)
    rig.wait_verified(layer)
    seconds = offline_after(rig, layer)
    assert seconds is not None
    assert 0 < seconds < 60
    assert sum(rig.count(name) for name in OFFLINE_NAMES) == 1
    assert rig.count("offline_milliseconds") == int(seconds * 1e3)
    rig.stop()
    rig.completions.clear()
    rig.options = {**rig.options, "boot_id": "another"}
    rig.start()
    rig.open(layer, background=True)  # everything is checked, and the whole verified again
    rig.wait_verified(layer)
    assert offline_after(rig, layer) == seconds
    assert sum(rig.count(name) for name in OFFLINE_NAMES) == 1


def test_no_background_where_none_is_asked_for(rig: Rig) -> None:
    layer = rig.add(make_layer())
    rig.open(layer)
    settle()
    assert rig.ranges() == []
    assert rig.questions == []
    rig.open(layer, background=True)
    rig.wait_verified(layer)


def test_a_verified_layer_needs_no_network(rig: Rig, registry: Registry) -> None:
    layer = rig.add(make_layer())
    rig.open(layer, background=True)
    rig.wait_verified(layer)
    registry.clear_requests()
    rig.stop()
    rig.completions.clear()
    rig.questions.clear()
    rig.start()
    server = rig.connect(layer)
    for span in range(len(layer.spans)):
        assert server.read(span) == layer.content(span)
    rig.open(layer, background=True)
    rig.wait_verified(layer)
    assert rig.ranges() == []
    assert rig.questions == []


def test_what_readers_fetched_is_not_fetched_again_and_completes_the_layer(rig: Rig) -> None:
    layer = rig.add(make_layer())
    server = rig.connect(layer)
    for span in range(len(layer.spans)):
        server.read(span)
    rig.wait_verified(layer)
    assert max(rig.times_fetched(layer).values()) == 1


def starts(rig: Rig, layer: Layer) -> list[int]:
    """Return the first span of each range, in the order of the requests."""
    by_start = {span.compressed_start if span.id else 0: span.id for span in layer.spans}
    return [by_start[start] for start, _ in rig.ranges()]


def test_the_order_is_that_of_the_tar(tmp_path: Path, registry: Registry) -> None:
    with Rig(tmp_path, registry, options=ONE_RANGE) as rig:
        layer = rig.add(make_layer())
        rig.open(layer, background=True)
        rig.wait_verified(layer)
        assert starts(rig, layer) == sorted(starts(rig, layer))
        assert len(starts(rig, layer)) > 3


def test_the_order_of_first_use_is_recorded_and_comes_first_in_the_next_cold_run(
    tmp_path: Path, registry: Registry
) -> None:
    layer = make_layer()
    with Rig(tmp_path, registry, options=ONE_RANGE) as rig:
        rig.add(layer)
        rig.open(layer)
        server = rig.connect(layer)
        server.read(9)
        server.say(wire.Touch(9))
        server.say(wire.Touch(13))
        server.say(wire.Touch(13))
        server.read(5)
    paths = rig.store.paths(layer.digest)
    assert trace.load(paths.trace, len(layer.spans)) == [9, 13, 5]
    for path in (paths.blob, paths.data, paths.spans):
        path.unlink()
    registry.clear_requests()
    with Rig(tmp_path, registry, options=ONE_RANGE) as rig:
        rig.add(layer)
        rig.open(layer, background=True)
        rig.wait_verified(layer)
        assert starts(rig, layer)[0] == 9
        assert {13, 5} <= set(starts(rig, layer)[1:4])


def test_the_trace_is_written_while_the_layer_is_in_use(rig: Rig) -> None:
    layer = rig.add(make_layer())
    server = rig.connect(layer)
    server.read(7)
    path = rig.store.paths(layer.digest).trace
    rig.wait_for(lambda: trace.load(path, 100) == [7], "the trace on disk")


def test_of_layers_that_nobody_has_read_the_smallest_goes_first(tmp_path: Path, registry: Registry) -> None:
    with Rig(tmp_path, registry, options=ONE_RANGE) as rig:
        layers = [rig.add(make_layer(seed=kib, size=kib << 10)) for kib in (1024, 512, 768)]
        rig.source = lambda _: None
        for layer in layers:
            rig.open(layer, background=True)
        rig.source = None
        first = registry.fault(Stall(path=BLOBS))
        for layer in layers:
            rig.send_source(layer)
        rig.connect(layers[0])
        rig.wait_for(lambda: rig.count("readers") == 1, "what was said before that was heard")
        first.release()
        for layer in layers:
            rig.wait_verified(layer)
        order = [request.path.rpartition("/")[2] for request in registry.matching(path=BLOBS)]
        by_size = sorted(layers, key=lambda layer: len(layer.blob))
        assert [digest for digest, _ in groupby(order[1:])] == [layer.digest for layer in by_size], (
            "after the first range, which went to the layer whose source came first"
        )


def test_the_background_goes_on_where_a_reader_is(tmp_path: Path, registry: Registry) -> None:
    with Rig(tmp_path, registry, options=ONE_RANGE) as rig:
        small, read = rig.add(make_layer(seed=1, size=512 << 10)), rig.add(make_layer(seed=2))
        rig.source = lambda _: None
        for layer in (small, read):
            rig.open(layer, background=True)
        server = rig.connect(read)
        server.want(9)
        rig.wait_for(lambda: rig.count("wants"), "the reader waits")
        rig.source = None
        for layer in (read, small):
            rig.send_source(layer)
        server.wait(9)
        for layer in (small, read):
            rig.wait_verified(layer)
        background = [event for event in rig.events() if event.kind is Kind.BACKGROUND]
        layers = [name for name, _ in groupby(event.layer for event in background)]
        assert [name in read.digest for name in layers] == [True, False]
        spans = [event.span for event in background if event.layer in read.digest]
        assert spans[0] > 9
        assert sorted(spans) != spans, "what lies before the reader comes last"


def test_a_blob_that_is_not_the_layer_is_dropped_and_not_tried_for_ever(
    rig: Rig, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("does not have its digest")
    layer = rig.add(misnamed(make_layer()))
    rig.open(layer, background=True)
    rig.wait_for(lambda: rig.completions, "a verdict")
    assert rig.completions == [control.Complete(layer.digest, verified=False)]
    assert set(rig.states(layer)) == {SpanState.MISSING}
    requests = len(rig.ranges())
    settle()
    assert len(rig.ranges()) == requests
    assert rig.count("layers_mismatched") == 1
    server = rig.connect(layer)
    for span in range(len(layer.spans)):
        assert server.read(span) == layer.content(span), "readers are served all the same"
    settle()
    assert len(rig.completions) == 1


def with_wrong_windows(layer: Layer) -> Layer:
    """Return `layer` with a zTOC whose windows are wrong: every digest in it is still right."""
    data = bytearray(layer.ztoc)
    for start in (span.window_offset for span in layer.spans if span.window_offset >= 0):
        data[start : start + 32768] = bytes(byte ^ 0xFF for byte in data[start : start + 32768])
    ztoc = bytes(data)
    return replace(layer, ztoc=ztoc, tree=compile_tree(parse(ztoc), ztoc_digest=sha256_digest(ztoc)))


def test_a_ztoc_that_makes_other_files_of_the_right_blob_is_noticed_by_the_whole(
    rig: Rig, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("complete layer does not have its digest")
    layer = rig.add(with_wrong_windows(make_layer(seed=3)))
    rig.open(layer, background=True)
    rig.wait_for(lambda: rig.completions, "a verdict")
    assert rig.completions == [control.Complete(layer.digest, verified=False)]
    assert rig.count("layers_mismatched") == 1
    assert rig.count("digest_mismatches") == 0


def test_a_wrong_byte_in_front_of_span_0_is_noticed_by_the_whole(
    rig: Rig, registry: Registry, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("does not have its digest")
    layer = rig.add(make_layer())
    assert layer.spans[0].compressed_start > 0
    registry.fault(FlipByte(path=BLOBS, at=1, count=1))
    rig.open(layer, background=True)
    rig.wait_for(lambda: rig.completions, "a verdict")
    assert rig.completions == [control.Complete(layer.digest, verified=False)]
    assert rig.count("digest_mismatches") == 0, "no span was wrong"


def test_the_background_rests_after_an_error_and_goes_on(tmp_path: Path, registry: Registry) -> None:
    with Rig(tmp_path, registry, options={"background_pause_s": 0.2}) as rig:
        layer = rig.add(make_layer())
        fault = registry.fault(Status(path=BLOBS, status=404, count=3))
        rig.open(layer, background=True)
        rig.wait_verified(layer)
        assert fault.hits == 3
        assert rig.count("failures") == 0, "nobody waited"
        assert max(rig.times_fetched(layer).values()) <= 4


def test_a_span_that_is_always_wrong_is_given_up_by_the_background(
    tmp_path: Path, registry: Registry, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("span cannot be had")
    with Rig(tmp_path, registry, options={"background_pause_s": 0.05, **ONE_RANGE}) as rig:
        layer = rig.add(make_layer())
        broken = bytearray(layer.blob)
        broken[layer.spans[6].compressed_start + 50] ^= 1
        rig.substitute(layer, bytes(broken))
        rig.open(layer, background=True)
        rig.wait_for(lambda: rig.count("digest_mismatches") == 3, "three tries")
        rig.wait_for(lambda: rig.count("spans_fetched") == len(layer.spans) - 1, "all others")
        requests = len(rig.ranges())
        settle(0.3)
        assert len(rig.ranges()) == requests
        assert rig.states(layer)[6] is SpanState.MISSING


def test_memory_is_bounded(tmp_path: Path, registry: Registry) -> None:
    """With room for nothing, one range at a time is under way, whoever wants it."""
    with Rig(tmp_path, registry, options={"memory_bytes": 1, "range_max_bytes": 40_000}) as rig:
        layer = rig.add(make_layer())
        stall = registry.fault(Stall(path=BLOBS))
        rig.open(layer, background=True)
        rig.wait_for(rig.ranges, "the first range")
        server = rig.connect(layer)
        server.want(9)
        rig.wait_for(lambda: rig.count("wants"), "the wish")
        settle()
        assert len(rig.ranges()) == 1
        stall.release()
        server.wait(9)
        rig.wait_verified(layer)
        rig.wait_for(lambda: rig.count("memory_bytes") == 0, "memory given back")
