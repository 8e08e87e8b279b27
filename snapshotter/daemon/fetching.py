"""The daemon's handle on the fetcher process: start it, feed it, start it again when it dies.

It owns the process, the set of layers that the fetcher is to know, and the answers to "where is this blob?",
which need credentials that the fetcher never sees. A fetcher that was started again is told everything
anew; servers get a new socket (`on_restart`) and ask again.

Concurrency: trio. `connect` may be called from any task of the loop and never waits: what the socket has no room
for (a host that starts opens hundreds of layers at once) is kept and sent in its turn.
"""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

from snapshotter import messages
from snapshotter.counters import CounterPage
from snapshotter.environment import child_environment
from snapshotter.errors import ProcessFailed, RegistryError, SnapshotterError
from snapshotter.events import Event, EventRing
from snapshotter.fetch import control
from snapshotter.fetch.counters import NAMES
from snapshotter.registry.source import BlobSource
from snapshotter.units import Digest

_log = logging.getLogger(__name__)

_RESPAWN_WAIT_S = 0.05
"""Pause before another fetcher is started; doubles as long as they die young."""

_MAX_RESPAWN_WAIT_S = 10.0
_LONG_LIFE_S = 5.0

SourceOf = Callable[[control.NeedSource], Awaitable[BlobSource]]
"""Returns where a layer's blob is; raises SnapshotterError."""


@dataclass(slots=True, eq=False)
class _Opening:
    """The answer to `open` of one layer, when it has come."""

    answered: trio.Event = field(default_factory=trio.Event)
    error: str = ""

    def answer(self, error: str) -> None:
        self.error = error
        self.answered.set()


