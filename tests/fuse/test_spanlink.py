"""A server's side of its socket to the fetcher: nobody waits for nothing, and nothing is lost."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from snapshotter.layer import wire
from tests.conftest import ExpectedLogs
from tests.support.background import background
from tests.support.lazylayer import LazyLayer, make_layer, make_tar
from tests.support.serving import Fetcher, Serving

TAR = make_tar({f"f{number}": os.urandom(100_000) for number in range(4)})


@pytest.fixture
def layer(tmp_path: Path) -> LazyLayer:
    return make_layer(tmp_path, TAR, span_size=1 << 15, inflated=False)


def with_link(layer: LazyLayer, test: Callable[[Serving], Awaitable[None]], budget: float = 10.0) -> None:
    """Run `test` beside the link's own task."""

    async def main() -> None:
        with Serving(layer, budget=budget) as parts:
            async with background() as nursery:
                nursery.start_soon(parts.link.run)
                with trio.fail_after(60):
                    await test(parts)

    trio.run(main)


class Waiter:
    """A reader that wants spans."""

    def __init__(self, parts: Serving, first: int, end: int, nursery: trio.Nursery) -> None:
        self.outcome: str | int = "waiting"
        nursery.start_soon(self._wait, parts, range(first, end))

    async def _wait(self, parts: Serving, spans: range) -> None:
        try:
            await parts.link.want(spans, spans.stop, lambda: "file")
        except OSError as error:
            self.outcome = error.errno or 0
        else:
            self.outcome = "there"


async def settled() -> None:
    await trio.testing.wait_all_tasks_blocked(0.01)


def test_a_demand_is_asked_for_and_its_answer_wakes(layer: LazyLayer) -> None:
    async def test(parts: Serving) -> None:
        fetcher = Fetcher(parts)
        await settled()
        async with trio.open_nursery() as nursery:
            waiter = Waiter(parts, 2, 4, nursery)
            assert await fetcher.next() == wire.Want(2, 4, 4)
            await fetcher.deliver(2)
            assert await fetcher.next() == wire.Want(3, 4, 4)
            assert waiter.outcome == "waiting"
            await fetcher.deliver(3)
        assert waiter.outcome == "there"
        assert parts.count("spans_awaited") == 2
        assert parts.count("reads_waiting") == 0
        assert parts.count("wait_us") > 0
        fetcher.close()

    with_link(layer, test)


def test_what_is_there_is_not_asked_for(layer: LazyLayer) -> None:
    async def test(parts: Serving) -> None:
        fetcher = Fetcher(parts)
        for span in (1, 2):
            parts.inflate(span)
        await parts.link.want(range(1, 3), 3, lambda: "file")
        await settled()
        assert not fetcher.pending()
        fetcher.close()

    with_link(layer, test)


def test_all_who_wait_for_a_span_are_woken_by_one_answer(layer: LazyLayer) -> None:
    async def test(parts: Serving) -> None:
        fetcher = Fetcher(parts)
        async with trio.open_nursery() as nursery:
            waiters = [Waiter(parts, 1, 2, nursery) for _ in range(5)]
            await settled()
            await fetcher.deliver(1)
        assert [waiter.outcome for waiter in waiters] == ["there"] * 5
        fetcher.close()

    with_link(layer, test)


def test_an_answer_for_a_range_wakes_all_in_it_and_nobody_else(layer: LazyLayer) -> None:
    async def test(parts: Serving) -> None:
        fetcher = Fetcher(parts)
        async with trio.open_nursery() as nursery:
            waiters = [Waiter(parts, span, span + 1, nursery) for span in range(4)]
            await settled()
            for span in (1, 2):
                parts.inflate(span)
            await fetcher.send(wire.Ready(1, 3))
            await settled()
            assert [waiter.outcome for waiter in waiters] == ["waiting", "there", "there", "waiting"]
            nursery.cancel_scope.cancel()
        fetcher.close()

    with_link(layer, test)


def test_a_failure_is_an_error_for_who_waits_and_not_for_the_next(layer: LazyLayer) -> None:
    async def test(parts: Serving) -> None:
        fetcher = Fetcher(parts)
        async with trio.open_nursery() as nursery:
            waiters = [Waiter(parts, 1, 2, nursery) for _ in range(2)]
            await settled()
            await fetcher.send(wire.Failed(1, errno.ENOSPC))
        assert [waiter.outcome for waiter in waiters] == [errno.ENOSPC] * 2
        async with trio.open_nursery() as nursery:
            later = Waiter(parts, 1, 2, nursery)
            await fetcher.deliver(1)
        assert later.outcome == "there"
        fetcher.close()

    with_link(layer, test)


def test_a_word_that_was_too_early_is_asked_about_again(layer: LazyLayer) -> None:
    """The span file is the truth: somebody evicted it in between."""

    async def test(parts: Serving) -> None:
        fetcher = Fetcher(parts)
        await settled()
        async with trio.open_nursery() as nursery:
            waiter = Waiter(parts, 1, 2, nursery)
            await fetcher.next_want()
            await fetcher.send(wire.Ready(1, 2))
            await fetcher.next_want()
            assert waiter.outcome == "waiting"
            await fetcher.deliver(1)
        assert waiter.outcome == "there"
        fetcher.close()

    with_link(layer, test)


