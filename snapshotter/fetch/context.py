"""What every part of the fetcher shares. Made once by `fetcher.py`; the main loop's alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from snapshotter.counters import CounterPage
from snapshotter.events import EventRing
from snapshotter.fetch import control
from snapshotter.fetch.layerstate import ActiveLayer
from snapshotter.fetch.link import Link
from snapshotter.fetch.options import Options
from snapshotter.fetch.schedule import Schedule
from snapshotter.fetch.timers import Timers
from snapshotter.fetch.workers import WorkerPool
from snapshotter.registry.retry import RetryPolicy
from snapshotter.rest import Rest
from snapshotter.units import Digest


@dataclass(frozen=True, slots=True)
class Context:
    """Limits, counters, clock and hands of one fetcher."""

    options: Options
    counters: CounterPage
    events: EventRing
    tell_daemon: Callable[[control.FromFetcher], None]
    """Sends without waiting."""
    workers: WorkerPool
    """Hash, inflate and write spans."""
    chores: WorkerPool
    """One thread for what nobody waits for: verifying layers, writing traces."""
    link: Link
    policy: RetryPolicy = field(default_factory=RetryPolicy)
    timers: Timers = field(default_factory=Timers)
    rest: Rest = field(default_factory=Rest)
    schedule: Schedule = field(default_factory=Schedule)
    layers: dict[Digest, ActiveLayer] = field(default_factory=dict)
    """Open layers, in the order in which they were opened."""

    @classmethod
    def create(
        cls,
        options: Options,
        counters: CounterPage,
        events: EventRing,
        tell_daemon: Callable[[control.FromFetcher], None],
    ) -> Context:
        """Return a context for the trio run that this is called in."""
        token = trio.lowlevel.current_trio_token()
        return cls(
            options,
            counters,
            events,
            tell_daemon,
            WorkerPool("span", options.worker_count(), token),
            WorkerPool("chore", 1, token),
            Link(
                max_width=options.background_connections,
                max_range=options.range_max_bytes,
                quiet_s=options.background_quiet_s,
            ),
        )
