"""The socket of one layer server.

Messages go out without waiting: a server that does not read for a while gets them from a backlog, and one
that never does is dropped, because the main loop waits for nobody.

Concurrency: the main loop only; `run` is the one task of a reader.
"""

from __future__ import annotations

import array
import os
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import trio

from snapshotter.layer import wire

MAX_BACKLOG = 4096
"""Messages kept for a server that does not read; the socket itself holds some hundred more."""

BURST = 32
"""Messages taken from one server before the others have their turn."""


class Reader:
    """One server as the fetcher sees it: where its messages come from and its answers go."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._backlog: deque[tuple[bytes, int]] = deque()
        """Packets, each with a descriptor of its own that goes along (-1: none)."""
        self._writable = trio.Event()
        self._closed = False
        self.told: dict[int, int] = {}
        """How often this server was told at once that a span is usable."""

    def send(self, message: wire.Ready | wire.Lent | wire.Failed, fd: int = -1) -> None:
        """Send `message`, now or as soon as the server reads; a server that has gone away is no error.

        `fd` goes along if it is one; it stays the caller's.
        """
        if self._closed:
            return
        packet = wire.encode(message)
        if not self._backlog and self._try(packet, fd):
            return
        self._backlog.append((packet, os.dup(fd) if fd >= 0 else -1))
        self._writable.set()
        if len(self._backlog) > MAX_BACKLOG:
            self.close()

    async def run(self, handle: Callable[[wire.Message], None]) -> None:
        """Pass every message to `handle` until the server goes away or `close` is called.

        Raises ValueError when it sends what is no message.
        """
        problem: ValueError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._flush)
            try:
                await self._receive(handle)
            except ValueError as error:
                problem = error
            nursery.cancel_scope.cancel()
        if problem is not None:
            raise problem

    def close(self) -> None:
        """Hang up."""
        if not self._closed:
            self._closed = True
            while self._backlog:
                _close(self._backlog.popleft()[1])
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()

    async def _receive(self, handle: Callable[[wire.Message], None]) -> None:
        burst = 0
        while not self._closed:
            try:
                packet = self._sock.recv(wire.PACKET_SIZE + 1, socket.MSG_DONTWAIT)
            except BlockingIOError:
                with suppress(trio.ClosedResourceError):
                    await trio.lowlevel.wait_readable(self._sock)
                burst = 0
                continue
            except ConnectionError:
                return
            if not packet:
                return
            handle(wire.decode(packet))
            burst += 1
            if burst % BURST == 0:
                await trio.lowlevel.checkpoint()

    async def _flush(self) -> None:
        while True:
            await self._writable.wait()
            self._writable = trio.Event()
            while self._backlog:
                if self._try(*self._backlog[0]):
                    _close(self._backlog.popleft()[1])
                else:
                    with suppress(trio.ClosedResourceError):
                        await trio.lowlevel.wait_writable(self._sock)
                if self._closed:
                    return

    def _try(self, packet: bytes, fd: int) -> bool:
        """Send `packet` unless the socket is full; return whether that is done with."""
        try:
            self._sock.sendmsg([packet], _rights(fd), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        except OSError:
            return True  # it has gone away; its own task notices and tidies up
        return True


def _rights(fd: int) -> list[tuple[int, int, array.array[int]]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd >= 0 else []


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)