def test_a_budget_ends_the_wait(layer: LazyLayer, expected_logs: ExpectedLogs) -> None:
    expected_logs.allow("read gave up waiting")

    async def test(parts: Serving) -> None:
        fetcher = Fetcher(parts)
        with pytest.raises(OSError, match="did not arrive in time") as info:
            await parts.link.want(range(1, 2), 2, lambda: "file")
        assert info.value.errno == errno.EIO
        assert parts.count("reads_waiting") == 0
        async with trio.open_nursery() as nursery:  # the next read asks afresh
            waiter = Waiter(parts, 1, 2, nursery)
            await settled()
            await fetcher.deliver(1)
        assert waiter.outcome == "there"
        fetcher.close()

    with_link(layer, test, budget=0.2)


def test_one_who_gives_up_takes_nothing_from_the_others(layer: LazyLayer) -> None:
    async def test(parts: Serving) -> None:
        fetcher = Fetcher(parts)
        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as first:
                Waiter(parts, 1, 2, first)
                await settled()
                other = Waiter(parts, 1, 2, nursery)
                await settled()
                first.cancel_scope.cancel()
            await fetcher.deliver(1)
        assert other.outcome == "there"
        fetcher.close()

    with_link(layer, test)


def test_without_a_fetcher_demands_wait_for_one(layer: LazyLayer) -> None:
    async def test(parts: Serving) -> None:
        async with trio.open_nursery() as nursery:
            waiters = [Waiter(parts, span, span + 1, nursery) for span in (3, 1)]
            await settled()
            fetcher = Fetcher(parts)
            assert [await fetcher.next_want() for _ in range(2)] == [wire.Want(1, 2, 2), wire.Want(3, 4, 4)]
            await fetcher.deliver(1, 3)
        assert [waiter.outcome for waiter in waiters] == ["there", "there"]
        fetcher.close()

    with_link(layer, test)


def test_another_fetcher_is_asked_again(layer: LazyLayer) -> None:
    async def test(parts: Serving) -> None:
        first = Fetcher(parts)
        async with trio.open_nursery() as nursery:
            waiter = Waiter(parts, 1, 2, nursery)
            await first.next_want()
            first.close()
            await settled()
            second = Fetcher(parts)
            assert await second.next_want() == wire.Want(1, 2, 2)
            third = Fetcher(parts)  # and another, while the former still lives
            assert await third.next_want() == wire.Want(1, 2, 2)
            await third.deliver(1)
        assert waiter.outcome == "there"
        second.close()
        third.close()

    with_link(layer, test)


def test_a_fetcher_that_does_not_read_blocks_only_who_asks(
    layer: LazyLayer, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("read gave up waiting")

    async def test(parts: Serving) -> None:
        fetcher = Fetcher(parts)
        async with trio.open_nursery() as nursery:
            waiters = [Waiter(parts, 0, 1, nursery) for _ in range(2000)]  # more than the socket holds
            await settled()
            parts.link.touch(range(parts.tree.span_count))  # never waits
        assert {waiter.outcome for waiter in waiters} == {errno.EIO}
        fetcher.close()

    with_link(layer, test, budget=1.0)


def test_first_uses_are_told_once(layer: LazyLayer) -> None:
    async def test(parts: Serving) -> None:
        fetcher = Fetcher(parts)
        for _ in range(2):
            parts.link.touch(range(1, 3))
        assert [await fetcher.next() for _ in range(2)] == [wire.Touch(1), wire.Touch(2)]
        await settled()
        assert not fetcher.pending()
        fetcher.close()

    with_link(layer, test)


def test_a_message_that_no_fetcher_sends_is_said_and_passed_over(
    layer: LazyLayer, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("not an answer")

    async def test(parts: Serving) -> None:
        fetcher = Fetcher(parts)
        async with trio.open_nursery() as nursery:
            waiter = Waiter(parts, 1, 2, nursery)
            await fetcher.next_want()
            await fetcher.send(wire.Touch(1))
            await fetcher.deliver(1)
        assert waiter.outcome == "there"
        fetcher.close()

    with_link(layer, test)


def test_a_socket_that_was_dropped_is_asked_for(layer: LazyLayer) -> None:
    """The fetcher and this server both live on, so nobody else notices."""

    async def test(parts: Serving) -> None:
        fetcher = Fetcher(parts)
        await settled()
        fetcher.close()
        await trio.sleep(0.7)
        assert parts.lost == 0  # nobody waits
        async with trio.open_nursery() as nursery:
            waiter = Waiter(parts, 1, 2, nursery)
            while parts.lost < 2:
                await trio.sleep(0.01)
            assert waiter.outcome == "waiting"
            another = Fetcher(parts)
            assert (await another.next_want()).first == 1
            lost = parts.lost
            await trio.sleep(0.7)
            assert parts.lost == lost
            await another.deliver(1)
        assert waiter.outcome == "there"
        another.close()

    with_link(layer, test)


def test_the_alarm_runs_only_while_somebody_waits(layer: LazyLayer) -> None:
    """It ends a blocking read of a request that was withdrawn; an idle server must not be woken by it."""

    async def test(parts: Serving) -> None:
        fetcher = Fetcher(parts)
        async with trio.open_nursery() as nursery:
            waiters = [Waiter(parts, span, span + 1, nursery) for span in (1, 2)]
            await settled()
            assert signal.getitimer(signal.ITIMER_REAL)[1] > 0
            await fetcher.deliver(1)
            await settled()
            assert signal.getitimer(signal.ITIMER_REAL)[1] > 0
            await fetcher.deliver(2)
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
        assert [waiter.outcome for waiter in waiters] == ["there"] * 2
        fetcher.close()

    with_link(layer, test)
