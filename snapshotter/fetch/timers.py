"""Calls at a later time, all from one task of the main loop.

A timer here costs a heap entry and no task. Cancelling is the callee's affair: a call that has become
pointless finds that out by itself.

Concurrency: the main loop only.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count

import trio


class Timers:
    """Pending calls by the time at which they are due."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._changed = trio.Event()

    def __len__(self) -> int:
        return len(self._heap)

    def at(self, when: float, call: Callable[[], None]) -> None:
        """Call `call` on the main loop at `when` (trio's clock) or as soon as possible afterwards."""
        heapq.heappush(self._heap, (when, next(self._order), call))
        if self._heap[0][0] == when:
            self._changed.set()

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Call `call` in `seconds`."""
        self.at(trio.current_time() + seconds, call)

    async def run(self) -> None:
        """Make the calls, for ever."""
        while True:
            self._changed = trio.Event()
            until = self._heap[0][0] if self._heap else float("inf")
            with trio.move_on_at(until):
                await self._changed.wait()
            while self._heap and self._heap[0][0] <= trio.current_time():
                heapq.heappop(self._heap)[2]()
