"""Which blob hosts can be reached: a circuit for each, and no more requests to one at once than it may have.

A host that fails some times in a row is left alone for a while; then one request finds out whether it is back,
and the others wait for that. So a dead registry costs its own layers their time and no other layer anything:
it holds no threads, and no memory.

Concurrency: the main loop only.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from snapshotter.errors import RegistryError
from snapshotter.fetch.context import Context
from snapshotter.registry.health import Circuits, Outcome

PATIENCE = 3
"""Failures in a row that open a circuit: one connection that breaks says nothing."""

LONGEST_REST = 5.0
"""Seconds between two tries of a host that stays away: what a reader waits at most when it is back."""


class Hosts:
    """The circuits of the fetcher. `pump` is called when a host may be asked again."""

    def __init__(self, context: Context, pump: Callable[[], None]) -> None:
        self._context = context
        self._pump = pump
        self._circuits = Circuits(clock=trio.current_time, patience=PATIENCE, longest_rest=LONGEST_REST)
        self._timers: dict[str, float] = {}

    def allows(self, host: str) -> bool:
        """Say whether `host` may be asked now; yes after a rest means that the caller has to."""
        if self._circuits.allows(host):
            return True
        when = trio.current_time() + self._circuits.rest_left(host)
        if self._timers.get(host, 0.0) < trio.current_time():
            self._timers[host] = when
            self._context.timers.at(when, self._pump)
        return False

    def is_away(self, host: str) -> bool:
        """Say whether `host` is left alone at the moment."""
        return self._circuits.rest_left(host) > 0

    def answered(self, host: str) -> None:
        """`host` has sent bytes, or a definite no."""
        self._circuits.record(host, Outcome.OK)
        self._timers.pop(host, None)
        self._set_gauge()

    def failed(self, host: str, error: Exception) -> None:
        """A request to `host` has failed."""
        if isinstance(error, RegistryError) and not error.temporary:
            self.answered(host)
            return
        if self._circuits.record(host, Outcome.FAILED) == PATIENCE:
            self._context.counters.add("circuits_opened")
        self._set_gauge()

    def _set_gauge(self) -> None:
        resting = sum(one.is_resting for one in self._circuits.statistics().values())
        self._context.counters.set("hosts_away", resting)
