"""The socket of one layer server, seen from the fetcher."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable

import pytest
import trio

from snapshotter import messages
from snapshotter.fetch.readers import BURST, MAX_BACKLOG, Reader
from snapshotter.layer import wire


def with_reader(body: Callable[[Reader, socket.socket, list[wire.Message]], Awaitable[None]]) -> None:
    """Run `body` beside a reader, with the server's end and what the reader has heard."""

    async def main() -> None:
        theirs, ours = messages.pair()
        reader, heard = Reader(ours), list[wire.Message]()
        with theirs, trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reader.run, heard.append)
                await body(reader, theirs, heard)
                theirs.close()
        reader.close()

    trio.run(main)


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await trio.sleep(0.001)


def test_messages_arrive_in_order() -> None:
    async def body(_: Reader, server: socket.socket, heard: list[wire.Message]) -> None:
        said: list[wire.Message] = [wire.Touch(number) for number in range(3 * BURST)]
        for message in said:
            server.send(wire.encode(message))
        await until(lambda: len(heard) == len(said))
        assert heard == said

    with_reader(body)


def test_a_server_that_reads_late_gets_everything_in_order() -> None:
    async def body(reader: Reader, server: socket.socket, _: list[wire.Message]) -> None:
        count = MAX_BACKLOG // 2
        for number in range(count):
            reader.send(wire.Ready(number, number + 1))
        server.setblocking(False)
        heard: list[wire.Message] = []
        while len(heard) < count:
            try:
                heard.append(wire.decode(server.recv(100)))
            except BlockingIOError:
                await trio.sleep(0.001)
        assert heard == [wire.Ready(number, number + 1) for number in range(count)]

    with_reader(body)


def test_a_server_that_never_reads_is_dropped() -> None:
    async def body(reader: Reader, server: socket.socket, _: list[wire.Message]) -> None:
        for number in range(3 * MAX_BACKLOG):
            reader.send(wire.Ready(number, number + 1))
        server.settimeout(60)
        while await trio.to_thread.run_sync(server.recv, 100):
            pass

    with_reader(body)


def test_sending_to_a_server_that_has_gone_is_no_error() -> None:
    async def body(reader: Reader, server: socket.socket, _: list[wire.Message]) -> None:
        server.close()
        for number in range(10):
            reader.send(wire.Failed(number, 5))
        reader.close()
        reader.close()
        reader.send(wire.Failed(1, 5))

    with_reader(body)


@pytest.mark.parametrize("packet", [b"x", b"x" * 100, wire.encode(wire.Touch(1)) + b"\0"])
def test_what_is_no_message_ends_it(packet: bytes) -> None:
    async def main() -> None:
        theirs, ours = messages.pair()
        with theirs:
            theirs.send(packet)
            reader = Reader(ours)
            with trio.fail_after(60), pytest.raises(ValueError, match="message"):
                await reader.run(lambda _: None)
            reader.close()

    trio.run(main)
