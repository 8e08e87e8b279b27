"""Calls at a later time, on trio's clock for tests."""

from __future__ import annotations

import trio
import trio.testing

from snapshotter.fetch.timers import Timers


def test_calls_are_made_when_due_and_in_order() -> None:
    async def main() -> None:
        timers = Timers()
        calls: list[tuple[str, float]] = []
        start = trio.current_time()

        def call(name: str) -> None:
            calls.append((name, trio.current_time() - start))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(timers.run)
            timers.after(20.0, lambda: call("late"))
            timers.after(5.0, lambda: call("early"))
            await trio.sleep(1.0)
            timers.after(1.0, lambda: call("sooner than all"))
            timers.at(trio.current_time() - 1.0, lambda: call("past"))
            await trio.sleep(30.0)
            assert len(timers) == 0
            nursery.cancel_scope.cancel()
        assert [name for name, _ in calls] == ["past", "sooner than all", "early", "late"]
        assert [round(when, 3) for _, when in calls] == [1.0, 2.0, 5.0, 20.0]

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_call_may_arrange_the_next_one() -> None:
    async def main() -> None:
        timers = Timers()
        ticks: list[float] = []

        def tick() -> None:
            ticks.append(trio.current_time())
            timers.after(10.0, tick)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(timers.run)
            timers.after(10.0, tick)
            await trio.sleep(35.0)
            nursery.cancel_scope.cancel()
        assert len(ticks) == 3

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