class FetcherProcess:
    """Keeps one fetcher running and tells it what it has to know."""

    def __init__(
        self,
        root: Path,
        *,
        options: str,
        source_of: SourceOf,
        on_restart: Callable[[], None],
        on_complete: Callable[[Digest, bool, str], Awaitable[None]],
        inherited_fds: Sequence[int] = (),
    ) -> None:
        self._root = root
        self._options = options
        self._source_of = source_of
        self._on_restart = on_restart
        self._on_complete = on_complete
        self._inherited = tuple(inherited_fds)
        self._counters = CounterPage.create("soci-fetcher-counters", NAMES)
        self._events = EventRing.create("soci-events")
        self._layers: dict[Digest, control.Open] = {}
        self._openings: dict[Digest, _Opening] = {}
        self._outgoing: deque[tuple[control.FromDaemon, socket.socket | None]] = deque()
        """What the socket had no room for, with the descriptor that goes along."""
        self._something_to_send = trio.Event()
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The fetcher's pid, None while there is none."""
        return self._process.pid if self._process is not None else None

    def counters(self) -> dict[str, int]:
        """Return the fetcher's counters by name; they go on over restarts."""
        page = CounterPage(self._counters, NAMES, writable=False)
        try:
            return page.snapshot()
        finally:
            page.close()

    def events(self) -> list[Event]:
        """Return what the fetchers have told of, the oldest first."""
        ring = EventRing(self._events, writable=False)
        try:
            return ring.snapshot()
        finally:
            ring.close()

    async def run(self) -> None:
        """Keep a fetcher running until cancelled; then it ends."""
        wait = _RESPAWN_WAIT_S
        async with trio.open_nursery() as nursery:
            try:
                while True:
                    started = trio.current_time()
                    reason = await self._live(nursery)
                    _log.error("fetcher ended; starting another", extra={"pid": self.pid, "reason": reason})
                    await self._end()
                    if trio.current_time() - started > _LONG_LIFE_S:
                        wait = _RESPAWN_WAIT_S
                    await trio.sleep(wait)
                    wait = min(wait * 2, _MAX_RESPAWN_WAIT_S)
            finally:
                with trio.CancelScope(shield=True):
                    await self._end()

    async def _live(self, nursery: trio.Nursery) -> str:
        """Start a fetcher and talk to it until it ends; return why it did. `nursery` is for what outlives it."""
        try:
            sock = self._start()
        except OSError as error:
            return f"it cannot be started: {error}"
        self._on_restart()
        async with trio.open_nursery() as life:
            life.start_soon(self._flush, sock)
            reason = await self._follow(sock, nursery)
            life.cancel_scope.cancel()
        return reason

    async def open(self, layer: Digest, *, background: bool, image: str) -> None:
        """Have the fetcher serve `layer` of `image`; returns when the layer's cache files exist. Raises ProcessFailed."""
        message = self._layers[layer] = control.Open(layer, background, image)
        opening = self._openings.get(layer)
        if opening is None or opening.answered.is_set():  # its files may have gone since
            opening = self._openings[layer] = _Opening()
        self._tell(message)
        await opening.answered.wait()
        if opening.error:
            raise ProcessFailed(f"fetcher cannot use the files of layer {layer}: {opening.error}")

    def offer(self, layer: Digest, source: BlobSource) -> None:
        """Tell where the blob is before the fetcher has to ask."""
        self._tell(control.Source(layer, source))

    def close(self, layer: Digest) -> None:
        """Have the fetcher let go of `layer`."""
        self._layers.pop(layer, None)
        opening = self._openings.pop(layer, None)
        if opening is not None and not opening.answered.is_set():
            opening.answer("the layer was closed meanwhile")
        self._tell(control.Close(layer))

    def connect(self, layer: Digest) -> int | None:
        """Return a new descriptor that talks to the fetcher about `layer`; None without a fetcher, or one that knows it."""
        if self._socket is None or layer not in self._layers:
            return None
        near, far = messages.pair()
        self._tell(control.Attach(layer), far)
        return near.detach()

    def _start(self) -> socket.socket:
        """Start a fetcher and tell it about every layer. Raises OSError."""
        near, far = messages.pair()
        command = [
            sys.executable, "-m", "snapshotter.fetch", "--control", str(far.fileno()), "--root", str(self._root),
            "--counters", str(self._counters), "--events", str(self._events), "--options", self._options,
        ]  # fmt: skip
        with far:
            try:
                self._process = subprocess.Popen(
                    command,
                    pass_fds=[far.fileno(), self._counters, self._events, *self._inherited],
                    stdin=subprocess.DEVNULL,
                    env=child_environment(network=True),
                )
            except OSError:
                near.close()
                raise
        near.setblocking(False)
        self._socket = near
        for message in self._layers.values():
            self._tell(message)
        return near

    def _tell(self, message: control.FromDaemon, companion: socket.socket | None = None) -> None:
        """Send a message, now or as soon as there is room, and close the companion that goes along.

        Without a fetcher nothing is sent: the next one is told about every layer when it starts.
        """
        if self._socket is None:
            _close(companion)
        elif self._outgoing or not self._try(self._socket, message, companion):
            self._outgoing.append((message, companion))
            self._something_to_send.set()

    def _try(self, sock: socket.socket, message: control.FromDaemon, companion: socket.socket | None) -> bool:
        """Send a message unless the socket is full; return whether that is done with."""
        try:
            control.send(sock, message, [companion.fileno()] if companion is not None else [])
        except BlockingIOError:
            return False
        except OSError as error:  # it has just ended, which `_follow` notices
            _log.info("fetcher does not listen", extra={"layer": message.layer, "error": str(error)})
        _close(companion)
        return True

    async def _flush(self, sock: socket.socket) -> None:
        while True:
            await self._something_to_send.wait()
            self._something_to_send = trio.Event()
            while self._outgoing:
                if self._try(sock, *self._outgoing[0]):
                    self._outgoing.popleft()
                else:
                    await trio.lowlevel.wait_writable(sock)

    async def _follow(self, sock: socket.socket, nursery: trio.Nursery) -> str:
        """Take messages until the fetcher ends; return why it did."""
        while True:
            await trio.lowlevel.wait_readable(sock)
            try:
                received = control.receive(sock)
            except BlockingIOError:
                continue
            except (OSError, ValueError) as error:
                return str(error)
            if received is None:
                return "its socket ended"
            self._take(received[0], nursery)

    def _take(self, message: control.Message, nursery: trio.Nursery) -> None:
        match message:
            case control.Opened(layer, error):
                if layer in self._openings:
                    self._openings[layer].answer(error)
            case control.NeedSource() as question:
                nursery.start_soon(self._find_source, question)
            case control.Complete(layer, verified, diff_id):
                nursery.start_soon(self._on_complete, layer, verified, diff_id)
            case other:
                _log.error("fetcher sent an unexpected message", extra={"op": type(other).__name__})

    async def _find_source(self, question: control.NeedSource) -> None:
        layer = question.layer
        try:
            source = await self._source_of(question)
        except SnapshotterError as error:
            temporary = isinstance(error, RegistryError) and error.temporary
            self._tell(control.NoSource(layer, str(error), temporary))
        else:
            self._tell(control.Source(layer, source))

    async def _end(self) -> None:
        while self._outgoing:
            _close(self._outgoing.popleft()[1])
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            self._process.kill()
            await trio.to_thread.run_sync(self._process.wait)
            self._process = None


def _close(companion: socket.socket | None) -> None:
    if companion is not None:
        companion.close()
