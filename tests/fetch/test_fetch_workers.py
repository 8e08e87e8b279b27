"""Threads that work off a queue by priority."""

from __future__ import annotations

import threading
from functools import partial

import trio

from snapshotter.fetch.workers import WorkerPool


def test_results_and_errors_come_back_on_the_main_loop() -> None:
    async def main() -> None:
        pool = WorkerPool("test", 2, trio.lowlevel.current_trio_token())
        main_thread, finished = threading.get_ident(), trio.Event()
        outcomes: list[object] = []
        threads: list[int] = []

        def task() -> int:
            threads.append(threading.get_ident())
            return 7

        def done(outcome: int | Exception) -> None:
            assert threading.get_ident() == main_thread
            outcomes.append(outcome)
            if len(outcomes) == 2:
                finished.set()

        def broken() -> int:
            raise OSError("no")

        pool.submit(0, task, done)
        pool.submit(0, broken, done)
        with trio.fail_after(60):
            await finished.wait()
        assert main_thread not in threads
        assert sorted(type(outcome).__name__ for outcome in outcomes) == ["OSError", "int"]

    trio.run(main)


def test_what_is_urgent_overtakes_what_waits() -> None:
    async def main() -> None:
        pool = WorkerPool("test", 1, trio.lowlevel.current_trio_token())
        gate, finished = threading.Event(), trio.Event()
        order: list[str] = []

        def done(name: object) -> None:
            order.append(str(name))
            if len(order) == 4:
                finished.set()

        def first() -> str:
            gate.wait(60)
            return "first"

        pool.submit(2, first, done)
        for name, priority in (("background", 2), ("ahead", 1), ("reader", 0)):
            pool.submit(priority, partial(str, name), done)
        gate.set()
        with trio.fail_after(60):
            await finished.wait()
        assert order == ["first", "reader", "ahead", "background"]

    trio.run(main)


def test_no_more_threads_than_asked_for_and_none_before_they_are_needed() -> None:
    async def main() -> None:
        pool = WorkerPool("counted", 3, trio.lowlevel.current_trio_token())

        def alive() -> int:
            return sum(thread.name == "counted" for thread in threading.enumerate())

        assert alive() == 0
        finished = trio.Event()
        outcomes: list[object] = []
        gate = threading.Event()

        def done(outcome: object) -> None:
            outcomes.append(outcome)
            if len(outcomes) == 20:
                finished.set()

        for _ in range(20):
            pool.submit(0, lambda: gate.wait(60), done)
        assert alive() == 3
        gate.set()
        with trio.fail_after(60):
            await finished.wait()
        pool.submit(0, lambda: True, done)
        assert alive() == 3, "an idle thread is used before a new one is started"

    trio.run(main)
