"""Chaos and leaks for a moment; much longer by `make chaos` and `make leaks`."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from tests.chaos.leaks import Leaks
from tests.chaos.rig import Rig
from tests.chaos.run import Chaos, Tally
from tests.chaos.schedule import FINAL, LINKS, PASSING, ROLES, Kill, schedule

SECONDS = 12.0
CYCLES = 20


@pytest.fixture(scope="module")
def rig(module_workdir: Path, fuse: None) -> Rig:
    with Rig(module_workdir) as running:
        yield running


def test_the_same_seed_makes_the_same_chaos_and_everything_has_its_turn() -> None:
    steps = list(islice(schedule(7, pause=0.2), 1000))
    assert steps == list(islice(schedule(7, pause=0.2), 1000))
    assert steps != list(islice(schedule(8, pause=0.2), 1000))
    kills = Counter(step.action.role for step in steps if isinstance(step.action, Kill))
    assert set(kills) == set(ROLES)
    named = {step.action.name for step in steps if not isinstance(step.action, Kill)}
    assert named == {each.name for each in (*PASSING, *FINAL, *LINKS)}


def test_an_error_counts_unless_a_fault_explains_it() -> None:
    tally = Tally(seed=1, errors=[(1.0, 2.0, 5, "a"), (8.0, 9.0, 5, "b")], allowed=[(1.5, 3.0)])
    assert tally.unexpected() == [(8.0, 9.0, 5, "b")]
    assert not tally.is_clean


def test_a_slow_read_is_put_down_to_the_kill_beside_it() -> None:
    tally = Tally(seed=1, slow=[(10.0, 10.4, "a"), (20.0, 21.0, "b")])
    tally.events = [(10.1, "layer"), (19.0, "fetcher"), (20.5, "")]
    assert tally.worst_by_role() == dict.fromkeys(ROLES, 0.0) | {"layer": 0.4}


def test_nothing_is_left_behind_by_mounts_and_reads(rig: Rig) -> None:
    leaks = Leaks(rig)
    growth = leaks.measure(CYCLES, warm_up=10)
    leaks.close()
    assert growth.reads > 50 * CYCLES
    assert all(grown <= 0 for grown in growth.fds.values()), growth
    assert (growth.processes, growth.mounts) == (0, 0), growth
    assert growth.files <= 0, growth
    # Memory is for the long run: a heap that is still finding its size says nothing.


def test_no_reader_notices_kills_and_faults(rig: Rig) -> None:
    tally = Chaos(rig, seconds=SECONDS, seed=11, readers=3, pause=0.15).run()
    told = f"{tally.to_json()}\n{tally.failures}\n{tally.unexpected()[:10]}\n{tally.wrong[:10]}"
    assert tally.is_clean, told
    # How many there are in these seconds is the machine's: a restart may take most of them on a busy one.
    assert sum(tally.reads.values()) > 100, told
    assert sum(tally.kills.values()) > 0, told
    assert tally.pulls > 0, told
