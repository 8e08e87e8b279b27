"""What readers ask for, turned into flights.

A reader that wants a span finds it in one of these places, and is told when it is usable:

    inflated                      told at once
    on its way                    joins the flight, which becomes urgent if it was not
    fetched, or in doubt          a worker inflates it, or hashes it first
    missing                       the schedule, then a transfer, then a worker

A server that has been told at once, several times, that a span is usable and still asks cannot read it: the
span is hashed then, whatever its state says.

Every wait has the same length, so waits end in the order in which they began: one queue and one timer.

Concurrency: the main loop only; each message is dealt with in one step without an await.
"""

from __future__ import annotations

from collections import deque

import trio

from snapshotter.fetch.ahead import Plan
from snapshotter.fetch.context import Context
from snapshotter.fetch.downloads import Downloads
from snapshotter.fetch.flight import Flight, Stage
from snapshotter.fetch.landing import Landing
from snapshotter.fetch.layerstate import ActiveLayer
from snapshotter.fetch.readers import Reader
from snapshotter.layer.spans import SpanState
from snapshotter.layer.wire import Ready, Want

DOUBT_AFTER = 2
"""Times that a server is told at once that a span is usable before asking again counts as a complaint. Its first
look at the state may have been a moment too early, and two readers in it may have asked at the same time."""


class Demand:
    """The wishes of all servers."""

    def __init__(self, context: Context, downloads: Downloads, landing: Landing) -> None:
        self._context = context
        self._downloads = downloads
        self._landing = landing
        self._waits: deque[tuple[float, ActiveLayer, Flight[Reader], Reader]] = deque()
        """By the time at which they end, the next one first."""

    def want(self, layer: ActiveLayer, reader: Reader, want: Want) -> None:
        """A reader of the server `reader` is blocked. Raises ValueError when the layer has no such span."""
        if want.end > layer.files.span_count:
            raise ValueError(f"want of span {want.end - 1} of {layer.files.span_count}")
        self._context.counters.add("wants", want.end - want.first)
        for span in range(want.first, want.end):
            if layer.state(span) is SpanState.INFLATED and self._tell(reader, span):
                continue
            reader.told.pop(span, None)
            self._join(layer, reader, span)
        plan = layer.ahead.want(want.first, want.end, want.ahead_end, self._downloads.ahead_room())
        self._ask_ahead(layer, plan)
        self._downloads.pump()

    def doubt(self, layer: ActiveLayer, reader: Reader, span: int) -> None:
        """A reader found `span` short or wrong though it is said to be inflated: it is hashed before another look.

        Raises ValueError when the layer has no such span.
        """
        if span >= layer.files.span_count:
            raise ValueError(f"doubt of span {span} of {layer.files.span_count}")
        self._context.counters.add("spans_doubted")
        self._join(layer, reader, span)
        self._downloads.pump()

    def touch(self, layer: ActiveLayer, span: int) -> None:
        """A reader used `span` without waiting. Raises ValueError when the layer has no such span."""
        if span >= layer.files.span_count:
            raise ValueError(f"touch of span {span} of {layer.files.span_count}")
        plan = layer.ahead.touch(span, self._downloads.ahead_room())
        if plan is not None:
            self._ask_ahead(layer, plan)
            self._downloads.pump()

    def leave(self, layer: ActiveLayer, reader: Reader) -> None:
        """The server has gone away. What was only wanted by it and is not under way is left to the background."""
        for flight in layer.flights.leave(reader):
            if flight.stage in (Stage.QUEUED, Stage.PAUSED):
                self._landing.abandon(layer, flight)

    def _tell(self, reader: Reader, span: int) -> bool:
        """Tell `reader` that `span` is usable, unless it has been told too often."""
        times = reader.told.get(span, 0)
        if times >= DOUBT_AFTER:
            return False
        reader.told[span] = times + 1
        self._context.counters.add("spans_from_cache")
        reader.send(Ready(span, span + 1))
        return True

    def _join(self, layer: ActiveLayer, reader: Reader, span: int) -> None:
        now = trio.current_time()
        flight, new = layer.flights.join(span, reader, now)
        self._end_later(now + self._context.options.read_budget_s, layer, flight, reader)
        if new:
            self._begin(layer, flight)
        elif flight.stage is Stage.QUEUED:
            self._landing.queue(layer, flight)
        else:
            self._downloads.join(flight)

    def _ask_ahead(self, layer: ActiveLayer, plan: Plan | None) -> None:
        if plan is None:
            return
        for span in range(plan.first, plan.end):
            goal = SpanState.INFLATED if span < plan.inflate_end else SpanState.FETCHED
            flight = layer.flights.get(span)
            if flight is not None:
                flight.raise_goal(goal)
            elif layer.state(span) not in (goal, SpanState.INFLATED):
                self._context.counters.add("ahead_spans")
                self._begin(layer, layer.flights.begin(span, goal))

    def _begin(self, layer: ActiveLayer, flight: Flight[Reader]) -> None:
        """Send a new flight to where its span is."""
        if layer.state(flight.span) is SpanState.MISSING:
            self._landing.queue(layer, flight)
        else:
            self._landing.work_on(layer, flight)

    def _end_later(self, when: float, layer: ActiveLayer, flight: Flight[Reader], reader: Reader) -> None:
        while self._waits and not self._waits[0][2].waiters:
            self._waits.popleft()
        if not self._waits:
            self._context.timers.at(when, self._end_waits)
        self._waits.append((when, layer, flight, reader))

    def _end_waits(self) -> None:
        """Tell those whose time is up, and come back for the next one."""
        now = trio.current_time()
        while self._waits:
            when, layer, flight, reader = self._waits[0]
            if flight.waiters:
                if when > now:
                    self._context.timers.at(when, self._end_waits)
                    return
                since = flight.waiters.get(reader)
                if since is not None and since + self._context.options.read_budget_s <= now:
                    self._landing.expired(layer, flight, reader)
            self._waits.popleft()
