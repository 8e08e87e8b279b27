"""How flights end: states are written, waiters are told, and what comes next is decided.

    an outcome that reaches the goal       state, then Ready to every waiter
    compressed, and somebody now wants it  state, then inflate from `blob`
    found damaged on disk                  state back to MISSING, then fetch
    lent, because the disk took nothing    Lent to every waiter, with the bytes
    an error                               what is good of it into the state, then Failed to every waiter

The state is always written before a waiter is told, because the waiter looks there. A flight is out of its
table before a waiter is told, because the waiter may ask again at once.

Concurrency: the main loop only.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from functools import partial

import trio

from snapshotter.errors import SnapshotterError, SpanInflateError
from snapshotter.events import Kind
from snapshotter.fetch import pipeline
from snapshotter.fetch.context import Context
from snapshotter.fetch.counters import count_wait
from snapshotter.fetch.flight import Flight, Stage
from snapshotter.fetch.layerstate import ActiveLayer
from snapshotter.fetch.pipeline import Outcome
from snapshotter.fetch.readers import Reader
from snapshotter.fetch.schedule import Priority
from snapshotter.fetch.space import ROUNDING, Space
from snapshotter.layer.spans import SpanState
from snapshotter.layer.wire import Failed, Lent, Ready

log = logging.getLogger(__name__)

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_STORED = frozenset({SpanState.FETCHED, SpanState.INFLATED})


class Landing:
    """Brings flights to their end.

    `on_change` is called after each step, with the layer; `on_failure` before the waiters of a flight are told that
    it failed.
    """

    def __init__(
        self,
        context: Context,
        space: Space,
        on_change: Callable[[ActiveLayer], None],
        on_failure: Callable[[ActiveLayer, Exception], None],
    ) -> None:
        self._context = context
        self._space = space
        self._on_change = on_change
        self._on_failure = on_failure
        self._disk_full = False
        self._explained: Exception | None = None
        """The last error; one that fails many spans shows its stack once."""

    def stored(self, layer: ActiveLayer, flight: Flight[Reader], outcome: Outcome) -> None:
        """A worker has done what it could with the flight's span."""
        self._write_state(layer, flight.span, outcome)
        if outcome.refused is not None:
            self._refused(layer, flight.span, outcome.refused)
        elif outcome.state >= flight.goal:
            self._disk_full = False
        if outcome.error is not None:
            self.failed(layer, flight, outcome.error)
            return
        if outcome.lent >= 0:
            self._lent(layer, flight, outcome.lent)
        else:
            self.resume(layer, flight)
        self._on_change(layer)

    def resume(self, layer: ActiveLayer, flight: Flight[Reader]) -> None:
        """A worker is done with the flight's span, whose state says how far it is: land, or go on."""
        state = layer.state(flight.span)
        if state >= flight.goal and state is not SpanState.SUSPECT:
            self._landed(layer, flight)
        elif state is SpanState.FETCHED:
            self.work_on(layer, flight)
        elif flight.waiters:
            self.queue(layer, flight)
        else:
            self.abandon(layer, flight)

    def failed(self, layer: ActiveLayer, flight: Flight[Reader], error: Exception) -> None:
        """The span cannot be had for now: its waiters are told, and the background may try it later."""
        waiters = self._end(layer, flight)
        self._report(layer, flight.span, error, len(waiters))
        self._on_failure(layer, error)
        now = trio.current_time()
        for reader, since in waiters.items():
            self._context.events.add(Kind.WAIT_FAILED, layer.digest, now - since, flight.span)
            reader.send(Failed(flight.span, errno.EIO))
        self._on_change(layer)

    def expired(self, layer: ActiveLayer, flight: Flight[Reader], reader: Reader) -> None:
        """One waiter's time is up. A flight that is not under way ends with its last waiter."""
        since = flight.waiters.pop(reader, trio.current_time())
        self._context.events.add(Kind.WAIT_FAILED, layer.digest, trio.current_time() - since, flight.span)
        self._context.counters.add("budget_exceeded")
        self._context.counters.add("failures")
        log.warning(
            "span not fetched within the budget of a read", extra={"layer": layer.digest, "span": flight.span}
        )
        if not flight.waiters and flight.stage in (Stage.QUEUED, Stage.PAUSED):
            self.abandon(layer, flight)
        reader.send(Failed(flight.span, errno.EIO))

    def abandon(self, layer: ActiveLayer, flight: Flight[Reader]) -> None:
        """Nobody waits for a flight that is not under way: it ends, and the background has its span again."""
        self._end(layer, flight)

    def queue(self, layer: ActiveLayer, flight: Flight[Reader]) -> None:
        """Put the flight's span into the schedule, as urgent as its waiters make it."""
        flight.stage = Stage.QUEUED
        priority = Priority.ON_DEMAND if flight.waiters else Priority.AHEAD
        self._context.schedule.want(layer.digest, flight.span, priority)

    def work_on(self, layer: ActiveLayer, flight: Flight[Reader]) -> None:
        """Let a worker inflate a span that is fetched, or hash one that is stored but in doubt."""
        files, span = layer.files, flight.span
        admitted = 0
        if layer.state(span) is SpanState.FETCHED:
            where = files.span(span)
            admitted = 0 if files.shared else where.uncompressed_end - where.uncompressed_start + ROUNDING
            keep = self._space.admit(admitted)
            admitted *= keep
            task = partial(pipeline.inflate, files, span, keep=keep)
        else:
            task = partial(pipeline.check, files, span, files.states.checksum(span))
            self._context.counters.add("spans_checked")
        flight.stage = Stage.LOCAL
        layer.pin()
        self._context.workers.submit(
            Priority.ON_DEMAND if flight.waiters else Priority.BACKGROUND,
            task,
            partial(self._worked, layer, flight, admitted),
        )

    def evict(self, layer: ActiveLayer, span: int, *, blob: bool) -> None:
        """Say that `span` is not in `data` any more, or not even in `blob`, before its bytes go."""
        if blob:
            self.drop(layer, span)
        else:
            self._count_bytes(layer, span, inflated=-1)
            layer.files.states.evict_data(span)

    def drop(self, layer: ActiveLayer, span: int) -> None:
        """Trust nothing that is stored of `span`."""
        states = layer.files.states
        before = states.state(span)
        if before is SpanState.MISSING:
            return
        self._count_bytes(layer, span, fetched=-1, inflated=-1 if states.checksum(span) else 0)
        layer.absent += before in _STORED
        states.set_missing(span)

    def _worked(
        self, layer: ActiveLayer, flight: Flight[Reader], admitted: int, outcome: Outcome | Exception
    ) -> None:
        self._context.rest.disturb()
        self._space.settle(admitted)
        if not layer.closed:
            if isinstance(outcome, Outcome):
                self.stored(layer, flight, outcome)
            else:
                self.failed(layer, flight, outcome)
        elif isinstance(outcome, Outcome):
            outcome.close()
        layer.unpin()

    def _lent(self, layer: ActiveLayer, flight: Flight[Reader], fd: int) -> None:
        """The disk has not taken the span: its waiters get the bytes themselves."""
        now = trio.current_time()
        waiters = self._end(layer, flight)
        if waiters:
            self._context.counters.add("spans_lent")
        for reader, since in waiters.items():
            self._waited(layer, flight.span, now - since)
            reader.send(Lent(flight.span), fd)
        os.close(fd)

    def _waited(self, layer: ActiveLayer, span: int, seconds: float) -> None:
        count_wait(self._context.counters, seconds)
        self._context.events.add(Kind.WAIT, layer.digest, seconds, span)

    def _landed(self, layer: ActiveLayer, flight: Flight[Reader]) -> None:
        now = trio.current_time()
        for reader, since in self._end(layer, flight).items():
            self._waited(layer, flight.span, now - since)
            reader.send(Ready(flight.span, flight.span + 1))

    def _end(self, layer: ActiveLayer, flight: Flight[Reader]) -> dict[Reader, float]:
        """Take the flight out of everything; the background comes back to what it left undone."""
        waiters = layer.flights.end(flight)
        schedule = self._context.schedule
        schedule.discard(layer.digest, flight.span)
        hopeless = layer.wrong[flight.span] >= self._context.options.span_tries
        if layer.wants_background and not hopeless and layer.state(flight.span) is SpanState.MISSING:
            schedule.want(layer.digest, flight.span, Priority.BACKGROUND)
        return waiters

    def _write_state(self, layer: ActiveLayer, span: int, outcome: Outcome) -> None:
        """Move the span's state to what the outcome says; only this and `drop` do."""
        states, counters = layer.files.states, self._context.counters
        before, after = states.state(span), outcome.state
        claimed = SpanState.INFLATED if states.checksum(span) else min(before, SpanState.FETCHED)
        if after < claimed:
            counters.add("spans_damaged")
        if after is SpanState.MISSING:
            self.drop(layer, span)
            return
        layer.absent -= before not in _STORED
        if before is SpanState.MISSING:
            counters.add("spans_fetched")
            self._count_bytes(layer, span, fetched=1)
        if after is SpanState.FETCHED:
            if before is SpanState.INFLATED:
                states.evict_data(span)
            elif before is not SpanState.FETCHED:
                states.set_fetched(span)
        elif before is not SpanState.INFLATED:
            if before is SpanState.MISSING:
                states.set_fetched(span)
            states.set_inflated(span, outcome.checksum)
        if after is SpanState.INFLATED and claimed is not SpanState.INFLATED:
            counters.add("spans_inflated")
        self._count_bytes(
            layer, span, inflated=(after is SpanState.INFLATED) - (claimed is SpanState.INFLATED)
        )

    def _count_bytes(self, layer: ActiveLayer, span: int, *, fetched: int = 0, inflated: int = 0) -> None:
        states = layer.files.states
        if fetched:
            states.set_fetched_bytes(max(states.fetched_bytes + fetched * layer.files.sizes[span], 0))
        if inflated:
            where = layer.files.span(span)
            size = where.uncompressed_end - where.uncompressed_start
            states.set_inflated_bytes(max(states.inflated_bytes + inflated * size, 0))

    def _refused(self, layer: ActiveLayer, span: int, error: OSError) -> None:
        """The disk has not taken bytes; said once, until something could be written again."""
        if error.errno in _FULL:
            self._context.counters.add("disk_full")
        if not self._disk_full:
            self._disk_full = True
            log.warning(
                "the disk takes nothing: reads are served from memory",
                extra={"layer": layer.digest, "span": span, "reason": str(error)},
            )
        self._space.refused()
        self._on_failure(layer, error)

    def _report(self, layer: ActiveLayer, span: int, error: Exception, waiters: int) -> None:
        counters = self._context.counters
        if waiters:
            counters.add("failures")
        if isinstance(error, SpanInflateError):
            counters.add("inflate_errors")
        expected = isinstance(error, SnapshotterError | OSError)
        explained = expected or error is self._explained
        self._explained = error
        log.log(
            logging.WARNING if expected else logging.ERROR,
            "span cannot be had",
            extra={"layer": layer.digest, "span": span, "reason": str(error), "kind": type(error).__name__},
            exc_info=None if explained else error,
        )
