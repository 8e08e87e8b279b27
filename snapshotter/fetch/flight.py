"""One flight per span: whoever wants a span that is already on its way waits for the same flight.

A flight begins when a span that is not usable is first wanted (or taken by the background) and ends when it
has landed or failed; it is in the table exactly as long as that. It is entered in the same step in which
its absence was seen, before anything that could let another message in between, so two readers cannot start
two. It leaves the table before its waiters are told, so whoever asks again in consequence starts a new one.

Waiters are opaque: a flight knows who waits and since when, and the caller tells exactly those. A waiter that
asks again for the same span keeps its first deadline: nobody's time grows by asking again, and when it has
passed, all its readers are told and may start afresh.

Concurrency: the main loop only; no await in here, which is what makes the above atomic.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Generic, TypeVar

from snapshotter.layer.spans import SpanState

W = TypeVar("W", bound=Hashable)


class Stage(Enum):
    """Where a flight is at the moment."""

    QUEUED = auto()
    """In the schedule, waiting for a connection, memory or a source."""
    TRANSFER = auto()
    """Its bytes are being fetched."""
    LOCAL = auto()
    """A worker hashes, inflates or writes it."""
    PAUSED = auto()
    """A failed attempt is to be repeated after a while."""


@dataclass(slots=True, eq=False)
class Flight(Generic[W]):
    """A span on its way. The main loop changes it; a worker may read `goal`."""

    span: int
    goal: SpanState
    """FETCHED or INFLATED; it only goes up."""
    stage: Stage = Stage.QUEUED
    waiters: dict[W, float] = field(default_factory=dict)
    """Who waits, and since when."""
    attempts: int = 0
    """Temporary failures since somebody began to wait."""
    renewals: int = 0
    """Sources that were refused."""
    mismatches: int = 0
    """Times its bytes had a wrong digest."""

    def raise_goal(self, goal: SpanState) -> None:
        """Want at least `goal`."""
        self.goal = max(self.goal, goal)


class FlightTable(Generic[W]):
    """The flights of one layer by span."""

    def __init__(self) -> None:
        self._flights: dict[int, Flight[W]] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def __iter__(self) -> Iterator[Flight[W]]:
        return iter(list(self._flights.values()))

    def get(self, span: int) -> Flight[W] | None:
        """Return the flight of `span`, if it is on its way."""
        return self._flights.get(span)

    def begin(self, span: int, goal: SpanState) -> Flight[W]:
        """Enter a flight without a waiter. Raises RuntimeError when there is one already."""
        if span in self._flights:
            raise RuntimeError(f"span {span} is on its way already")
        flight = self._flights[span] = Flight[W](span, goal)
        return flight

    def join(self, span: int, waiter: W, now: float) -> tuple[Flight[W], bool]:
        """Let `waiter` wait for `span` to be inflated; return the flight and whether it is new.

        A flight that had nobody waiting forgets its failed attempts: they were not this reader's.
        """
        flight = self._flights.get(span)
        new = flight is None
        if flight is None:
            flight = self.begin(span, SpanState.INFLATED)
        elif not flight.waiters:
            flight.attempts = 0
        flight.raise_goal(SpanState.INFLATED)
        flight.waiters.setdefault(waiter, now)
        return flight, new

    def end(self, flight: Flight[W]) -> dict[W, float]:
        """Take `flight` out of the table; return who waited for it and since when, to be told by the caller."""
        del self._flights[flight.span]
        waiters, flight.waiters = flight.waiters, {}
        return waiters

    def holds(self, flight: Flight[W]) -> bool:
        """Whether `flight` has not ended yet."""
        return self._flights.get(flight.span) is flight

    def leave(self, waiter: W) -> list[Flight[W]]:
        """`waiter` is gone; return the flights that nobody waits for any more because of that."""
        left = [flight for flight in self._flights.values() if flight.waiters.pop(waiter, None) is not None]
        return [flight for flight in left if not flight.waiters]
