"""What the background may take of a link, simulated: bytes arrive at a rate, time is an argument."""

from __future__ import annotations

import pytest

from snapshotter.fetch.link import MIN_RANGE, PATIENCE, PATIENT_SECONDS, TRIAL, Link

MIB = 1 << 20
QUIET_SECONDS = 1.0


def link(max_width: int = 4, max_range: int = 8 * MIB) -> Link:
    return Link(max_width=max_width, max_range=max_range, quiet_s=QUIET_SECONDS)


def feed(model: Link, start: float, seconds: float, rate: float, transfers: int = 1) -> float:
    """Let `rate` bytes per second arrive for `seconds` on so many transfers; return the time afterwards."""
    steps = max(int(seconds / 0.02), 1)
    for _ in range(transfers):
        model.started(start, reader=False)
    for step in range(1, steps + 1):
        model.received(start + step * 0.02, int(rate * 0.02))
    end = start + steps * 0.02
    for _ in range(transfers):
        model.ended(end, reader=False)
    return end


def test_nothing_is_known_at_first_and_the_background_starts_all_the_same() -> None:
    model = link()
    assert model.rate == 0
    allowance = model.background(0.0, reader_bytes=0)
    assert allowance.ranges == 2
    assert allowance.size == 2 * MIN_RANGE


@pytest.mark.parametrize("rate", [2 * MIB, 20 * MIB, 100 * MIB])
def test_the_rate_is_measured(rate: int) -> None:
    model = link()
    feed(model, 10.0, 3.0, rate)
    assert model.rate == pytest.approx(rate, rel=0.05)


def test_time_without_a_transfer_does_not_count() -> None:
    model = link()
    now = 0.0
    for _ in range(10):
        now = feed(model, now, 0.2, 50 * MIB) + 5.0
    assert model.rate == pytest.approx(50 * MIB, rel=0.05)


def test_a_link_that_became_slower_is_believed_after_a_while() -> None:
    model = link()
    now = feed(model, 0.0, 1.0, 100 * MIB)
    feed(model, now, 30.0, 5 * MIB)
    assert model.rate == pytest.approx(5 * MIB, rel=0.05)


def test_ranges_grow_with_the_rate_within_their_bounds() -> None:
    sizes = []
    for rate in (1 * MIB, 20 * MIB, 1000 * MIB):
        model = link(max_width=2)
        now = feed(model, 0.0, 3.0, rate)
        sizes.append(model.background(now, reader_bytes=0).size)
    assert sizes == [MIN_RANGE, pytest.approx(3 * MIB, rel=0.1), 8 * MIB]


def test_a_slow_link_has_one_range_at_a_time() -> None:
    model = link()
    now = feed(model, 0.0, 5.0, 1 * MIB)
    assert model.background(now, reader_bytes=0).ranges == 1


def test_beside_readers_the_background_takes_what_is_near_in_short_ranges_and_never_in_their_way() -> None:
    model = link()
    now = feed(model, 0.0, 1.0, 100 * MIB)
    model.active(now)
    model.started(now, reader=True)
    assert model.background(now, reader_bytes=1 * MIB).ranges == 0
    model.ended(now + 0.1, reader=True)
    assert model.quiet_at() == pytest.approx(now + 0.1 + QUIET_SECONDS)
    near = model.background(now + 0.2, reader_bytes=0)
    assert (near.ranges, near.size, near.near) == (2, pytest.approx(5 * MIB, rel=0.1), True)
    quiet = model.background(model.quiet_at(), reader_bytes=0)
    assert (quiet.ranges, quiet.near) == (2, False)
    assert quiet.size > near.size


def read_on(model: Link, now: float, seconds: float) -> float:
    """Let somebody read without a pause for so long; return the time afterwards."""
    for _ in range(int(seconds / 0.1)):
        model.active(now)
        now += 0.1
    return now


def test_beside_somebody_who_reads_for_long_one_short_range_runs_now_and_then() -> None:
    model = link()
    now = feed(model, 0.0, 1.0, 100 * MIB)
    begun = now
    now = read_on(model, now, PATIENT_SECONDS - 0.5)
    assert model.background(now, reader_bytes=1 * MIB).ranges == 0
    assert model.quiet_at() == pytest.approx(begun + PATIENT_SECONDS)
    now = read_on(model, now, 1.0)
    allowance = model.background(now, reader_bytes=1 * MIB)
    assert (allowance.ranges, allowance.size) == (1, pytest.approx(5 * MIB, rel=0.1))
    model.started(now, reader=False)
    model.ended(now + 0.05, reader=False)
    assert model.background(read_on(model, now, 1.0), reader_bytes=1 * MIB).ranges == 0


def test_a_burst_that_waited_in_the_socket_is_not_taken_for_the_rate() -> None:
    model = link()
    now = 0.0
    model.started(now, reader=False)
    for step in range(1, 13):
        now += 0.25
        model.received(now, 8 * MIB if step == 6 else (0 if step == 5 else int(1.25 * MIB)))
    model.ended(now, reader=False)
    assert model.rate == pytest.approx(5 * MIB, rel=0.1)


def run_full(model: Link, now: float, per_range: float, most: float, samples: int) -> float:
    """Keep all allowed ranges busy on a link where each gives `per_range` and all together `most`."""
    for _ in range(samples):
        width = model.background(now, reader_bytes=0).ranges
        now = feed(model, now, 0.22, min(width * per_range, most), transfers=width)
    return now


def test_the_background_widens_while_that_helps() -> None:
    model = link(max_width=6)
    run_full(model, 0.0, 40 * MIB, 1000 * MIB, samples=8 * TRIAL)
    assert model.width == 6


def test_the_background_does_not_stay_wide_where_it_does_not_help() -> None:
    model = link(max_width=6)
    now = run_full(model, 0.0, 100 * MIB, 100 * MIB, samples=2 * TRIAL)
    assert model.width == 2, "3 was tried and taken back"
    run_full(model, now, 100 * MIB, 100 * MIB, samples=(PATIENCE + 2) * TRIAL)
    assert model.width <= 3, "tried again after a while"


def test_read_ahead_has_what_the_link_gives_in_a_moment_less_what_is_under_way() -> None:
    model = link()
    assert model.ahead_room(0) == 2 * MIN_RANGE
    assert model.ahead_room(3 * MIN_RANGE) < 0
    feed(model, 0.0, 1.0, 100 * MIB)
    assert model.ahead_room(10 * MIB) == pytest.approx(20 * MIB, rel=0.1)
    slow = link()
    feed(slow, 0.0, 5.0, 1 * MIB)
    assert slow.ahead_room(0) == pytest.approx(0.3 * MIB, rel=0.1)
