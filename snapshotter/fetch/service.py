"""The control socket: the daemon's messages become calls of the fetcher, and its answers go out.

Concurrency: one task reads the socket, one task per layer server serves it, one runs the timers. Messages about
one layer may overtake each other only where that is harmless: a server that is attached while its layer is
being opened waits for it.
"""

from __future__ import annotations

import logging
import socket
from collections import deque

import trio

from snapshotter.counters import CounterPage
from snapshotter.errors import SnapshotterError
from snapshotter.events import EventRing
from snapshotter.fetch import control
from snapshotter.fetch.context import Context
from snapshotter.fetch.fetcher import Fetcher
from snapshotter.fetch.options import Options
from snapshotter.layer.store import LayerStore
from snapshotter.units import Digest

log = logging.getLogger(__name__)


class Service:
    """One fetcher at the end of one control socket."""

    def __init__(
        self,
        sock: socket.socket,
        store: LayerStore,
        counters: CounterPage,
        events: EventRing,
        options: Options,
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._store = store
        self._counters = counters
        self._events = events
        self._options = options
        self._outgoing: deque[control.FromFetcher] = deque()
        self._something_to_send = trio.Event()
        self._stop = trio.CancelScope()

    async def run(self) -> None:
        """Serve until the daemon hangs up, then leave the files clean and return at once."""
        context = Context.create(self._options, self._counters, self._events, self._tell)
        fetcher = Fetcher(context, self._store)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(context.timers.run)
            nursery.start_soon(context.rest.run, fetcher.at_rest)
            nursery.start_soon(self._send)
            with self._stop:
                await self._receive(fetcher, nursery)
            fetcher.leave_clean()
            nursery.cancel_scope.cancel()

    def stop(self) -> None:
        """Let `run` return as if the daemon had hung up."""
        self._stop.cancel()

    async def _receive(self, fetcher: Fetcher, nursery: trio.Nursery) -> None:
        while True:
            try:
                received = control.receive(self._sock)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._sock)
                continue
            except ConnectionError:
                return
            except ValueError as error:
                self._counters.add("bad_messages")
                log.error("control message ignored", extra={"reason": str(error)})
                continue
            if received is None:
                return
            self._dispatch(fetcher, nursery, *received)

    def _dispatch(
        self, fetcher: Fetcher, nursery: trio.Nursery, message: control.Message, fds: list[int]
    ) -> None:
        match message:
            case control.Open():
                nursery.start_soon(self._open, fetcher, message)
            case control.Attach(layer):
                server = socket.socket(fileno=fds[0])
                nursery.start_soon(self._serve, fetcher, layer, server)
            case control.Close(layer):
                fetcher.close(layer)
            case control.Source() | control.NoSource():
                fetcher.answer(message)
            case _:
                log.error("control message of the wrong side", extra={"kind": type(message).__name__})

    async def _open(self, fetcher: Fetcher, message: control.Open) -> None:
        layer = message.layer
        try:
            await fetcher.open(layer, background=message.background, image=message.image)
        except (SnapshotterError, OSError) as error:
            log.error("layer cannot be opened", extra={"layer": layer, "reason": str(error)})
            self._tell(control.Opened(layer, str(error)))
        else:
            self._tell(control.Opened(layer))

    async def _serve(self, fetcher: Fetcher, layer: Digest, server: socket.socket) -> None:
        try:
            await fetcher.serve(layer, server)
        except (SnapshotterError, OSError) as error:
            log.error("layer cannot be served", extra={"layer": layer, "reason": str(error)})

    def _tell(self, message: control.FromFetcher) -> None:
        """Send `message` without waiting: now, or as soon as the daemon reads."""
        if not self._outgoing and self._try(message):
            return
        self._outgoing.append(message)
        self._something_to_send.set()

    async def _send(self) -> None:
        while True:
            await self._something_to_send.wait()
            self._something_to_send = trio.Event()
            while self._outgoing:
                if self._try(self._outgoing[0]):
                    self._outgoing.popleft()
                else:
                    await trio.lowlevel.wait_writable(self._sock)

    def _try(self, message: control.FromFetcher) -> bool:
        """Send `message` unless the socket is full; return whether that is done with."""
        try:
            control.send(self._sock, message)
        except BlockingIOError:
            return False
        except OSError:
            return True  # the daemon has hung up, which the receiving side notices
        return True
