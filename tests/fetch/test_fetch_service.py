"""The daemon's side: what it may say, in which order, and what it sees."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest

from snapshotter import heap, rest
from snapshotter.fetch import control
from snapshotter.layer import wire
from snapshotter.layer.spans import SpanState
from snapshotter.units import Digest
from tests.conftest import ExpectedLogs
from tests.fetch.rig import Rig, make_layer, settle
from tests.support.registry import Registry, Stall

UNKNOWN = Digest("sha256:" + "00" * 32)


def test_what_is_no_message_is_ignored(rig: Rig, expected_logs: ExpectedLogs) -> None:
    expected_logs.allow("control message ignored")
    expected_logs.allow("control message of the wrong side")
    layer = rig.add(make_layer())
    rig.say_raw(b"nonsense")
    rig.say_raw(b'{"op":"open"}')
    rig.send(control.Complete(layer.digest, verified=True))
    assert rig.connect(layer).read(3) == layer.content(3)
    assert rig.count("bad_messages") == 2


def test_messages_about_a_layer_that_is_not_open_change_nothing(rig: Rig) -> None:
    layer = rig.add(make_layer())
    rig.send(control.Close(UNKNOWN))
    rig.send(control.NoSource(UNKNOWN, "who?", temporary=False))
    rig.send(control.Source(layer.digest, rig.place(layer.digest)))
    assert rig.connect(layer).read(3) == layer.content(3)
    assert rig.count("layers_open") == 1


def test_opening_twice_is_opening_once(rig: Rig) -> None:
    layer = rig.add(make_layer())
    for _ in range(3):
        rig.open(layer, background=True)
    rig.wait_verified(layer)
    assert rig.count("layers_open") == 1
    assert max(rig.times_fetched(layer).values()) == 1


def test_a_server_may_be_attached_before_its_layer_is_opened(rig: Rig) -> None:
    layer = rig.add(make_layer())
    server = rig.connect(layer)
    server.want(2)
    rig.open(layer, background=True)
    server.wait(2)
    rig.wait_verified(layer)


def test_a_source_is_asked_for_once_and_only_when_needed(rig: Rig) -> None:
    layer = rig.add(make_layer())
    rig.open(layer)
    servers = [rig.connect(layer) for _ in range(5)]
    settle()
    assert rig.questions == []
    for number, server in enumerate(servers):
        server.want(number)
    for number, server in enumerate(servers):
        server.wait(number)
    assert rig.questions == [control.NeedSource(layer.digest, renew=False)]


def test_a_daemon_that_does_not_read_for_a_while_hears_everything_in_the_end(
    rig: Rig, expected_logs: ExpectedLogs
) -> None:
    """The answers to so many questions do not fit into the socket."""
    expected_logs.allow("layer cannot be opened")
    digests = [Digest(f"sha256:{number:064x}") for number in range(600)]
    with rig.deaf():
        for digest in digests:
            rig.send(control.Open(digest, background=False))
        rig.wait_for(lambda: len(expected_logs.records) == len(digests), "all questions to be dealt with")
    rig.wait_for(lambda: set(digests) <= rig.answered(), "all answers")


def _is_zero(rig: Rig, gauge: str) -> bool:
    return rig.count(gauge) == 0


def test_gauges_say_what_is_going_on(rig: Rig, registry: Registry) -> None:
    layer = rig.add(make_layer())
    server = rig.connect(layer)
    rig.wait_for(lambda: rig.count("readers") == 1, "the server")
    stall = registry.fault(Stall(path="/blobs/", after=10))
    server.want(3)
    rig.wait_for(lambda: stall.hits, "the request")
    rig.wait_for(lambda: rig.count("transfers_ondemand") == 1, "the gauge, which is set after the start")
    assert rig.count("spans_under_way") >= 1
    assert rig.count("memory_bytes") >= len(layer.compressed(3))
    stall.release()
    server.wait(3)
    for gauge in ("transfers_ondemand", "spans_under_way", "memory_bytes"):
        rig.wait_for(partial(_is_zero, rig, gauge), f"{gauge} to fall")
    server.close()
    rig.wait_for(lambda: rig.count("readers") == 0, "the server's end")


def test_what_nobody_wants_any_more_leaves_the_queue(rig: Rig) -> None:
    layer = rig.add(make_layer())
    rig.source = lambda _: None
    leaver, stayer = rig.connect(layer), rig.connect(layer)
    leaver.want(0, 8)
    stayer.want(6)
    rig.wait_for(lambda: rig.count("queued_ondemand") == 8, "the queue")
    leaver.close()
    rig.wait_for(lambda: rig.count("readers") == 1, "one server")
    stayer.want(6)
    rig.wait_for(lambda: rig.count("queued_ondemand") == 1, "a shorter queue")
    rig.send_source(layer)
    stayer.wait(6)


def test_a_trace_that_cannot_be_written_is_said_and_harms_nothing(
    tmp_path: Path, registry: Registry, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("trace not written")
    layer = make_layer()
    with Rig(tmp_path, registry) as rig:
        rig.add(layer)
        rig.open(layer)
        rig.store.paths(layer.digest).trace.mkdir()
        server = rig.connect(layer)
        server.say(wire.Touch(3))
        rig.wait_for(lambda: expected_logs.records, "the complaint")
        assert server.read(5) == layer.content(5)
    assert len(expected_logs.records) == 2, "once while running, once at the end"


def test_the_trace_of_a_layer_that_is_removed_is_not_missed(tmp_path: Path, registry: Registry) -> None:
    layer = make_layer()
    with Rig(tmp_path, registry) as rig:
        rig.add(layer)
        rig.open(layer)
        server = rig.connect(layer)
        server.read(5)
        shutil.rmtree(rig.store.paths(layer.digest).trace.parent)
        server.say(wire.Touch(3))
        server.want(6)
        server.wait(6)
    # Now it has ended, and the guard of the logs has found nothing said.


def test_memory_is_given_back_at_rest(rig: Rig, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest, "QUIET_SECONDS", 0.2)
    layer = rig.add(make_layer())
    server = rig.connect(layer)
    server.read(3)
    stall = registry.fault(Stall(path="/blobs/", after=10))
    server.want(15)
    rig.wait_for(lambda: stall.hits, "a transfer that goes on")
    assert server.read(9) == layer.content(9)
    rig.wait_for(lambda: rig.count("memory_idle_bytes"), "a buffer that is kept for what comes")
    stall.release()
    server.wait(15)
    rig.wait_for(lambda: rig.count("memory_idle_bytes") == 0, "nothing kept")
    assert server.read(12) == layer.content(12)


def test_inflating_disturbs_the_rest_too(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(rest, "QUIET_SECONDS", 0.2)
    layer = rig.add(make_layer())
    rig.open(layer, background=True)
    rig.wait_verified(layer)
    server = rig.connect(layer)
    assert rig.states(layer)[3] is SpanState.FETCHED
    monkeypatch.setattr(heap, "give_back", lambda: given.append(rig.count("spans_inflated")))
    before = rig.count("spans_inflated")
    assert server.read(3) == layer.content(3)
    rig.wait_for(lambda: given and given[-1] > before, "memory given back after that")


def test_no_secret_of_a_source_is_logged(
    rig: Rig, registry: Registry, expected_logs: ExpectedLogs, caplog: pytest.LogCaptureFixture
) -> None:
    expected_logs.allow("span cannot be had")
    caplog.set_level("DEBUG")
    layer = rig.add(make_layer())
    place = rig.place(layer.digest)
    hushed = type(place)(f"{place.url}x?sig=hush", {"Authorization": "Bearer hush"}, place.host, place.what)
    rig.source = lambda _: control.Source(layer.digest, hushed)
    server = rig.connect(layer)
    server.want(3)
    server.wait_failed(3)
    assert caplog.records
    for record in caplog.records:
        assert "hush" not in str(vars(record))


def test_the_fetcher_ends_when_the_daemon_resets_the_connection(tmp_path: Path, registry: Registry) -> None:
    """Unread messages at the daemon's end make its closing a reset."""
    layer = make_layer()
    with Rig(tmp_path, registry) as rig:
        rig.add(layer)
        with rig.deaf():
            rig.send(control.Open(layer.digest, background=False))
            rig.wait_for(lambda: rig.count("layers_open") == 1, "the layer")
            settle(0.05)
            rig.slam()
