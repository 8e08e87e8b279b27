"""One flight per key: whoever wants what is already being fetched waits for it."""

from __future__ import annotations

import copy
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

import trio

from snapshotter.errors import RegistryError

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class _Flight(Generic[Value]):
    def __init__(self) -> None:
        self.landed = trio.Event()
        self.values: list[Value] = []
        self.error: RegistryError | None = None


class Flights(Generic[Key, Value]):
    """Runs at most one fetch per key at a time and gives its value, or its RegistryError, to all who wait.

    Concurrency: one trio thread. A flight is registered before its first checkpoint, so no second one can
    start meanwhile. When the task that flies is cancelled or fails otherwise, one of the waiters takes over.
    """

    def __init__(self) -> None:
        self._flights: dict[Key, _Flight[Value]] = {}

    async def run(self, key: Key, fetch: Callable[[], Awaitable[Value]]) -> Value:
        """Return what `fetch` returns, here or in the task that is at it already. Raises RegistryError."""
        while (flight := self._flights.get(key)) is not None:
            await flight.landed.wait()
            if flight.error is not None:
                # A copy: one exception raised in two tasks would mix their tracebacks.
                raise copy.copy(flight.error)
            if flight.values:
                return flight.values[0]
        flight = self._flights[key] = _Flight()
        try:
            flight.values.append(await fetch())
        except RegistryError as error:
            flight.error = error
            raise
        finally:
            del self._flights[key]
            flight.landed.set()
        return flight.values[0]
