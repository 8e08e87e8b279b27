"""The daemon at rest: when nothing was asked of it for a while, it gives back the memory that it worked with.

A pull leaves zTOCs, replies and frames in cycles that no collector looks at as long as nothing else is made, and a heap
with holes: 30 MB after an image of 4 layers, for as long as the host is idle.

Concurrency: trio; one task. `disturb` is for the loop's thread.
"""

from __future__ import annotations

import trio

from snapshotter import heap

QUIET_SECONDS = 5.0
"""A pull asks for its next layer sooner than this."""


class Rest:
    """Knows when the daemon has nothing to do."""

    def __init__(self) -> None:
        self._disturbed = trio.Event()

    def disturb(self) -> None:
        """Say that something was asked for, or has been done."""
        self._disturbed.set()

    async def run(self) -> None:
        """Give memory back whenever it has become quiet, until cancelled."""
        while True:
            await self._disturbed.wait()
            while self._disturbed.is_set():
                self._disturbed = trio.Event()
                with trio.move_on_after(QUIET_SECONDS):
                    await self._disturbed.wait()
            await trio.to_thread.run_sync(heap.give_back)
