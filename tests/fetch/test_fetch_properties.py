"""Two promises, against whatever hypothesis thinks of."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snapshotter.fetch.downloads import CUT_BYTES
from snapshotter.layer import wire
from snapshotter.layer.spans import SpanState
from tests.fetch.rig import TRIES, ReadFailed, Rig, Server, make_layer
from tests.support.registry import (
    Drop,
    Fault,
    FlipByte,
    IgnoreRange,
    Registry,
    Stall,
    Status,
    Truncate,
    WrongRange,
)

SMALL = make_layer(size=400 << 10, span_size=1 << 14)
"""So small that no range is cut short: then a span may be asked for twice, although it does not come twice."""

SPANS = min(len(SMALL.spans), len(make_layer().spans))
BOUNDED = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with Registry() as registry:
        yield registry


@st.composite
def wishes(draw: st.DrawFn) -> list[tuple[int, int, int, int]]:
    """(server, first, end, ahead_end), in the order in which they are said."""
    found = []
    for _ in range(draw(st.integers(1, 40))):
        first = draw(st.integers(0, SPANS - 1))
        end = draw(st.integers(first + 1, min(first + 4, SPANS)))
        found.append((draw(st.integers(0, 3)), first, end, draw(st.integers(end, SPANS))))
    return found


@BOUNDED
@given(wishes=wishes(), background=st.booleans(), limit=st.sampled_from([1, 70_000, 8 << 20]))
def test_any_interleaving_of_readers_fetches_a_span_at_most_once(
    registry: Registry, wishes: list[tuple[int, int, int, int]], background: bool, limit: int
) -> None:
    layer = SMALL
    assert len(layer.blob) < CUT_BYTES
    with (
        tempfile.TemporaryDirectory() as directory,
        Rig(Path(directory), registry, options={"range_max_bytes": limit}) as rig,
    ):
        rig.add(layer)
        registry.clear_requests()
        rig.open(layer, background=background)
        servers = [rig.connect(layer) for _ in range(4)]
        wanted: list[set[int]] = [set(), set(), set(), set()]
        for number, first, end, ahead_end in wishes:
            servers[number].want(first, end, ahead_end)
            wanted[number].update(range(first, end))
        for server, spans in zip(servers, wanted, strict=True):
            server.wait(*spans)
            assert all(server.data(span) == layer.content(span) for span in spans)
        if background:
            rig.wait_verified(layer)
        assert max(rig.times_fetched(layer).values()) == 1


FAULTS = st.one_of(
    st.builds(Status, path=st.just("/blobs/"), status=st.sampled_from([401, 403, 404, 416, 429, 500, 503])),
    st.builds(Drop, path=st.just("/blobs/")),
    st.builds(Truncate, path=st.just("/blobs/"), after=st.integers(0, 200_000)),
    st.builds(FlipByte, path=st.just("/blobs/"), at=st.integers(0, 200_000)),
    st.builds(IgnoreRange, path=st.just("/blobs/")),
    st.builds(
        WrongRange, path=st.just("/blobs/"), shift=st.sampled_from([0, 1]), extra=st.sampled_from([0, 9])
    ),
    st.builds(Stall, path=st.just("/blobs/"), seconds=st.just(0.3), after=st.none() | st.integers(0, 99_999)),
)


def read_at_last(server: Server, span: int) -> bytes:
    """Read a span of a registry without faults: on a machine that stands still the short budget may be over once more."""
    for _ in range(TRIES - 1):
        with suppress(ReadFailed):
            return server.read(span)
    return server.read(span)


@pytest.mark.logs_unchecked
@BOUNDED
@given(
    script=st.lists(st.tuples(FAULTS, st.integers(0, 3), st.integers(1, 3)), max_size=6),
    wishes=wishes(),
    background=st.booleans(),
)
def test_any_fault_script_ends_in_right_bytes_or_an_error(
    registry: Registry,
    script: list[tuple[Fault, int, int]],
    wishes: list[tuple[int, int, int, int]],
    background: bool,
) -> None:
    layer = make_layer()
    options = {
        "read_budget_s": 0.8,
        "read_timeout_s": 0.15,
        "range_max_bytes": 70_000,
        "background_pause_s": 0.1,
    }
    for fault, skip, count in script:
        fault.skip, fault.count, fault.hits = skip, count, 0
        registry.fault(fault)
    with tempfile.TemporaryDirectory() as directory, Rig(Path(directory), registry, options=options) as rig:
        rig.add(layer)
        rig.open(layer, background=background)
        server = rig.connect(layer)
        for _, first, end, ahead_end in wishes:
            server.want(first, end, ahead_end)
            waiting = set(range(first, end))
            while waiting:
                match server.hear():
                    case wire.Ready(start, stop):
                        assert all(server.data(span) == layer.content(span) for span in range(start, stop))
                        waiting -= set(range(start, stop))
                    case wire.Failed(span, _):
                        waiting.discard(span)
        registry.clear_faults()
        for span in range(SPANS):
            assert read_at_last(server, span) == layer.content(span)
        blob = rig.store.paths(layer.digest).blob.read_bytes()
        for span, state in enumerate(rig.states(layer)[:SPANS]):
            where = layer.spans[span]
            assert state is SpanState.INFLATED
            assert blob[where.compressed_start : where.compressed_end] == layer.compressed(span)
