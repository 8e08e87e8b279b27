"""One flight per span."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.fetch.flight import FlightTable, Stage
from snapshotter.layer.spans import SpanState


def test_waiters_of_one_span_share_a_flight() -> None:
    table: FlightTable[str] = FlightTable()
    flight, new = table.join(3, "a", 1.0)
    again, second = table.join(3, "b", 2.0)
    assert (new, second) == (True, False)
    assert again is flight
    assert flight.goal is SpanState.INFLATED
    assert table.end(flight) == {"a": 1.0, "b": 2.0}


def test_asking_again_does_not_prolong_the_wait() -> None:
    table: FlightTable[str] = FlightTable()
    flight, _ = table.join(3, "a", 1.0)
    table.join(3, "a", 50.0)
    assert flight.waiters == {"a": 1.0}


def test_an_ended_flight_leaves_nothing_and_the_next_one_is_new() -> None:
    table: FlightTable[str] = FlightTable()
    flight, _ = table.join(3, "a", 1.0)
    flight.attempts = 5
    table.end(flight)
    assert len(table) == 0
    assert table.get(3) is None
    assert not table.holds(flight)
    fresh, new = table.join(3, "a", 2.0)
    assert new
    assert fresh.attempts == 0
    assert fresh.stage is Stage.QUEUED
    assert table.holds(fresh)
    assert not table.holds(flight)


def test_a_background_flight_that_gets_a_reader_is_raised_and_its_failures_forgotten() -> None:
    table: FlightTable[str] = FlightTable()
    flight = table.begin(3, SpanState.FETCHED)
    flight.attempts = 8
    table.join(3, "a", 1.0)
    assert flight.goal is SpanState.INFLATED
    assert flight.attempts == 0
    flight.attempts = 2
    table.join(3, "b", 1.0)
    assert flight.attempts == 2, "somebody waits already: his failures count"
    flight.raise_goal(SpanState.FETCHED)
    assert flight.goal is SpanState.INFLATED


def test_a_second_flight_of_a_span_is_refused() -> None:
    table: FlightTable[str] = FlightTable()
    table.begin(3, SpanState.FETCHED)
    with pytest.raises(RuntimeError, match="span 3"):
        table.begin(3, SpanState.FETCHED)


def test_leaving_tells_which_flights_nobody_waits_for() -> None:
    table: FlightTable[str] = FlightTable()
    alone, _ = table.join(1, "a", 1.0)
    shared, _ = table.join(2, "a", 1.0)
    table.join(2, "b", 1.0)
    ahead = table.begin(3, SpanState.FETCHED)
    assert table.leave("a") == [alone]
    assert shared.waiters == {"b": 1.0}
    assert list(table) == [alone, shared, ahead]


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.sampled_from(["join", "end", "leave"])))
)
def test_every_waiter_is_told_or_has_left(steps: list[tuple[str, int, str]]) -> None:
    table: FlightTable[str] = FlightTable()
    waiting: set[tuple[str, int]] = set()
    for waiter, span, step in steps:
        flight = table.get(span)
        if step == "join":
            table.join(span, waiter, 0.0)
            waiting.add((waiter, span))
        elif step == "leave":
            table.leave(waiter)
            waiting -= {(waiter, number) for number in range(4)}
        elif flight is not None:
            told = {(name, span) for name in table.end(flight)}
            assert told == {one for one in waiting if one[1] == span}
            waiting -= told
    assert waiting == {(name, flight.span) for flight in table for name in flight.waiters}
