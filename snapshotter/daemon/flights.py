"""One flight per key: whoever asks for something that is being made waits for that one.

Concurrency: trio, one loop. The flight runs in the nursery that the table was given, so that a caller who
gives up does not take it away from the others; its error reaches every waiter, and is not kept.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

import trio

from snapshotter.errors import ProcessFailed

T = TypeVar("T")


class Flights(Generic[T]):
    """Results under way, by key."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._flights: dict[Hashable, _Flight[T]] = {}

    async def join(self, key: Hashable, make: Callable[[], Awaitable[T]]) -> T:
        """Return what `make` returns, or raise what it raises; one call of `make` at a time for a key.

        Raises ProcessFailed when the nursery is cancelled meanwhile, which is how the daemon ends.
        """
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = _Flight()
            self._nursery.start_soon(self._fly, key, flight, make)
        await flight.done.wait()
        if flight.error is not None:
            raise flight.error
        if not flight.results:
            raise ProcessFailed("given up, because the daemon is ending")
        return flight.results[0]

    async def _fly(self, key: Hashable, flight: _Flight[T], make: Callable[[], Awaitable[T]]) -> None:
        try:
            flight.results.append(await make())
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to those who wait
            flight.error = error
        finally:
            self._flights.pop(key, None)
            flight.done.set()


class _Flight(Generic[T]):
    def __init__(self) -> None:
        self.done = trio.Event()
        self.results: list[T] = []
        self.error: Exception | None = None
