"""One lock per key, as long as somebody holds or awaits it.

Concurrency: trio, one loop.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager

import trio


class Locks:
    """Locks by key; those that nobody uses take no memory."""

    def __init__(self) -> None:
        self._locks: dict[Hashable, trio.Lock] = {}

    def __len__(self) -> int:
        return len(self._locks)

    @asynccontextmanager
    async def hold(self, key: Hashable) -> AsyncIterator[None]:
        """Hold the lock of `key` meanwhile; the first who asks is the first to get it."""
        lock = self._locks.setdefault(key, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            # A lock that somebody awaits is never free: it is handed over.
            if not lock.locked() and self._locks.get(key) is lock:
                del self._locks[key]
