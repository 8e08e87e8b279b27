"""A listener of systemd's: which descriptors are one, and bytes in both directions."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from snapshotter.daemon import inherited
from snapshotter.errors import ConfigError
from tests.conftest import ExpectedLogs
from tests.support.background import background


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(tmp_path / "near"))
    sock.listen(8)
    yield sock
    sock.close()


def hand_over(monkeypatch: pytest.MonkeyPatch, *fds: int) -> None:
    """Have systemd's part be played: these descriptors, copied."""
    handed = [(os.dup(fd), f"fd-{fd}") for fd in fds]
    monkeypatch.setattr(inherited, "listen_fds", lambda: handed)


def test_the_socket_is_found_among_other_things(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("a descriptor of the service manager is of no use here")
    reader, writer = os.pipe()
    unbound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with unbound, socket.create_server(("127.0.0.1", 0)) as internet:
        hand_over(monkeypatch, reader, unbound.fileno(), internet.fileno(), listener.fileno())
        with inherited.take_listener() as found:
            assert found.getsockname() == listener.getsockname()
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("count", [0, 2])
def test_none_and_two_are_refused(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    hand_over(monkeypatch, *[listener.fileno()] * count)
    with pytest.raises(ConfigError, match=f"must hand over one unix stream socket, got {count}"):
        inherited.take_listener()


def test_bytes_pass_in_both_directions_until_an_end_closes(listener: socket.socket, tmp_path: Path) -> None:
    async def echo(stream: trio.SocketStream) -> None:
        async for data in stream:
            if data == b"bye":
                return
            await stream.send_all(data.upper())

    async def main() -> None:
        far = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        await far.bind(str(tmp_path / "far"))
        far.listen(8)
        async with background() as nursery:
            nursery.start_soon(trio.serve_listeners, echo, [trio.SocketListener(far)])
            accepting = trio.CancelScope()
            nursery.start_soon(inherited.forward, listener.dup(), tmp_path / "far", nursery, accepting)
            first = await trio.open_unix_socket(str(tmp_path / "near"))
            second = await trio.open_unix_socket(str(tmp_path / "near"))
            with trio.fail_after(20):
                for stream in (first, second):
                    await stream.send_all(b"hello")
                    assert await stream.receive_some() == b"HELLO"
                await first.send_all(b"bye")
                assert await first.receive_some() == b""
                await second.send_all(b"again")
                assert await second.receive_some() == b"AGAIN"
                accepting.cancel()
                await trio.testing.wait_all_tasks_blocked()
                third = await trio.open_unix_socket(str(tmp_path / "near"))
                await third.send_all(b"for the next one")
                await second.send_all(b"still")
                assert await second.receive_some() == b"STILL"
                for stream in (first, second, third):
                    await stream.aclose()
            waiting, _ = listener.accept()  # nobody has taken it
            assert waiting.recv(100) == b"for the next one"
            waiting.close()

    trio.run(main)


def test_a_connection_that_cannot_be_passed_on_is_closed(
    listener: socket.socket, tmp_path: Path, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("a connection could not be passed on")

    async def main() -> None:
        async with background() as nursery:
            nursery.start_soon(
                inherited.forward, listener.dup(), tmp_path / "absent", nursery, trio.CancelScope()
            )
            with trio.fail_after(20):
                stream = await trio.open_unix_socket(str(tmp_path / "near"))
                assert await stream.receive_some() == b""
                await stream.aclose()

    trio.run(main)
