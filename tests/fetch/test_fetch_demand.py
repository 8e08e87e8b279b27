"""Readers get what they ask for: once over the network, the nearest first, and right."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from snapshotter.layer import wire
from snapshotter.layer.spans import SpanState
from tests.conftest import ExpectedLogs
from tests.fetch.rig import Rig, Server, make_layer, settle
from tests.support.registry import Registry, Slow, Stall


@pytest.mark.parametrize("compression", ["gzip", "uncompressed"])
def test_every_span_comes_out_right(rig: Rig, compression: str) -> None:
    layer = rig.add(make_layer(compression=compression))
    server = rig.connect(layer)
    for span in reversed(range(len(layer.spans))):
        assert server.read(span) == layer.content(span)
    assert rig.count("failures") == 0
    assert rig.count("spans_inflated") == len(layer.spans)


def test_a_span_that_is_there_is_not_fetched_again(rig: Rig) -> None:
    layer = rig.add(make_layer())
    rig.connect(layer).read(0)
    before = len(rig.ranges())
    server = rig.connect(layer)
    assert server.read(0) == layer.content(0)
    assert rig.times_fetched(layer)[0] == 1
    assert len(rig.ranges()) <= before + 1, "reading ahead is allowed, asking for span 0 is not"
    assert rig.count("spans_from_cache") == 1


def test_readers_of_one_span_share_one_request(rig: Rig, registry: Registry) -> None:
    layer = rig.add(make_layer())
    rig.open(layer)
    stall = registry.fault(Stall(path="/blobs/"))
    servers = [rig.connect(layer) for _ in range(10)]
    for server in servers:
        server.want(5)
        server.want(5)
    rig.wait_for(lambda: stall.hits, "a request")
    rig.wait_for(lambda: rig.count("wants") == 2 * len(servers), "all wishes")
    stall.release()
    for server in servers:
        server.wait(5)
        assert server.data(5) == layer.content(5)
    assert rig.times_fetched(layer)[5] == 1
    assert rig.count("wait_count") == len(servers), "each server is told once, however often it asked"


def test_neighbours_that_are_wanted_travel_in_one_range(rig: Rig, registry: Registry) -> None:
    layer = rig.add(make_layer())
    server = rig.connect(layer)
    server.want(2, 7)
    server.wait(2, 3, 4, 5, 6)
    start, end = rig.ranges()[0]
    assert start == layer.spans[2].compressed_start
    assert end >= layer.spans[6].compressed_end


def test_a_range_is_not_longer_than_allowed(tmp_path: Path, registry: Registry) -> None:
    layer = make_layer()
    limit = 3 * max(len(layer.compressed(span)) for span in range(len(layer.spans)))
    with Rig(tmp_path, registry, options={"range_max_bytes": limit}) as rig:
        rig.add(layer)
        server = rig.connect(layer)
        server.want(0, len(layer.spans))
        server.wait(*range(len(layer.spans)))
        assert all(end - start <= limit for start, end in rig.ranges())
        assert len(rig.ranges()) < len(layer.spans)


def test_the_first_span_is_ready_while_the_rest_of_its_range_is_on_its_way(
    rig: Rig, registry: Registry
) -> None:
    layer = rig.add(make_layer())
    server = rig.connect(layer)
    rig.open(layer)
    stall = registry.fault(Stall(path="/blobs/", after=len(layer.compressed(4)) + 1))
    server.want(4, 10)
    server.wait(4)
    assert server.data(4) == layer.content(4)
    (request,) = registry.matching(path="/blobs/")
    assert request.sent == len(layer.compressed(4)) + 1, "the registry has not sent more yet"
    stall.release()
    server.wait(*range(5, 10))
    assert rig.times_fetched(layer)[4] == 1


def test_a_reader_does_not_queue_behind_the_background(tmp_path: Path, registry: Registry) -> None:
    """Measured in requests: the next one that the registry sees after the wish is the reader's."""
    with Rig(tmp_path, registry, options={"background_connections": 2}) as rig:
        layer = rig.add(make_layer(size=16 << 20, span_size=1 << 17))
        registry.fault(Slow(path="/blobs/", count=2, rate=1e4))  # for longer than this test takes
        rig.open(layer, background=True)
        rig.wait_for(lambda: len(rig.ranges()) == 2, "the background to start")
        last = len(layer.spans) - 1
        server = rig.connect(layer)
        server.want(last)
        server.wait(last)
        assert server.data(last) == layer.content(last)
        start, end = rig.ranges()[2]
        wanted = layer.spans[last]
        assert start <= wanted.compressed_start < wanted.compressed_end <= end
        assert rig.count("background_ranges") == 2, "and the background did not start meanwhile"
        slow = registry.matching(path="/blobs/")[:2]
        assert all(
            request.sent < last - first for request, (first, last) in zip(slow, rig.ranges(), strict=False)
        )


