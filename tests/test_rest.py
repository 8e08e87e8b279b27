"""A process gives memory back when it had nothing to do for a while, once each time."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from snapshotter.rest import QUIET_SECONDS, Rest


def test_it_waits_for_quiet_and_does_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    start = trio.testing.MockClock(autojump_threshold=0)

    async def at_once(call: object) -> None:  # in a thread, the clock would jump meanwhile
        given.append(trio.current_time())

    monkeypatch.setattr(trio.to_thread, "run_sync", at_once)

    async def main() -> None:
        began, rest = trio.current_time(), Rest()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rest.run)
            await trio.sleep(100)
            assert given == []
            for _ in range(10):
                rest.disturb()
                await trio.sleep(QUIET_SECONDS / 2)
            assert given == []
            await trio.sleep(1000)
            assert [moment - began for moment in given] == [100 + 4.5 * QUIET_SECONDS + QUIET_SECONDS]
            rest.disturb()
            await trio.sleep(1000)
            assert len(given) == 2
            nursery.cancel_scope.cancel()

    trio.run(main, clock=start)
