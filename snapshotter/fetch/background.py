"""Makes layers complete: what is fetched when nobody asks, and the proof of the whole at the end.

    opened          every missing span is queued, in the order of first use that was recorded, then in tar order
    suspect spans   are hashed one at a time, so that a host that has just booted is not busy with that
    all there       when readers are quiet, the blob is hashed once more as a whole, and inflated as a whole: with the
                    layer's digest, and with the content that its spans have, it is verified. What was found is synced
                    to the disk, and the network is never needed for the layer again

Every span having its digest does not prove the whole: the bytes before span 0 have none, a zTOC may have
been made of another blob, and its windows may be wrong. When the whole does not match although every byte has come from the registry, nothing
stored is trusted any more, the layer is not completed again by this process, and readers go on being served
span by span.

Bytes before span 0 that an earlier process stored may be damaged, and no span's digest tells. They are tried
first, which needs no network; if the whole does not match with them, span 0 is fetched again, and they come with it.

Concurrency: the main loop only; the hashing is done by the chore thread.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

import trio

from snapshotter.counters import CounterPage
from snapshotter.fetch import control, pipeline
from snapshotter.fetch.context import Context
from snapshotter.fetch.counters import count_offline
from snapshotter.fetch.flight import Flight
from snapshotter.fetch.landing import Landing
from snapshotter.fetch.layerstate import ActiveLayer
from snapshotter.fetch.readers import Reader
from snapshotter.fetch.schedule import Priority
from snapshotter.layer.spans import SpanState

log = logging.getLogger(__name__)


PATIENT_SECONDS = 5.0
"""A layer that has everything waits no longer than this for readers to be quiet before it is verified: when all of an
image is read, verifying goes on beside that."""


class Pause:
    """Lets readers go first: a pause between two spans while they are asking. For the chore thread."""

    SECONDS = 0.05
    """A few spans' worth of inflating on one core."""

    def __init__(self, counters: CounterPage) -> None:
        self._words = counters.words
        self._index = counters.index("wants")
        self._seen = self._words[self._index]

    def __call__(self) -> None:
        """Wait a little if a reader has asked for something since the last call."""
        if self._words[self._index] != self._seen:
            self._seen = self._words[self._index]
            time.sleep(self.SECONDS)


class Background:
    """Completes the layers that are to become complete; `pump` is called when there is something to fetch."""

    def __init__(self, context: Context, landing: Landing, pump: Callable[[], None]) -> None:
        self._context = context
        self._landing = landing
        self._pump = pump
        self._suspects: deque[tuple[ActiveLayer, Iterator[int]]] = deque()
        self._checking: tuple[ActiveLayer, Flight[Reader]] | None = None

    def start(self, layer: ActiveLayer) -> None:
        """Begin to complete `layer`."""
        states = layer.files.states.states()
        order = layer.trace.order(layer.files.span_count)
        self._context.schedule.want_in_background(
            layer.digest,
            [span for span in order if states[span] == SpanState.MISSING and layer.flights.get(span) is None],
        )
        suspects = [span for span in order if states[span] == SpanState.SUSPECT]
        if suspects:
            self._suspects.append((layer, iter(suspects)))
            self._check_next()
        self.changed(layer)

    def changed(self, layer: ActiveLayer) -> None:
        """A span of `layer` has come, or a check is over: see what can be done now."""
        self._check_next()
        if layer.absent == 0 and not (layer.verifying or layer.mismatched or layer.files.states.verified):
            layer.verifying = True
            layer.pin()
            self._verify_when_quiet(layer, trio.current_time() + PATIENT_SECONDS)

    def _verify_when_quiet(self, layer: ActiveLayer, latest: float) -> None:
        """Verify a layer that has everything. That takes a processor for seconds, so readers go first, but not for ever."""
        quiet_at = min(self._context.link.quiet_at(), latest)
        if layer.closed or layer.absent:
            layer.verifying = False
            layer.unpin()
        elif trio.current_time() < quiet_at:
            self._context.timers.at(quiet_at, partial(self._verify_when_quiet, layer, latest))
        else:
            self._context.chores.submit(
                0,
                partial(pipeline.prove, layer.files, Pause(self._context.counters)),
                partial(self._hashed, layer, layer.evictions),
            )

    def _check_next(self) -> None:
        """Hash the next suspect span, unless one is being hashed."""
        if self._checking is not None:
            layer, flight = self._checking
            if not layer.closed and layer.flights.holds(flight):
                return
            self._checking = None
        while self._suspects:
            layer, spans = self._suspects[0]
            span = None if layer.closed else next(spans, None)
            if span is None:
                self._suspects.popleft()
            elif layer.state(span) is SpanState.SUSPECT and layer.flights.get(span) is None:
                flight = layer.flights.begin(span, SpanState.FETCHED)
                self._checking = layer, flight
                self._landing.work_on(layer, flight)
                return

    def _hashed(self, layer: ActiveLayer, evictions: int, proof: pipeline.Proof | Exception) -> None:
        self._context.rest.disturb()
        layer.verifying = False
        wrong = proof.wrong if isinstance(proof, pipeline.Proof) else proof
        if not layer.closed and layer.evictions == evictions:
            if isinstance(proof, pipeline.Proof) and not wrong:
                self._verified(layer, proof.diff_id)
            elif not layer.header_fresh:
                layer.files.states.set_header_fetched(False)
                self._landing.drop(layer, 0)
                if layer.wants_background and layer.flights.get(0) is None:
                    self._context.schedule.want(layer.digest, 0, Priority.BACKGROUND)
                    self._pump()
            else:
                self._mismatched(layer, wrong)
        layer.unpin()

    def _verified(self, layer: ActiveLayer, diff_id: str) -> None:
        states = layer.files.states
        before = states.offline_after
        states.set_header_fetched(True)
        states.set_complete(True)
        states.set_verified(True)
        if before is None and states.offline_after is not None:
            count_offline(self._context.counters, states.offline_after)
        layer.pin()
        self._context.chores.submit(
            0, partial(pipeline.make_durable, layer.files), partial(self._durable, layer, diff_id)
        )

    def _durable(self, layer: ActiveLayer, diff_id: str, outcome: Exception | None) -> None:
        """The states are on disk too: now the layer is worth a word."""
        if outcome is not None:
            log.warning("span states not synced", extra={"layer": layer.digest, "reason": str(outcome)})
        if not layer.closed and layer.files.states.verified:
            self._context.counters.add("layers_verified")
            seconds = layer.files.states.offline_after
            log.info("layer complete and verified", extra={"layer": layer.digest, "offline_after_s": seconds})
            self._context.tell_daemon(control.Complete(layer.digest, verified=True, diff_id=diff_id))
        layer.unpin()

    def _mismatched(self, layer: ActiveLayer, reason: str | Exception) -> None:
        layer.mismatched = True
        self._context.counters.add("layers_mismatched")
        log.error(
            "complete layer does not have its digest; its zTOC was made of another blob, or the disk is failing",
            extra={"layer": layer.digest, "reason": str(reason)},
        )
        self._context.schedule.stop_background(layer.digest)
        for span in range(layer.files.span_count):
            self._landing.drop(layer, span)
        self._context.tell_daemon(control.Complete(layer.digest, verified=False))