def test_a_reader_far_back_in_a_background_range_does_not_wait_for_all_of_it(
    rig: Rig, registry: Registry
) -> None:
    layer = rig.add(make_layer(size=8 << 20, span_size=1 << 16))
    rig.source = lambda _: None
    rig.open(layer, background=True)
    stall = registry.fault(Stall(path="/blobs/", after=1000, count=2))
    rig.source = None
    rig.send_source(layer)
    rig.wait_for(lambda: len(rig.ranges()) == 2, "two background ranges under way, both stalled")
    start, end = rig.ranges()[0]
    inside = [
        span.id for span in layer.spans if start <= span.compressed_start and span.compressed_end <= end
    ]
    server = rig.connect(layer)
    server.want(inside[-1])
    server.wait(inside[-1])
    assert server.data(inside[-1]) == layer.content(inside[-1])
    assert rig.count("cut_ranges") == 1
    assert all(request.sent <= 1000 for request in registry.matching(path="/blobs/")[:2])
    stall.release()
    rig.wait_verified(layer)
    assert rig.count("retries") == 0


def test_read_ahead_brings_what_a_sequential_reader_needs_next(rig: Rig) -> None:
    layer = rig.add(make_layer(size=4 << 20))
    rig.open(layer)
    server = rig.connect(layer)
    spans = len(layer.spans)
    for span in range(spans):
        if rig.states(layer)[span] is SpanState.INFLATED:
            server.say(wire.Touch(span))
        else:
            server.want(span, span + 1, spans)
            server.wait(span)
        assert server.data(span) == layer.content(span)
    assert len(rig.ranges()) < spans / 3
    assert max(rig.times_fetched(layer).values()) == 1


def test_a_server_that_goes_away_leaves_nothing_behind(rig: Rig, registry: Registry) -> None:
    layer = rig.add(make_layer())
    rig.open(layer)
    stall = registry.fault(Stall(path="/blobs/"))
    leaver, stayer = rig.connect(layer), rig.connect(layer)
    leaver.want(3, 6)
    stayer.want(4)
    rig.wait_for(rig.ranges, "a request")
    rig.wait_for(lambda: rig.count("wants") == 4, "both wishes")
    leaver.close()
    rig.wait_for(lambda: rig.count("readers") == 1, "one server left")
    stall.release()
    stayer.wait(4)
    assert rig.times_fetched(layer)[4] == 1
    assert rig.count("queued_ondemand") == 0


