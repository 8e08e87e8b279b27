"""Reads that wait too long: counted and said while they wait."""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Iterator

import pytest
import trio
import trio.testing

from snapshotter.counters import CounterPage
from snapshotter.fuse.counters import NAMES
from snapshotter.fuse.waits import Awaited, Waits
from tests.conftest import ExpectedLogs
from tests.support.background import background


@pytest.fixture
def page() -> Iterator[CounterPage]:
    fd = CounterPage.create("counters", NAMES)
    counters = CounterPage(fd, NAMES, writable=True)
    yield counters
    counters.close()
    os.close(fd)


def awaited(name: str = "d/file") -> Awaited:
    return Awaited(range(3, 5), lambda: name, lambda: "span 3 from the registry")


def watched(page: CounterPage, test: Callable[[Waits], Awaitable[None]]) -> None:
    """Run `test` on virtual time, beside the watch."""

    async def main() -> None:
        waits = Waits("sha256:aa", page)
        async with background() as nursery:
            nursery.start_soon(waits.watch)
            await trio.testing.wait_all_tasks_blocked()
            await test(waits)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def slow(page: CounterPage) -> tuple[int, int, int]:
    counts = page.snapshot()
    return counts["reads_waiting"], counts["slow_reads_1s"], counts["slow_reads_10s"]


def test_a_read_is_counted_while_it_still_waits(
    page: CounterPage, caplog: pytest.LogCaptureFixture, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("a read is slow")
    caplog.set_level(logging.INFO, "snapshotter")

    async def test(waits: Waits) -> None:
        wait = waits.begin(awaited())
        await trio.sleep(0.9)
        assert slow(page) == (1, 0, 0)
        await trio.sleep(0.7)
        assert slow(page) == (1, 1, 0)
        await trio.sleep(10)
        assert slow(page) == (1, 1, 1)
        waits.end(wait)
        assert slow(page) == (0, 1, 1)
        assert page.snapshot()["wait_us"] == 11_600_000

    watched(page, test)
    first, second = caplog.records
    assert (first.levelname, second.levelname) == ("INFO", "WARNING")
    said = vars(second)
    assert {name: said[name] for name in ("layer", "file", "spans", "waits_for")} == {
        "layer": "sha256:aa", "file": "d/file", "spans": "3-5", "waits_for": "span 3 from the registry",
    }  # fmt: skip
    assert said["seconds"] >= 10


def test_one_that_ends_between_two_looks_counts_too(page: CounterPage) -> None:
    async def test(waits: Waits) -> None:
        await trio.sleep(0.1)
        wait = waits.begin(awaited())
        await trio.sleep(1.01)
        waits.end(wait)
        assert slow(page) == (0, 1, 0)
        quick = waits.begin(awaited())
        await trio.sleep(0.99)
        waits.end(quick)
        assert slow(page) == (0, 1, 0)

    watched(page, test)


def test_many_slow_reads_are_few_lines(page: CounterPage, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "snapshotter")

    async def test(waits: Waits) -> None:
        for _round in range(2):
            every = [waits.begin(awaited()) for _ in range(50)]
            await trio.sleep(5)
            for wait in every:
                waits.end(wait)
            await trio.sleep(10)
        assert slow(page) == (0, 100, 0)

    watched(page, test)
    assert [vars(record)["left_out"] for record in caplog.records] == [0, 49]
