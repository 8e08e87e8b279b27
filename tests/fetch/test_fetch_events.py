"""What the fetcher tells of: every wait of a reader, every range."""

from __future__ import annotations

from pathlib import Path

from snapshotter.events import Kind
from tests.conftest import ExpectedLogs
from tests.fetch.rig import Rig, make_layer
from tests.support.registry import Registry, Stall


def test_a_wait_and_its_range(rig: Rig, registry: Registry) -> None:
    layer = rig.add(make_layer())
    rig.open(layer)
    registry.fault(Stall(path="/blobs/", seconds=0.3))
    rig.connect(layer).read(5)
    rig.wait_for(lambda: any(e.kind is Kind.ON_DEMAND for e in rig.events()), "the range has ended")
    events = rig.events()
    (wait,) = [event for event in events if event.kind is Kind.WAIT]
    (demand,) = [event for event in events if event.kind is Kind.ON_DEMAND]
    assert wait.span == demand.span == 5
    assert wait.layer == layer.digest.partition(":")[2][:16]
    assert wait.seconds >= 0.3
    assert demand.size >= len(layer.compressed(5))
    assert demand.start >= wait.start - 0.01


def test_the_background_is_told_apart(rig: Rig) -> None:
    layer = rig.add(make_layer())
    rig.open(layer, background=True)
    rig.wait_for(lambda: rig.count("layers_verified"), "the layer is complete")
    # A range is told of when its thread is done with it, which may be after its last span was put to use.
    rig.wait_for(
        lambda: sum(event.spans for event in rig.events()) == len(layer.spans), "all ranges were told of"
    )
    events = rig.events()
    assert {event.kind for event in events} == {Kind.BACKGROUND}
    assert sum(event.size for event in events) == len(layer.blob)


def test_a_wait_in_vain(tmp_path: Path, registry: Registry, expected_logs: ExpectedLogs) -> None:
    expected_logs.allow("span not fetched within the budget")
    with Rig(tmp_path, registry, options={"read_budget_s": 0.3}) as rig:
        layer = rig.add(make_layer())
        registry.fault(Stall(path="/blobs/", seconds=1.0, count=-1))
        server = rig.connect(layer)
        server.want(5)
        rig.wait_for(lambda: rig.count("budget_exceeded"), "the budget is used up")
        (wait,) = [event for event in rig.events() if event.kind is Kind.WAIT_FAILED]
        assert wait.span == 5
        assert wait.seconds >= 0.3
