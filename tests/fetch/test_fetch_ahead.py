"""How far read-ahead goes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from snapshotter.fetch.ahead import (
    BEYOND_WINDOW,
    FIRST_WINDOW,
    MAX_STREAMS,
    MAX_WINDOW,
    PROBE,
    Plan,
    ReadAhead,
)

ROOM = 1 << 40


def layer(spans: int = 1000) -> ReadAhead:
    return ReadAhead([100] * spans)


def test_the_first_miss_asks_for_little() -> None:
    assert layer().want(10, 11, 11, ROOM) == Plan(11, 11, 11 + FIRST_WINDOW), "behind the file: not inflated"


def test_the_rest_of_the_file_is_inflated() -> None:
    assert layer().want(10, 11, 50, ROOM) == Plan(11, 11 + FIRST_WINDOW, 11 + FIRST_WINDOW)


def test_a_stream_grows_as_it_is_confirmed_and_then_inflates_everything() -> None:
    streams = layer()
    streams.want(0, 1, 500, ROOM)
    plans = [plan for span in range(1, 200) if (plan := streams.touch(span, ROOM)) is not None]
    sizes = [plan.end - plan.first for plan in plans]
    assert max(sizes) <= MAX_WINDOW
    assert sizes[-1] >= MAX_WINDOW // 2, "pieces are large when the window is"
    assert plans[-1].inflate_end == plans[-1].end
    assert plans[-1].end >= 199 + MAX_WINDOW // 2, "it stays ahead"


def test_beyond_the_end_of_the_file_read_ahead_is_careful() -> None:
    streams = layer()
    streams.want(0, 1, 30, ROOM)
    reach, pieces = 0, 0
    for span in range(1, 200):
        plan = streams.touch(span, ROOM)
        reach, pieces = (plan.end, pieces + 1) if plan else (reach, pieces)
        assert reach <= max(span + 1, 30) + BEYOND_WINDOW
    assert reach >= 200 + BEYOND_WINDOW // 2, "but it goes on"
    assert pieces <= 100, "and asks for more than one at a time"


def test_plans_of_a_sequential_reader_tile_what_it_reads() -> None:
    streams = layer(100)
    plans = [streams.want(0, 1, 100, ROOM), *(streams.touch(span, ROOM) for span in range(1, 100))]
    asked = [span for plan in plans if plan for span in range(plan.first, plan.end)]
    assert asked == list(range(1, 100)), "each exactly once, in order, and not beyond the layer"


def guesses(streams: ReadAhead, first: int, count: int) -> int:
    """Read at `count` random places from `first` on; return how many spans were asked for beside."""
    plans = [streams.want(span, span + 1, span + 1, ROOM) for span in range(first, first + 10 * count, 10)]
    return sum(plan.end - plan.first for plan in plans if plan)


def test_random_reads_never_grow_and_are_guessed_about_less_and_less() -> None:
    streams = layer(100_000)
    assert guesses(streams, 0, 5) == 5 * FIRST_WINDOW
    assert guesses(streams, 1000, 20) < 10 * FIRST_WINDOW
    assert guesses(streams, 10_000, 10 * PROBE) == 10 * FIRST_WINDOW


def test_guessing_is_resumed_where_it_comes_right_again() -> None:
    streams = layer(100_000)
    guesses(streams, 0, 200)
    for span in range(10_000, 12_000, 10):
        streams.want(span, span + 1, span + 1, ROOM)
        streams.touch(span + 1, ROOM)
    assert guesses(streams, 20_000, 10) == 10 * FIRST_WINDOW


def test_a_use_where_no_stream_is_asks_for_nothing() -> None:
    streams = layer()
    streams.want(10, 11, 11, ROOM)
    assert streams.touch(500, ROOM) is None


def test_two_streams_do_not_disturb_each_other() -> None:
    streams = layer()
    for step in range(50):
        streams.want(step, step + 1, 400, ROOM)
        streams.want(500 + step, 501 + step, 900, ROOM)
    plan = streams.want(50, 51, 400, ROOM) or streams.touch(51, ROOM) or streams.touch(52, ROOM)
    assert plan is None or plan.end <= 200


def test_the_window_is_bounded_by_the_room() -> None:
    streams = layer()
    assert streams.want(0, 1, 100, 99) is None, "no room for one span"
    for span in range(1, 60):
        plan = streams.touch(span, 250)
        assert plan is None or plan.end - plan.first <= 2


def test_a_stream_that_goes_on_has_its_next_span_however_slow_the_link() -> None:
    streams = layer()
    assert streams.want(0, 1, 100, -5) is None
    for span in range(1, 10):
        assert streams.want(span, span + 1, 100, -5) == Plan(span + 1, span + 2, span + 2)


def test_what_had_no_room_is_asked_for_later() -> None:
    streams = layer()
    assert streams.want(0, 1, 100, 0) is None
    assert streams.touch(1, ROOM) == Plan(2, 2 + 2 * FIRST_WINDOW, 2 + 2 * FIRST_WINDOW)


def test_the_same_miss_again_is_no_progress() -> None:
    streams = layer()
    streams.want(10, 11, 11, ROOM)
    for _ in range(10):
        assert streams.want(10, 11, 11, ROOM) is None


def test_old_streams_are_forgotten() -> None:
    streams = layer(10_000)
    streams.want(0, 1, 1, ROOM)
    for number in range(1, MAX_STREAMS + 1):
        streams.want(number * 100, number * 100 + 1, 1, ROOM)
    assert streams.touch(1, ROOM) is None


@given(
    reads=st.lists(
        st.tuples(
            st.integers(0, 99), st.integers(1, 5), st.integers(0, 60), st.booleans(), st.integers(0, 2000)
        ),
        max_size=80,
    )
)
def test_plans_stay_in_the_layer_and_in_their_room(reads: list[tuple[int, int, int, bool, int]]) -> None:
    streams = layer(100)
    for first, length, more, touch, room in reads:
        end = min(first + length, 100)
        plan = streams.touch(first, room) if touch else streams.want(first, end, min(end + more, 100), room)
        if plan is not None:
            assert 0 < plan.first <= plan.inflate_end <= plan.end <= 100
            assert 0 < (plan.end - plan.first) * 100 <= max(room, 100)
