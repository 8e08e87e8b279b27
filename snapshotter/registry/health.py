"""Which hosts are asked at the moment: a circuit per host, opened by failures, tried again after a rest.

    closed     everybody may ask
    open       nobody asks until the rest is over; each failure after a rest doubles it
    half open  the rest is over: one caller is let through, and the others wait for what becomes of it

A host that answered with wrong bytes rests longer than one that did not answer: what it says next has to be
fetched whole before it can be known to be wrong again. A host that just does not have something is healthy.

Concurrency: one thread; nothing waits in here. The daemon and the fetcher keep one each.
"""

from __future__ import annotations

import enum
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

FIRST_REST: Final = 1.0
"""Seconds after the first failure. Out of the air, as the next three: longer than the retries of one request,
short enough that a mirror that was just started again is used within the same pull."""
LONGEST_REST: Final = 60.0
LIAR_REST: Final = 60.0
LONGEST_LIAR_REST: Final = 3600.0
PROBE_SECONDS: Final = 15.0
"""How long the one caller of a half open circuit has; then another one is let through."""
MAX_HOSTS: Final = 256
"""Hosts remembered; those not used for longest are forgotten first."""


class Outcome(enum.Enum):
    """What became of a request; the value is the label of a metric."""

    OK = "ok"
    MISSING = "missing"
    """It has no such content: nothing is wrong with the host."""
    REFUSED = "refused"
    """It does not let us in, or does not do what was asked."""
    FAILED = "failed"
    """No connection, no answer in time, or a status that may pass."""
    LIED = "lied"
    """Its bytes do not have their digest."""
    MISCONFIGURED = "misconfigured"
    """It cannot be asked as the configuration says."""


@dataclass(slots=True)
class _Circuit:
    counts: dict[Outcome, int] = field(default_factory=lambda: dict.fromkeys(Outcome, 0))
    failures: int = 0
    """Failures in a row, on which the rest depends."""
    lies: int = 0
    """Never taken back: a host that lied twice lies more often than it answers wrongly by chance."""
    closed_at: float = 0.0
    """The end of the rest; 0 while nothing is wrong."""
    distrusted_until: float = 0.0
    """The end of the rest after a lie, which no success makes shorter: others may have asked for something else."""


@dataclass(frozen=True, slots=True)
class HostStatistics:
    """A host as metrics show it."""

    counts: Mapping[Outcome, int]
    is_resting: bool


class Circuits:
    """The circuits of all hosts. `clock` gives seconds.

    So many failures in a row as `patience` says open a circuit, for `longest_rest` seconds at the most.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        patience: int = 1,
        longest_rest: float = LONGEST_REST,
    ) -> None:
        self._clock = clock
        self._patience = patience
        self._longest_rest = longest_rest
        self._circuits: OrderedDict[str, _Circuit] = OrderedDict()

    def allows(self, host: str) -> bool:
        """Say whether `host` may be asked now. True for a host that rested makes the caller its one probe."""
        circuit = self._circuits.get(host)
        if circuit is None:
            return True
        now = self._clock()
        if now < max(circuit.closed_at, circuit.distrusted_until):
            return False
        if circuit.closed_at:
            circuit.closed_at = now + PROBE_SECONDS
        return True

    def record(self, host: str, outcome: Outcome) -> int:
        """Note what became of a request to `host`; return how many of its failures there are now in a row."""
        circuit = self._circuits.setdefault(host, _Circuit())
        self._circuits.move_to_end(host)
        if len(self._circuits) > MAX_HOSTS:
            self._circuits.popitem(last=False)
        circuit.counts[outcome] += 1
        if outcome in {Outcome.OK, Outcome.MISSING}:
            circuit.failures = 0
            circuit.closed_at = 0.0
            return 0
        circuit.failures += 1
        if outcome is Outcome.LIED:
            rest = min(LIAR_REST * 2.0 ** min(circuit.lies, 16), LONGEST_LIAR_REST)
            circuit.lies += 1
            circuit.distrusted_until = self._clock() + rest
        elif circuit.failures >= self._patience:
            doublings = min(circuit.failures - self._patience, 16)
            rest = min(FIRST_REST * 2.0**doublings, self._longest_rest)
            circuit.closed_at = self._clock() + rest
        return circuit.failures

    def rest_left(self, host: str) -> float:
        """Return the seconds until `host` may be asked again; 0 if that is now."""
        circuit = self._circuits.get(host)
        if circuit is None:
            return 0.0
        return max(max(circuit.closed_at, circuit.distrusted_until) - self._clock(), 0.0)

    def statistics(self) -> dict[str, HostStatistics]:
        """Return what is known, by host."""
        now = self._clock()
        return {
            host: HostStatistics(dict(circuit.counts), now < max(circuit.closed_at, circuit.distrusted_until))
            for host, circuit in list(self._circuits.items())
        }
