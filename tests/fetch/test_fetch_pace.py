"""Caps on what is fetched in the background: of the host, and of each image."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.fetch.pace import Pace
from tests.fetch.rig import Rig, make_layer, settle
from tests.support.registry import Registry

ONE_RANGE = 100_000


@given(
    rate=st.integers(1, 10**9),
    steps=st.lists(st.tuples(st.floats(0, 100), st.integers(1, 10**8)), max_size=50),
)
def test_until_any_moment_no_more_starts_than_the_cap_allows_and_one_transfer(
    rate: int, steps: list[tuple[float, int]]
) -> None:
    pace, now, started, largest = Pace(rate), 0.0, 0, 0
    for wait, size in steps:
        now += wait
        if pace.allows("image", now):
            free_at = pace.spend("image", size, now)
            assert free_at is not None
            assert free_at >= now + size / rate
            started, largest = started + size, max(largest, size)
        assert started <= now * rate * 1.000_001 + largest
        assert pace.allows("another", now)


def test_what_was_waited_for_may_start() -> None:
    pace = Pace(10)
    free_at = pace.spend("image", 100, 5.0)
    assert free_at == 15.0
    assert not pace.allows("image", 14.9)
    assert pace.allows("image", 15.0)


def test_no_cap_is_none() -> None:
    pace = Pace(0)
    assert pace.spend("image", 10**12, 0.0) is None
    assert pace.allows("image", 0.0)


@pytest.mark.parametrize("cap", ["background_bytes_per_s", "background_bytes_per_s_per_image"])
def test_a_cap_holds_the_background_and_no_reader(tmp_path: Path, registry: Registry, cap: str) -> None:
    options = {cap: 1, "background_connections": 4, "range_max_bytes": ONE_RANGE, "background_quiet_s": 0.01}
    first, second, other = (make_layer(seed=seed) for seed in (1, 2, 3))
    with Rig(tmp_path, registry, options=options) as rig:
        for layer, image in ((first, "one"), (second, "one"), (other, "another")):
            rig.add(layer)
            rig.open(layer, background=True, image=image)
        ranges = 1 if cap == "background_bytes_per_s" else 2
        rig.wait_for(lambda: rig.count("background_ranges") == ranges, "what the cap allows has started")
        rig.wait_for(lambda: rig.count("transfers_background") == 0, "and has come")
        settle()
        assert rig.count("background_ranges") == ranges
        assert rig.count("background_bytes") <= ranges * ONE_RANGE
        assert rig.connect(second).read(len(second.spans) - 1) == second.content(len(second.spans) - 1)


def test_a_capped_background_goes_on_by_itself(tmp_path: Path, registry: Registry) -> None:
    layer = make_layer()
    options = {"background_bytes_per_s_per_image": len(layer.blob) * 4, "range_max_bytes": ONE_RANGE}
    with Rig(tmp_path, registry, options=options) as rig:
        rig.add(layer)
        rig.open(layer, background=True, image="one")
        rig.wait_verified(layer)
        assert rig.count("background_ranges") > 1
