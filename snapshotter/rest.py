"""A process at rest: when it had nothing to do for a while, it gives back the memory that it worked with.

A pull leaves zTOCs, replies and frames in cycles that no collector looks at as long as nothing else is made, and
inflating leaves a heap with holes: 30 MB each, for as long as the host is idle.

Concurrency: trio; one task. `disturb` is for the loop's thread, and costs it next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from snapshotter import heap

QUIET_SECONDS = 5.0
"""A pull asks for its next layer sooner than this, and a program that starts for its next span."""


class Rest:
    """Knows when the process has nothing to do."""

    def __init__(self) -> None:
        self._disturbed = trio.Event()
        self._last = 0.0

    def disturb(self) -> None:
        """Say that something was asked for, or has been done."""
        self._last = trio.current_time()
        self._disturbed.set()

    async def run(self, before: Callable[[], object] = lambda: None) -> None:
        """Whenever it has become quiet, call `before` and give memory back; until cancelled."""
        while True:
            await self._disturbed.wait()
            while (left := self._last + QUIET_SECONDS - trio.current_time()) > 0:  # noqa: ASYNC110 - what moves is a time
                await trio.sleep(left)
            self._disturbed = trio.Event()
            before()
            await trio.to_thread.run_sync(heap.give_back)
