"""The line of pyfuse3's tasks before the device: whatever becomes of each, somebody waits as long as one is left."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pyfuse3
import pytest
import trio

from snapshotter.fuse.adoption import _Takeover

TASKS = 30
REQUESTS = 3000


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """In place of the device: a byte is a request, its end is that of the session."""
    reading, writing = os.pipe()
    yield reading, writing
    os.close(reading)


@pytest.fixture
def takeover(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[_Takeover]:
    """The wait of a server that has taken over."""

    async def readable() -> bool:
        await trio.lowlevel.wait_readable(pipe[0])
        return True

    monkeypatch.setattr(pyfuse3, "_wait_fuse_readable", readable)
    operations: Any = SimpleNamespace(in_flight=1)  # nobody is waited for with the loop standing still
    near, far = socket.socketpair()
    with near, far:
        made = _Takeover(operations, pipe[0], -1, far, None)
        made._turn = 2
        made._poll.register(pipe[0])
        yield made


@pytest.mark.parametrize("seed", range(5))
def test_every_request_is_served_whoever_is_cancelled_or_busy(
    takeover: _Takeover, pipe: tuple[int, int], seed: int
) -> None:
    reading, writing = pipe
    chance = random.Random(seed)
    served = []

    async def task(scope: trio.CancelScope) -> None:
        with scope:
            while await takeover.wait():
                if not os.read(reading, 1):  # without a checkpoint since `wait`, as in pyfuse3's loop
                    return
                served.append(1)
                match chance.randrange(4):
                    case 0:
                        await trio.lowlevel.checkpoint()
                    case 1:
                        await trio.sleep(chance.random() / 1000)

    async def main() -> None:
        scopes = [trio.CancelScope() for _ in range(TASKS)]
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for scope in scopes:
                    nursery.start_soon(task, scope)
                for _ in range(REQUESTS // 10):
                    os.write(writing, b"x" * 10)
                    await trio.sleep(0 if chance.random() < 0.8 else 0.001)
                    if len(scopes) > 1 and chance.random() < 0.1:
                        scopes.pop(chance.randrange(len(scopes))).cancel()
                while len(served) < REQUESTS:
                    await trio.sleep(0.001)
                os.close(writing)  # those that are left end one after another

    trio.run(main)
    assert len(served) == REQUESTS
