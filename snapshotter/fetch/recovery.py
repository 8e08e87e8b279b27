"""What becomes of a span that did not come: again, later, from elsewhere, or not at all.

    temporary error        again after a while, for as long as the budget of a read lasts
    credentials refused    again when the daemon has found out anew where the blob is
    wrong digest           again, a few times: something between the registry and us may have been at fault
    any of these           at once, from the next host, when the bytes came, or did not come, from a mirror
    anything else          its readers are told

All that is for spans that a reader waits for. What nobody waits for is given up, the background gets it back,
and the layer's background rests: shortly after a temporary error, longer after another, longer each time.

Concurrency: the main loop only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import trio

from snapshotter.errors import AuthenticationFailed, RangeNotHonoured, RegistryError, SpanDigestMismatch
from snapshotter.fetch import control
from snapshotter.fetch.context import Context
from snapshotter.fetch.flight import Flight, Stage
from snapshotter.fetch.landing import Landing
from snapshotter.fetch.layerstate import ActiveLayer
from snapshotter.fetch.readers import Reader
from snapshotter.fetch.sources import Sources
from snapshotter.fetch.transfer import Transfer

log = logging.getLogger(__name__)

MAX_REST = 3600.0
"""The longest rest of a background that keeps failing, seconds."""


class Recovery:
    """Deals with failed transfers and wrong bytes. `pump` is called when something may be started again."""

    def __init__(
        self, context: Context, sources: Sources, landing: Landing, pump: Callable[[], None]
    ) -> None:
        self._context = context
        self._sources = sources
        self._landing = landing
        self._pump = pump

    def transfer_failed(self, transfer: Transfer, missed: list[Flight[Reader]], error: Exception) -> None:
        """`transfer` has failed; the spans of the flights `missed` have not come with it."""
        layer = transfer.layer
        log.info(
            "range request failed",
            extra={
                "layer": layer.digest,
                "first": transfer.flights[0].span,
                "count": len(transfer.flights),
                "reason": str(error),
                "kind": type(error).__name__,
            },
        )
        if isinstance(error, RangeNotHonoured):
            self._context.counters.add("range_not_honoured")
        is_over = self._pass_over(transfer, error)
        if isinstance(error, AuthenticationFailed) and not is_over:
            self._sources.refused(layer, transfer.generation)
        for flight in missed:
            flight.stage = Stage.PAUSED
            if is_over and flight.waiters:
                self._context.counters.add("retries")
                self._landing.queue(layer, flight)
            else:
                self._recover(layer, flight, error)
        if transfer.background and not is_over:
            self.rest(layer, error)

    def _pass_over(self, transfer: Transfer, error: Exception) -> bool:
        """Have another source found if a mirror's has failed; return whether it was a mirror's.

        A mirror is let off once when all that it says is that a signature or a token is over.
        """
        mirror = transfer.mirror
        if not mirror or not isinstance(error, RegistryError | SpanDigestMismatch):
            return False
        state = transfer.layer.source
        if isinstance(error, AuthenticationFailed) and state.expired != transfer.generation - 1:
            state.expired = transfer.generation
            return False
        complaint = control.LIED if isinstance(error, SpanDigestMismatch) else control.FAILED
        self._sources.passed_over(transfer.layer, transfer.generation, mirror, complaint)
        return True

    def mismatched(self, transfer: Transfer, flight: Flight[Reader], error: SpanDigestMismatch) -> None:
        """The bytes that came for `flight` are not the span's."""
        layer = transfer.layer
        self._context.counters.add("digest_mismatches")
        flight.stage = Stage.PAUSED
        if self._pass_over(transfer, error):
            if flight.waiters:
                self._context.counters.add("retries")
                self._landing.queue(layer, flight)
            else:
                self._landing.abandon(layer, flight)
            return
        flight.mismatches += 1
        layer.wrong[flight.span] += 1
        if flight.mismatches < self._context.options.span_tries and flight.waiters:
            self._context.counters.add("retries")
            log.info("span with a wrong digest", extra={"layer": layer.digest, "span": flight.span})
            self._landing.queue(layer, flight)
        else:
            self._landing.failed(layer, flight, error)

    def rest(self, layer: ActiveLayer, error: Exception) -> None:
        """Leave the layer's background alone for a while, longer each time; nothing happens while it rests."""
        if layer.rest_until > trio.current_time():
            return
        layer.rests += 1
        delay: float | None = None
        if isinstance(error, AuthenticationFailed) and layer.rests <= self._context.options.source_renewals:
            delay = 0.0
        elif isinstance(error, RegistryError):
            delay = self._context.policy.delay(layer.rests, error)
        if delay is None:
            doublings = min(max(layer.rests - self._context.policy.attempts, 0), 16)
            delay = min(self._context.options.background_pause_s * 2.0**doublings, MAX_REST)
        layer.rest_until = trio.current_time() + delay
        self._context.timers.at(layer.rest_until, self._pump)

    def _recover(self, layer: ActiveLayer, flight: Flight[Reader], error: Exception) -> None:
        if not flight.waiters:
            self._landing.abandon(layer, flight)
        elif (
            isinstance(error, AuthenticationFailed)
            and flight.renewals < self._context.options.source_renewals
        ):
            flight.renewals += 1
            self._context.counters.add("retries")
            self._landing.queue(layer, flight)
        else:
            delay = None
            if isinstance(error, RegistryError):
                policy = self._context.policy
                flight.attempts = min(flight.attempts + 1, policy.attempts - 1)
                delay = policy.delay(flight.attempts, error)
            if delay is None:
                self._landing.failed(layer, flight, error)
                return
            self._context.counters.add("retries")
            self._context.timers.after(delay, partial(self._resume, layer, flight))

    def _resume(self, layer: ActiveLayer, flight: Flight[Reader]) -> None:
        if layer.closed or flight.stage is not Stage.PAUSED or not layer.flights.holds(flight):
            return
        if flight.waiters:
            self._landing.queue(layer, flight)
            self._pump()
        else:
            self._landing.abandon(layer, flight)
