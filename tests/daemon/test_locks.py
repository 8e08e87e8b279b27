"""Locks by key: one at a time for each, and nothing is left of them."""

import pytest
import trio
import trio.testing

from snapshotter.daemon.locks import Locks


def test_one_at_a_time_in_order_and_nothing_is_left() -> None:
    seen: list[str] = []

    async def one(locks: Locks, name: str, key: str) -> None:
        async with locks.hold(key):
            seen.append(name)
            await trio.testing.wait_all_tasks_blocked()
            seen.append(name)

    async def main() -> None:
        locks = Locks()
        async with trio.open_nursery() as nursery:
            for name in "abc":
                nursery.start_soon(one, locks, name, "key")
                await trio.testing.wait_all_tasks_blocked()
        assert [seen[i] for i in (0, 2, 4)] == [seen[i] for i in (1, 3, 5)]
        assert len(locks) == 0

    trio.run(main)


def test_keys_do_not_wait_for_each_other_and_who_gives_up_leaves_nothing() -> None:
    async def hold_for_ever(locks: Locks) -> None:
        async with locks.hold(1):
            await trio.sleep_forever()

    async def main() -> None:
        locks = Locks()
        async with locks.hold(1), locks.hold(2):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(hold_for_ever, locks)
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
            assert len(locks) == 2
        assert len(locks) == 0
        with pytest.raises(KeyError):
            async with locks.hold(1):
                raise KeyError
        assert len(locks) == 0

    trio.run(main)
