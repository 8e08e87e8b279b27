"""Reads of one layer that wait for spans: how many there are, and which have waited too long.

A read is counted, and said in the log with its layer, file and spans and what it waits for, while it still waits: what
hangs is seen before it has ended. For each step one line in ten seconds at most; it
says how many were left out.

Concurrency: trio; one table, changed by the readers' tasks and by `watch` between two checkpoints.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import trio

from snapshotter.counters import CounterPage

_log = logging.getLogger(__name__)

_STEPS = ((1.0, "slow_reads_1s", logging.INFO), (10.0, "slow_reads_10s", logging.WARNING))
"""Seconds, counter, and how loudly it is said."""

_LOOK_S = 0.5
_LINE_S = 10.0


class Awaited(NamedTuple):
    """What a read waits for."""

    spans: range
    file: Callable[[], str]
    """The path of the file, looked up only when it has to be said."""
    obstacle: Callable[[], str]
    """What has to happen first."""

    def fields(self) -> dict[str, object]:
        """Return what a log line says of it."""
        return {
            "file": self.file(),
            "spans": f"{self.spans.start}-{self.spans.stop}",
            "waits_for": self.obstacle(),
        }


class Wait:
    """One read that waits."""

    __slots__ = ("awaited", "began", "steps")

    def __init__(self, awaited: Awaited) -> None:
        self.awaited = awaited
        self.began = trio.current_time()
        self.steps = 0


class Waits:
    """The reads that wait at the moment."""

    def __init__(self, layer: str, counters: CounterPage) -> None:
        self._layer = layer
        self._counters = counters
        self._waits: set[Wait] = set()
        self._some = trio.Event()
        self._next_line = [0.0] * len(_STEPS)
        self._left_out = [0] * len(_STEPS)

    def __len__(self) -> int:
        return len(self._waits)

    def begin(self, awaited: Awaited) -> Wait:
        """Note that a read begins to wait; return what to give to `end`."""
        wait = Wait(awaited)
        self._waits.add(wait)
        self._counters.add("reads_waiting")
        self._some.set()
        return wait

    def end(self, wait: Wait) -> None:
        """Note that it waits no more."""
        self._waits.discard(wait)
        self._counters.add("reads_waiting", -1)
        self._counters.add("wait_us", int((trio.current_time() - wait.began) * 1e6))
        self._look_at(wait)

    async def watch(self) -> None:
        """Look at the waiting reads twice a second, as long as there are any; for ever."""
        while True:
            await self._some.wait()
            self._some = trio.Event()
            while self._waits:
                await trio.sleep(_LOOK_S)
                for wait in self._waits:
                    self._look_at(wait)

    def _look_at(self, wait: Wait) -> None:
        waited = trio.current_time() - wait.began
        while wait.steps < len(_STEPS) and waited >= _STEPS[wait.steps][0]:
            self._counters.add(_STEPS[wait.steps][1])
            self._say(wait, waited, wait.steps)
            wait.steps += 1

    def _say(self, wait: Wait, waited: float, step: int) -> None:
        now = trio.current_time()
        if now < self._next_line[step]:
            self._left_out[step] += 1
            return
        fields = {"layer": self._layer, **wait.awaited.fields(), "seconds": round(waited, 1)}
        _log.log(_STEPS[step][2], "a read is slow", extra=fields | {"left_out": self._left_out[step]})
        self._next_line[step], self._left_out[step] = now + _LINE_S, 0
