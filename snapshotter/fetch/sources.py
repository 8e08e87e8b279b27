"""Where the blobs are: asks the daemon, once per layer at a time, and again when a host refuses the answer.

The fetcher has no credentials and follows no redirects: the daemon does, and hands out a URL that is good
until its host says 401 or 403, or, when a mirror gave it, until it fails or lies: then there is somebody else to
ask, and the daemon knows whom. While a layer has no source its spans stay in the schedule; their readers'
budgets go on running; as long as there are some, a question that may yet be answered is asked again and again.

Concurrency: the main loop only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from snapshotter.errors import RegistryError, RegistryRefused, RegistryUnavailable
from snapshotter.fetch import control
from snapshotter.fetch.context import Context
from snapshotter.fetch.hosts import PATIENCE
from snapshotter.fetch.layerstate import ActiveLayer
from snapshotter.registry.source import BlobSource

log = logging.getLogger(__name__)


class Sources:
    """The sources of all open layers.

    `on_change` is called when one has come or may be asked for again, `on_failure` when a layer cannot have one
    for now.
    """

    def __init__(
        self,
        context: Context,
        on_change: Callable[[], None],
        on_failure: Callable[[ActiveLayer, RegistryError], None],
    ) -> None:
        self._context = context
        self._on_change = on_change
        self._on_failure = on_failure

    def usable(self, layer: ActiveLayer) -> BlobSource | None:
        """Return the layer's source; without one, ask for it unless that has been done."""
        if layer.source.source is None and trio.current_time() >= layer.source.not_before:
            self._ask(layer, renew=False)
        return layer.source.source

    def refused(self, layer: ActiveLayer, generation: int) -> None:
        """The host refused the source of `generation`; if that is still the current one, ask for another."""
        if generation == layer.source.generation and layer.source.source is not None:
            layer.source.source = None
            self._context.counters.add("source_renewals")
            self._ask(layer, renew=True)

    def passed_over(self, layer: ActiveLayer, generation: int, mirror: str, complaint: str) -> None:
        """The source of `generation` came from `mirror` and did not do; if it is the current one, ask for another."""
        if generation == layer.source.generation and layer.source.source is not None:
            layer.source.source = None
            self._context.counters.add("mirrors_passed_over")
            layer.source.asked = True
            self._context.tell_daemon(control.NeedSource(layer.digest, True, mirror, complaint))

    def arrived(self, layer: ActiveLayer, source: BlobSource) -> None:
        """The daemon says where the blob is."""
        state = layer.source
        state.source = source
        state.generation += 1
        state.asked = False
        state.failures = 0
        self._on_change()

    def failed(self, layer: ActiveLayer, error: str, *, temporary: bool) -> None:
        """The daemon says that it could not find out."""
        state = layer.source
        state.asked = False
        state.failures += 1
        self._context.counters.add("source_errors")
        problem = RegistryUnavailable(error) if temporary else RegistryRefused(error)
        policy = self._context.policy
        delay = policy.delay(min(state.failures, policy.attempts - 1), problem)
        if delay is None or (state.failures >= policy.attempts and not self._is_awaited(layer)):
            log.warning("no source for layer", extra={"layer": layer.digest, "reason": error})
            state.failures = 0
            self._on_failure(layer, problem)
            return
        state.not_before = trio.current_time() + delay
        self._context.timers.at(state.not_before, self._on_change)

    def is_away(self, layer: ActiveLayer) -> bool:
        """Say whether it could not be found out for a while where the blob is."""
        return layer.source.source is None and layer.source.failures >= PATIENCE

    def _is_awaited(self, layer: ActiveLayer) -> bool:
        return any(flight.waiters for flight in layer.flights)

    def _ask(self, layer: ActiveLayer, *, renew: bool) -> None:
        if not layer.source.asked:
            layer.source.asked = True
            self._context.tell_daemon(control.NeedSource(layer.digest, renew))
