"""The daemon's handle on the fetcher process: start it, feed it, start it again when it dies.

It owns the process, the set of layers that the fetcher is to know, and the answers to "where is this blob?",
which need credentials that the fetcher never sees. A fetcher that was started again is told everything
anew; servers get a new socket (`on_restart`) and ask again.

Concurrency: trio. `connect` may be called from any task of the loop and never waits.
"""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import trio

from snapshotter import messages
from snapshotter.counters import CounterPage
from snapshotter.errors import ProcessFailed, RegistryError, SnapshotterError
from snapshotter.fetch import control
from snapshotter.fetch.counters import NAMES
from snapshotter.registry.source import BlobSource
from snapshotter.units import Digest

_log = logging.getLogger(__name__)

_RESPAWN_WAIT_S = 0.05

SourceOf = Callable[[Digest, bool], Awaitable[BlobSource]]
"""(layer, renew) -> where its blob is; raises SnapshotterError."""


class FetcherProcess:
    """Keeps one fetcher running and tells it what it has to know."""

    def __init__(
        self,
        root: Path,
        *,
        options: str,
        source_of: SourceOf,
        on_restart: Callable[[], None],
        on_complete: Callable[[Digest, bool], None],
        inherited_fds: Sequence[int] = (),
    ) -> None:
        self._root = root
        self._options = options
        self._source_of = source_of
        self._on_restart = on_restart
        self._on_complete = on_complete
        self._inherited = tuple(inherited_fds)
        self._counters = CounterPage.create("soci-fetcher-counters", NAMES)
        self._layers: dict[Digest, bool] = {}
        self._opened: dict[Digest, trio.Event] = {}
        self._errors: dict[Digest, str] = {}
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

    async def run(self) -> None:
        """Keep a fetcher running until cancelled; then it ends."""
        async with trio.open_nursery() as nursery:
            try:
                while True:
                    self._start()
                    self._on_restart()
                    await self._follow(nursery)
                    _log.error("fetcher ended; starting another", extra={"pid": self.pid})
                    await self._end()
                    await trio.sleep(_RESPAWN_WAIT_S)
            finally:
                with trio.CancelScope(shield=True):
                    await self._end()

    async def open(self, layer: Digest, *, background: bool) -> None:
        """Have the fetcher serve `layer`; returns when the layer's cache files exist. Raises ProcessFailed."""
        self._layers[layer] = background
        opened = self._opened.setdefault(layer, trio.Event())
        self._tell(control.Open(layer, background))
        await opened.wait()
        if layer in self._errors:
            raise ProcessFailed(f"fetcher cannot use the files of layer {layer}: {self._errors[layer]}")

    def offer(self, layer: Digest, source: BlobSource) -> None:
        """Tell where the blob is before the fetcher has to ask."""
        self._tell(control.Source(layer, source))

    def close(self, layer: Digest) -> None:
        """Have the fetcher let go of `layer`."""
        self._layers.pop(layer, None)
        self._opened.pop(layer, None)
        self._errors.pop(layer, None)
        self._tell(control.Close(layer))

    def connect(self, layer: Digest) -> int | None:
        """Return a new descriptor that talks to the fetcher about `layer`; None without a fetcher, or one that knows it."""
        if self._socket is None or layer not in self._layers:
            return None
        near, far = messages.pair()
        with far:
            try:
                control.send(self._socket, control.Attach(layer), [far.fileno()])
            except OSError:
                near.close()
                return None
        return near.detach()

    def _start(self) -> None:
        near, far = messages.pair()
        command = [sys.executable, "-m", "snapshotter.fetch"]
        arguments = [
            "--control",
            str(far.fileno()),
            "--root",
            str(self._root),
            "--counters",
            str(self._counters),
        ]
        with far:
            self._process = subprocess.Popen(
                [*command, *arguments, "--options", self._options],
                pass_fds=[far.fileno(), self._counters, *self._inherited],
                stdin=subprocess.DEVNULL,
            )
        near.setblocking(False)
        self._socket = near
        for layer, background in self._layers.items():
            self._tell(control.Open(layer, background))

    def _tell(self, message: control.FromDaemon) -> None:
        """Send a message; without a fetcher it is said to the next one, which is told about every layer."""
        if self._socket is not None:
            try:
                control.send(self._socket, message)
            except OSError as error:
                _log.warning("fetcher does not listen", extra={"layer": message.layer, "error": str(error)})

    async def _follow(self, nursery: trio.Nursery) -> None:
        assert self._socket is not None
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                received = control.receive(self._socket)
            except BlockingIOError:
                continue
            except OSError:
                return
            if received is None:
                return
            self._take(received[0], nursery)

    def _take(self, message: control.Message, nursery: trio.Nursery) -> None:
        match message:
            case control.Opened(layer, error):
                if error:
                    self._errors[layer] = error
                else:
                    self._errors.pop(layer, None)
                if layer in self._opened:
                    self._opened[layer].set()
            case control.NeedSource(layer, renew):
                nursery.start_soon(self._find_source, layer, renew)
            case control.Complete(layer, verified):
                self._on_complete(layer, verified)
            case other:
                _log.error("fetcher sent an unexpected message", extra={"op": type(other).__name__})

    async def _find_source(self, layer: Digest, renew: bool) -> None:
        try:
            source = await self._source_of(layer, renew)
        except SnapshotterError as error:
            temporary = isinstance(error, RegistryError) and error.temporary
            self._tell(control.NoSource(layer, str(error), temporary))
        else:
            self._tell(control.Source(layer, source))

    async def _end(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            self._process.kill()
            await trio.to_thread.run_sync(self._process.wait)
