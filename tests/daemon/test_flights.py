"""One flight per key, whoever leaves meanwhile."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from snapshotter.daemon.flights import Flights
from snapshotter.errors import NoIndex, ProcessFailed
from tests.support.background import background


class Maker:
    """Makes numbered things, when it is told to."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls = 0
        self.go = trio.Event()
        self._error = error

    async def make(self) -> str:
        self.calls += 1
        await self.go.wait()
        if self._error is not None:
            raise self._error
        return f"made {self.calls}"


def flying(test: Callable[[Flights[str], trio.Nursery], Awaitable[None]]) -> None:
    """Run `test` with a table whose flights end with it."""

    async def main() -> None:
        async with background() as nursery:
            await test(Flights(nursery), nursery)

    trio.run(main)


def test_everybody_gets_the_one_result() -> None:
    async def test(flights: Flights[str], nursery: trio.Nursery) -> None:
        maker, got = Maker(), []

        async def join() -> None:
            got.append(await flights.join("key", maker.make))

        async with trio.open_nursery() as waiters:
            for _ in range(3):
                waiters.start_soon(join)
            await trio.testing.wait_all_tasks_blocked()
            maker.go.set()
        assert got == ["made 1"] * 3

    flying(test)


def test_keys_do_not_wait_for_each_other() -> None:
    async def test(flights: Flights[str], nursery: trio.Nursery) -> None:
        slow, quick = Maker(), Maker()
        quick.go.set()
        nursery.start_soon(flights.join, "slow", slow.make)
        await trio.testing.wait_all_tasks_blocked()
        assert await flights.join("quick", quick.make) == "made 1"

    flying(test)


def test_a_result_is_not_kept() -> None:
    async def test(flights: Flights[str], nursery: trio.Nursery) -> None:
        maker = Maker()
        maker.go.set()
        assert [await flights.join("key", maker.make) for _ in range(2)] == ["made 1", "made 2"]

    flying(test)


def test_an_error_reaches_everybody_and_is_not_kept() -> None:
    async def test(flights: Flights[str], nursery: trio.Nursery) -> None:
        failing, working, failures = Maker(NoIndex("none")), Maker(), []

        async def join() -> None:
            with pytest.raises(NoIndex, match="none"):
                await flights.join("key", failing.make)
            failures.append(1)

        async with trio.open_nursery() as waiters:
            waiters.start_soon(join)
            waiters.start_soon(join)
            await trio.testing.wait_all_tasks_blocked()
            failing.go.set()
        assert (len(failures), failing.calls) == (2, 1)
        working.go.set()
        assert await flights.join("key", working.make) == "made 1"

    flying(test)


def test_the_first_who_leaves_takes_nothing_away() -> None:
    async def test(flights: Flights[str], nursery: trio.Nursery) -> None:
        maker, got = Maker(), []

        async def join() -> None:
            got.append(await flights.join("key", maker.make))

        async with trio.open_nursery() as first:
            first.start_soon(join)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(join)
            await trio.testing.wait_all_tasks_blocked()
            first.cancel_scope.cancel()
        maker.go.set()
        await trio.testing.wait_all_tasks_blocked()
        assert (got, maker.calls) == (["made 1"], 1)

    flying(test)


def test_the_end_of_the_daemon_is_an_error_for_those_who_outlive_it() -> None:
    async def main() -> None:
        maker, caught = Maker(), []

        async def outside(flights: Flights[str]) -> None:
            with pytest.raises(ProcessFailed, match="is ending") as info:
                await flights.join("key", maker.make)
            caught.append(info)

        async with trio.open_nursery() as grpc, trio.open_nursery() as daemon:
            grpc.start_soon(outside, Flights(daemon))
            await trio.testing.wait_all_tasks_blocked()
            daemon.cancel_scope.cancel()
        assert len(caught) == 1

    trio.run(main)
