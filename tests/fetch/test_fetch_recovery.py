"""Every kind of fault on every path by which spans come: bounded while it lasts, and nothing to remember it by after.

While a fault lasts a reader gets right bytes or EIO within its budget; when it is over the same reader, the same layer
and the same fetcher go on, and the background completes what it began.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from snapshotter.fetch import control
from snapshotter.layer import wire
from tests.conftest import ExpectedLogs
from tests.fetch.rig import Layer, Rig, make_layer, settle
from tests.support.registry import (
    Drop,
    Fault,
    FlipByte,
    IgnoreRange,
    Redirect,
    Registry,
    Slow,
    Stall,
    Status,
    Truncate,
    WrongRange,
)

BLOBS = "/blobs/"
OPTIONS = {
    "read_budget_s": 0.4,
    "read_timeout_s": 0.2,
    "background_pause_s": 0.2,
    "span_tries": 2,
    "source_renewals": 1,
}

FAULTS: dict[str, Callable[[], Fault]] = {
    "500": lambda: Status(path=BLOBS, status=500, count=-1),
    "503": lambda: Status(path=BLOBS, status=503, count=-1),
    "429": lambda: Status(path=BLOBS, status=429, headers={"Retry-After": "1"}, count=-1),
    "404": lambda: Status(path=BLOBS, status=404, count=-1),
    "expired token": lambda: Status(path=BLOBS, status=401, count=-1),
    "expired URL": lambda: Status(path=BLOBS, status=403, count=-1),
    "reset": lambda: Drop(path=BLOBS, count=-1),
    "closed": lambda: Drop(path=BLOBS, count=-1, politely=True),
    "stall": lambda: Stall(path=BLOBS, seconds=1.0, count=-1),
    "stall in the body": lambda: Stall(path=BLOBS, seconds=1.0, after=1000, count=-1),
    "slow": lambda: Slow(path=BLOBS, rate=1e4, count=-1),
    "truncated": lambda: Truncate(path=BLOBS, after=1000, count=-1),
    "corrupt": lambda: FlipByte(path=BLOBS, at=50, count=-1),
    "200 for 206": lambda: IgnoreRange(path=BLOBS, count=-1),
    "wrong range": lambda: WrongRange(path=BLOBS, count=-1),
    "no range": lambda: WrongRange(path=BLOBS, count=-1, header=""),
    "redirect loop": lambda: Redirect(path=BLOBS, count=-1),
}

pytestmark = pytest.mark.logs_unchecked  # every fault is complained about, each in its own words


@pytest.fixture
def rig(tmp_path: Path, registry: Registry) -> Iterator[Rig]:
    with Rig(tmp_path, registry, options=OPTIONS) as rig:
        yield rig


def read_or_fail(rig: Rig, layer: Layer, span: int) -> bool:
    """Read a span as far as that is possible; say whether it was."""
    server = rig.connect(layer)
    server.want(span)
    match server.hear():
        case wire.Ready():
            assert server.data(span) == layer.content(span)
            return True
        case wire.Failed(failed, number):
            assert (failed, number) == (span, errno.EIO)
        case other:
            raise AssertionError(f"{other} is no answer")
    return False


@pytest.mark.parametrize("kind", FAULTS)
def test_a_reader_is_bounded_and_then_served(rig: Rig, registry: Registry, kind: str) -> None:
    layer = rig.add(make_layer())
    fault = registry.fault(FAULTS[kind]())
    for _try in range(20):
        answered = read_or_fail(rig, layer, 4)
        if fault.hits > 0:  # on a busy machine the time of a read may have passed before its request was made
            break
    assert fault.hits > 0
    assert not answered or kind == "slow"
    registry.clear_faults()
    server = rig.connect(layer)
    for span in (4, 5, 15):
        rig.wait_for(lambda span=span: read_or_fail(rig, layer, span), f"span {span} after {kind}")
    for span in range(7, 12):
        assert server.read_at_last(span) == layer.content(span)


@pytest.mark.parametrize("kind", FAULTS)
def test_the_background_goes_on_by_itself(rig: Rig, registry: Registry, kind: str) -> None:
    layer = rig.add(make_layer())
    fault = registry.fault(FAULTS[kind]())
    rig.open(layer, background=True)
    rig.wait_for(lambda: fault.hits > 0, "the fault to be met")
    settle(0.1)
    registry.clear_faults()
    rig.wait_verified(layer)
    assert rig.store.paths(layer.digest).blob.read_bytes() == layer.blob


@pytest.mark.parametrize("kind", ["503", "stall", "corrupt"])
def test_a_damaged_span_is_mended_after_the_fault(rig: Rig, registry: Registry, kind: str) -> None:
    """The path of a doubt: the stored bytes are wrong, and the registry is away when that comes out."""
    layer = rig.add(make_layer())
    server = rig.connect(layer)
    assert server.read(4) == layer.content(4)
    paths = rig.store.paths(layer.digest)
    for path, start in (
        (paths.blob, layer.spans[4].compressed_start),
        (paths.data, layer.spans[4].uncompressed_start),
    ):
        with path.open("r+b") as file:
            file.seek(start + 20)
            file.write(b"damage")
    registry.fault(FAULTS[kind]())
    server.say(wire.Doubt(4))
    assert server.wait_failed(4) == errno.EIO
    registry.clear_faults()
    rig.wait_for(lambda: read_or_fail(rig, layer, 4), "the span to be mended")
    assert rig.count("spans_damaged") == 1


def test_a_name_that_does_not_resolve_and_then_does(rig: Rig) -> None:
    layer = rig.add(make_layer())
    right = rig.place(layer.digest)
    away = replace(right, url="http://no-such-host.invalid/v2/app/blobs/x", host="no-such-host.invalid")
    rig.source = lambda question: control.Source(question.layer, away)
    assert not read_or_fail(rig, layer, 4)
    rig.source = None
    rig.send_source(layer)
    assert rig.connect(layer).read_at_last(4) == layer.content(4)


def test_one_dead_host_leaves_the_layers_of_another_alone(tmp_path: Path, registry: Registry) -> None:
    options = {"read_timeout_s": 20.0, "read_budget_s": 20.0, "on_demand_connections": 2}
    with Registry() as dead, Rig(tmp_path, registry, options=options) as rig:
        victim, other = rig.add(make_layer()), rig.add(make_layer(seed=2))
        dead.add_blob(victim.blob)
        dead.fault(Stall(path=BLOBS, count=-1))
        place = replace(
            rig.place(victim.digest), url=f"{dead.url}/v2/app/blobs/{victim.digest}", host=dead.host
        )
        rig.send(control.Open(victim.digest, background=False))
        rig.source = lambda question: control.Source(
            question.layer, place if question.layer == victim.digest else rig.place(other.digest)
        )
        stuck = rig.connect(victim)
        for span in range(0, len(victim.spans), 3):
            stuck.want(span)
        rig.wait_for(lambda: dead.count(path=BLOBS) == 2, "as many requests as a host may have")
        server = rig.connect(other)
        for span in range(len(other.spans)):
            assert server.read(span) == other.content(span)
        assert dead.count(path=BLOBS) == 2
        dead.close()


def test_all_who_wait_for_a_span_share_its_time(rig: Rig, registry: Registry) -> None:
    layer = rig.add(make_layer())
    registry.fault(Stall(path=BLOBS, seconds=3.0, count=-1))
    servers = [rig.connect(layer) for _ in range(12)]
    began = time.monotonic()
    for server in servers:
        server.want(4)
    assert [server.wait_failed(4) for server in servers] == [errno.EIO] * 12
    assert time.monotonic() - began < 30.0, "one budget, not one after another"


def test_a_reader_waits_for_as_long_as_its_budget_lasts(
    tmp_path: Path, registry: Registry, expected_logs: ExpectedLogs
) -> None:
    """More attempts than a retry policy has: a registry that is started again is worth the wait."""
    with Rig(tmp_path, registry, options={"read_budget_s": 20.0}) as rig:
        layer = rig.add(make_layer())
        fault = registry.fault(Drop(path=BLOBS, count=4))
        assert rig.connect(layer).read(4) == layer.content(4)
        assert fault.hits == 4
        assert rig.count("circuits_opened") == 1
        rig.wait_for(lambda: rig.count("hosts_away") == 0, "the host is back")
        assert rig.count("failures") == 0


def test_by_the_policy_eio_reads_fail_at_once_while_the_host_is_away(
    tmp_path: Path, registry: Registry
) -> None:
    with Rig(tmp_path, registry, options={"read_budget_s": 60.0, "unreachable": "eio"}) as rig:
        layer = rig.add(make_layer())
        registry.fault(Drop(path=BLOBS, count=-1))
        server = rig.connect(layer)
        began = time.monotonic()
        for span in (4, 5, 6):
            server.want(span)
            assert server.wait_failed(span) == errno.EIO
        assert time.monotonic() - began < 30.0, "less than one budget"
        assert rig.count("circuits_opened") == 1
        registry.clear_faults()
        rig.wait_for(lambda: read_or_fail(rig, layer, 4), "the host to be asked again")


def test_by_the_policy_eio_reads_fail_at_once_while_no_source_is_found(
    tmp_path: Path, registry: Registry
) -> None:
    with Rig(tmp_path, registry, options={"read_budget_s": 60.0, "unreachable": "eio"}) as rig:
        layer = rig.add(make_layer())
        rig.source = lambda question: control.NoSource(question.layer, "registry is away", temporary=True)
        began = time.monotonic()
        assert not read_or_fail(rig, layer, 4)
        assert not read_or_fail(rig, layer, 4)
        assert time.monotonic() - began < 30.0, "less than one budget"
        rig.source = None
        rig.wait_for(lambda: read_or_fail(rig, layer, 4), "the source to be asked for again")