def test_a_server_that_talks_nonsense_is_dropped_and_others_are_served(
    rig: Rig, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("server dropped")
    layer = rig.add(make_layer())
    beyond = len(layer.spans)
    nonsense: list[Callable[[Server], None]] = [
        lambda server: server.say_raw(b"nonsense"),
        lambda server: server.say_raw(b"x" * 17),
        lambda server: server.want(beyond),
        lambda server: server.want(0, beyond + 1),
        lambda server: server.say(wire.Touch(beyond)),
        lambda server: server.say(wire.Ready(0, 1)),
    ]
    for say in nonsense:
        server = rig.connect(layer)
        say(server)
        assert server.hear() is None
    assert rig.count("bad_messages") == 6
    assert rig.connect(layer).read(1) == layer.content(1)


def test_a_layer_that_cannot_be_opened_is_refused_by_name(rig: Rig, expected_logs: ExpectedLogs) -> None:
    expected_logs.allow("layer cannot be opened")
    expected_logs.allow("layer cannot be served")
    unknown = make_layer(seed=9).digest
    assert "tree" in rig.open_error(unknown)
    layer = rig.add(make_layer())
    rig.store.paths(layer.digest).tree.write_bytes(b"no tree at all")
    assert "tree" in rig.open_error(layer.digest)
    server = rig.connect(layer)
    assert server.hear() is None, "its servers are hung up on"


def test_a_tree_variant_will_do(rig: Rig) -> None:
    layer = rig.add(make_layer())
    paths = rig.store.paths(layer.digest)
    paths.tree.rename(paths.directory / "tree.other")
    assert rig.connect(layer).read(2) == layer.content(2)


def test_a_layer_with_a_span_too_large_for_memory_is_refused(
    tmp_path: Path, registry: Registry, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("layer cannot be opened")
    with Rig(tmp_path, registry, options={"span_max_bytes": 1000}) as rig:
        layer = rig.add(make_layer())
        assert "span 0" in rig.open_error(layer.digest)


def test_a_closed_layer_hangs_up_and_can_be_opened_again_at_once(rig: Rig, registry: Registry) -> None:
    layer = rig.add(make_layer())
    server = rig.connect(layer)
    server.read(0)
    rig.wait_for(lambda: rig.count("transfers_ondemand") == 0, "read-ahead to end")
    stall = registry.fault(Stall(path="/blobs/", seconds=0.5))
    server.want(9)
    rig.wait_for(lambda: stall.hits, "a request")
    rig.send_close(layer)
    assert server.hear() is None
    again = rig.connect(layer)
    assert again.read(0) == layer.content(0)
    assert again.read(9) == layer.content(9)
    assert rig.times_fetched(layer)[0] == 1


def test_a_server_that_cannot_read_a_span_gets_it_checked(rig: Rig) -> None:
    layer = rig.add(make_layer())
    server = rig.connect(layer)
    server.read(3)
    where = layer.spans[3]
    with rig.store.paths(layer.digest).data.open("r+b") as file:
        file.seek(where.uncompressed_start + 100)
        file.write(b"damage")
    for _ in range(3):
        server.read(3)
    assert server.data(3) == layer.content(3)
    assert rig.count("spans_damaged") == 1
    assert rig.times_fetched(layer)[3] == 1, "`blob` was still right"


def test_a_blob_that_went_bad_while_in_use_is_noticed_before_it_is_inflated(rig: Rig) -> None:
    layer = rig.add(make_layer())
    rig.open(layer, background=True)
    rig.wait_verified(layer)
    blob = rig.store.paths(layer.digest).blob
    with blob.open("r+b") as file:
        file.seek(layer.spans[5].compressed_start + 100)
        file.write(b"damage")
    server = rig.connect(layer)
    assert server.read(5) == layer.content(5)
    assert server.read(6) == layer.content(6)
    assert rig.count("spans_damaged") == 1
    assert rig.times_fetched(layer)[5] == 2
    rig.wait_for(lambda: blob.read_bytes() == layer.blob, "the blob to be mended")


def test_a_range_is_not_cut_while_somebody_waits_for_a_nearer_span(rig: Rig, registry: Registry) -> None:
    layer = rig.add(make_layer(size=8 << 20, span_size=1 << 16))
    server = rig.connect(layer)
    rig.open(layer)
    stall = registry.fault(Stall(path="/blobs/", after=1000))
    server.want(0, 40)
    rig.wait_for(rig.ranges, "the range")
    rig.connect(layer).want(39)
    rig.wait_for(lambda: rig.count("wants") == 41, "the second wish")
    settle()
    assert len(rig.ranges()) == 1
    stall.release()
    server.wait(*range(40))
    assert rig.count("cut_ranges") == 0


def test_many_servers_reading_everything_at_once(rig: Rig) -> None:
    layer = rig.add(make_layer(size=4 << 20))
    problems: list[BaseException] = []

    def read_all(server: Server, order: list[int]) -> None:
        try:
            for span in order:
                assert server.read(span) == layer.content(span)
        except BaseException as error:  # noqa: BLE001  raised again by the assertion below
            problems.append(error)

    spans = list(range(len(layer.spans)))
    orders = [spans, spans[::-1], spans[1::2] + spans[::2], spans[::2]]
    threads = [threading.Thread(target=read_all, args=(rig.connect(layer), order)) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not problems
    assert max(rig.times_fetched(layer).values()) == 1
    assert sum(end - start for start, end in rig.ranges()) <= len(layer.blob) + len(layer.spans)
