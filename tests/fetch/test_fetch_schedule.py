"""What goes first, and what travels together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from snapshotter.fetch.schedule import Batch, Priority, Schedule

MANY = 1 << 40


def anywhere(_layer: str) -> bool:
    return True


def schedule_of(**layers: int) -> Schedule:
    """Layers by name with so many spans of 100 bytes."""
    schedule = Schedule()
    for name, count in layers.items():
        schedule.add_layer(name, [100] * count)
    return schedule


def take(schedule: Schedule, priority: Priority, limit: int = MANY) -> tuple[str, int, int] | None:
    batch = schedule.take(priority, limit, anywhere)
    return None if batch is None else (batch.layer, batch.first, batch.end)


def test_neighbours_travel_together_behind_the_first() -> None:
    schedule = schedule_of(a=10)
    for span in (4, 3, 5, 6, 8):
        schedule.want("a", span, Priority.ON_DEMAND)
    assert take(schedule, Priority.ON_DEMAND) == ("a", 4, 7), (
        "3 lies before what asked first, 7 is not wanted"
    )
    assert take(schedule, Priority.ON_DEMAND) == ("a", 3, 4)
    assert take(schedule, Priority.ON_DEMAND) == ("a", 8, 9)
    assert take(schedule, Priority.ON_DEMAND) is None


def test_a_batch_for_readers_takes_read_ahead_along_but_no_background() -> None:
    schedule = schedule_of(a=10)
    schedule.want("a", 0, Priority.ON_DEMAND)
    schedule.want("a", 1, Priority.AHEAD)
    schedule.want_in_background("a", range(2, 5))
    assert take(schedule, Priority.ON_DEMAND) == ("a", 0, 2)
    assert take(schedule, Priority.AHEAD) is None
    assert take(schedule, Priority.BACKGROUND) == ("a", 2, 5)


def test_no_reader_is_put_behind_what_is_read_ahead() -> None:
    schedule = schedule_of(a=10)
    for span in (2, 3, 6):
        schedule.want("a", span, Priority.ON_DEMAND)
    for span in (4, 5, 7):
        schedule.want("a", span, Priority.AHEAD)
    assert take(schedule, Priority.ON_DEMAND) == ("a", 2, 6)
    assert take(schedule, Priority.ON_DEMAND) == ("a", 6, 8)


def test_the_limit_is_kept_but_for_a_single_span() -> None:
    schedule = schedule_of(a=10)
    for span in range(6):
        schedule.want("a", span, Priority.AHEAD)
    assert take(schedule, Priority.AHEAD, 250) == ("a", 0, 2)
    assert take(schedule, Priority.AHEAD, 300) == ("a", 2, 5)
    assert take(schedule, Priority.AHEAD, 1) == ("a", 5, 6)


def test_a_wish_moves_up_and_never_down() -> None:
    schedule = schedule_of(a=10)
    schedule.want_in_background("a", range(10))
    schedule.want("a", 7, Priority.AHEAD)
    schedule.want("a", 7, Priority.ON_DEMAND)
    schedule.want("a", 7, Priority.BACKGROUND)
    schedule.want_in_background("a", [7])
    assert take(schedule, Priority.AHEAD) is None
    assert take(schedule, Priority.ON_DEMAND) == ("a", 7, 8)
    assert take(schedule, Priority.BACKGROUND) == ("a", 0, 7)
    assert take(schedule, Priority.BACKGROUND) == ("a", 8, 10)


def test_layers_take_turns() -> None:
    schedule = schedule_of(a=10, b=10, c=10)
    for layer in "abc":
        schedule.want_in_background(layer, range(4))
    order = [take(schedule, Priority.BACKGROUND, 200) for _ in range(6)]
    assert order == [("a", 0, 2), ("b", 0, 2), ("c", 0, 2), ("a", 2, 4), ("b", 2, 4), ("c", 2, 4)]


def test_a_layer_that_is_not_allowed_keeps_its_turn() -> None:
    schedule = schedule_of(a=2, b=2)
    for layer in "ab":
        for span in (0, 1):
            schedule.want(layer, span, Priority.ON_DEMAND)
    assert schedule.take(Priority.ON_DEMAND, 100, lambda layer: layer == "b") == Batch(
        "b", 0, 1, Priority.ON_DEMAND
    )
    assert schedule.take(Priority.ON_DEMAND, 100, lambda layer: layer == "none") is None
    assert take(schedule, Priority.ON_DEMAND, 100) == ("a", 0, 1)


def test_background_follows_its_order_and_coalesces_in_it() -> None:
    schedule = schedule_of(a=10)
    schedule.want_in_background("a", [7, 8, 2, 0, 1, 3, 4, 5, 6, 9])
    assert take(schedule, Priority.BACKGROUND, 200) == ("a", 7, 9)
    assert take(schedule, Priority.BACKGROUND, 200) == ("a", 2, 4)
    assert take(schedule, Priority.BACKGROUND, 200) == ("a", 0, 2)


def test_what_is_discarded_or_of_a_removed_layer_is_not_fetched() -> None:
    schedule = schedule_of(a=10, b=10)
    schedule.want_in_background("a", range(3))
    schedule.want("b", 0, Priority.ON_DEMAND)
    schedule.discard("a", 1)
    assert schedule.queued(Priority.BACKGROUND) == 2
    assert schedule.queued_bytes(Priority.BACKGROUND) == 200
    assert take(schedule, Priority.BACKGROUND) == ("a", 0, 1)
    schedule.stop_background("a")
    assert take(schedule, Priority.BACKGROUND) is None
    schedule.remove_layer("b")
    assert take(schedule, Priority.ON_DEMAND) is None
    assert schedule.queued(Priority.ON_DEMAND) == 0


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    wishes=st.lists(st.tuples(st.integers(0, 29), st.sampled_from(Priority)), max_size=60),
    limit=st.integers(1, 200),
)
def test_every_wish_is_taken_exactly_once(
    sizes: list[int], wishes: list[tuple[int, Priority]], limit: int
) -> None:
    schedule = Schedule()
    schedule.add_layer("a", sizes)
    wanted = {span % len(sizes) for span, _ in wishes}
    for span, priority in wishes:
        schedule.want("a", span % len(sizes), priority)
    taken: list[int] = []
    for priority in Priority:
        while batch := schedule.take(priority, limit, anywhere):
            spans = range(batch.first, batch.end)
            assert sum(sizes[span] for span in spans) <= limit or len(spans) == 1
            taken += spans
    assert sorted(taken) == sorted(wanted)


def test_the_background_takes_the_layer_that_was_read_last_then_the_smallest() -> None:
    schedule = schedule_of(large=9, small=3, middle=6)
    for name, count in (("large", 9), ("small", 3), ("middle", 6)):
        schedule.want_in_background(name, range(count))
    assert take(schedule, Priority.BACKGROUND, 100) == ("small", 0, 1)
    schedule.read("middle", 2)
    schedule.read("large", 5)
    assert take(schedule, Priority.BACKGROUND) == ("large", 5, 9)
    assert take(schedule, Priority.BACKGROUND) == ("large", 0, 5), "what lies before the reader comes last"
    assert take(schedule, Priority.BACKGROUND) == ("middle", 2, 6)
    schedule.read("small", 1)
    assert take(schedule, Priority.BACKGROUND) == ("small", 1, 3)
    assert take(schedule, Priority.BACKGROUND) == ("middle", 0, 2)


def test_an_order_that_was_recorded_is_kept() -> None:
    schedule = Schedule()
    schedule.add_layer("a", [100] * 9, recorded=True)
    schedule.want_in_background("a", [7, 2, 0, 1])
    schedule.read("a", 1)
    assert [take(schedule, Priority.BACKGROUND) for _ in range(3)] == [("a", 7, 8), ("a", 2, 3), ("a", 0, 2)]
