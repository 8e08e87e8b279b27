"""The daemon's handle on the zygote: start it, ask it for children, start it again when it dies.

It owns the zygote process and the requests under way. A child belongs to whoever asked: it comes back as a
pidfd, which becomes readable when the child has ended (the zygote reaps it).

Concurrency: trio; any number of `fork` calls at once, answered in the zygote's order.
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import trio

from snapshotter import messages
from snapshotter.errors import ProcessFailed
from snapshotter.fuse.spawning import Zygote, spawn

_log = logging.getLogger(__name__)

_RESPAWN_WAIT_S = 0.2
"""Pause between two starts of a zygote that died; its start takes about as long. Doubles as long as they die young."""

_MAX_RESPAWN_WAIT_S = 10.0
_LONG_LIFE_S = 5.0

_PATIENCE_S = 10.0
"""How long a request waits for a zygote to be started; it takes a fraction of a second."""


class Child(NamedTuple):
    """A forked process; the owner closes `pidfd`."""

    pid: int
    pidfd: int


class Forker:
    """Forks children through a zygote that it keeps alive; `first` is one that has been started already."""

    def __init__(
        self,
        empty_root: str,
        *,
        inherited_fds: Sequence[int] = (),
        log_level: str = "info",
        first: Zygote | None = None,
    ) -> None:
        self._empty_root = empty_root
        self._inherited = tuple(inherited_fds)
        self._log_level = log_level
        self._first = first
        self._zygote: Zygote | None = None
        self._up = trio.Event()
        self._sending = trio.Lock()
        self._ids = itertools.count(1)
        self._answers: dict[int, tuple[trio.Event, list[Child | str]]] = {}

    @property
    def pid(self) -> int | None:
        """The zygote's pid, None while there is none."""
        return self._zygote.process.pid if self._zygote is not None else None

    async def run(self) -> None:
        """Keep a zygote running and pass its answers on, until cancelled; then it ends, its children do not."""
        wait = _RESPAWN_WAIT_S
        try:
            while True:
                started = trio.current_time()
                why = "the zygote died"
                try:
                    zygote = self._start()
                except OSError as error:
                    why = f"the zygote cannot be started: {error}"
                else:
                    await self._follow(zygote.socket)
                self._fail_all(why)
                _log.error("zygote ended; starting another", extra={"pid": self.pid, "reason": why})
                await self._reap()
                if trio.current_time() - started > _LONG_LIFE_S:
                    wait = _RESPAWN_WAIT_S
                await trio.sleep(wait)
                wait = min(wait * 2, _MAX_RESPAWN_WAIT_S)
        finally:
            with trio.CancelScope(shield=True):
                await self._reap()

    async def fork(
        self, job: str, *, uid: int, arguments: Mapping[str, Any], fds: Mapping[str, int]
    ) -> Child:
        """Return a new child running `job`; the caller keeps its descriptors. Raises ProcessFailed."""
        request = next(self._ids)
        message = {"id": request, "job": job, "uid": uid, "arguments": arguments, "names": list(fds)}
        zygote = await self._connection(job)
        event, box = self._answers[request] = (trio.Event(), [])
        try:
            async with self._sending:
                await _send(zygote, message, list(fds.values()))
            await event.wait()
        except (OSError, trio.ClosedResourceError) as error:
            raise ProcessFailed(f"cannot reach the zygote: {error}") from error
        finally:
            self._answers.pop(request, None)
        answer = box[0]
        if isinstance(answer, str):
            raise ProcessFailed(f"cannot fork {job}: {answer}")
        return answer

    async def _connection(self, job: str) -> socket.socket:
        """Return the socket of a running zygote; between its return and a first `await` it stays that."""
        with trio.move_on_after(_PATIENCE_S):
            while not self._up.is_set():
                await self._up.wait()
        if self._zygote is None or not self._up.is_set():
            raise ProcessFailed(f"cannot fork {job}: no zygote within {_PATIENCE_S:.0f} s")
        return self._zygote.socket

    def _start(self) -> Zygote:
        """Take the first zygote, or start another. Raises OSError."""
        zygote, self._first = self._first, None
        if zygote is None:
            zygote = spawn(self._empty_root, self._inherited, self._log_level)
        self._zygote = zygote
        self._up.set()
        return zygote

    async def _follow(self, zygote: socket.socket) -> None:
        while True:
            await trio.lowlevel.wait_readable(zygote)
            try:
                received = messages.receive(zygote)
            except OSError:
                return
            if received is None:
                return
            message, fds = received
            answer: Child | str = Child(message["pid"], fds[0]) if fds else str(message.get("error"))
            waiting = self._answers.get(message["id"])
            if waiting is not None:
                waiting[1].append(answer)
                waiting[0].set()
            elif isinstance(answer, Child):  # whoever asked was cancelled
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(answer.pidfd, signal.SIGKILL)
                os.close(answer.pidfd)

    def _fail_all(self, why: str) -> None:
        for event, box in self._answers.values():
            box.append(why)
            event.set()

    async def _reap(self) -> None:
        if self._up.is_set():
            self._up = trio.Event()
        if self._zygote is not None:
            self._zygote.process.kill()
            trio.lowlevel.notify_closing(self._zygote.socket)
            self._zygote.socket.close()
            await trio.to_thread.run_sync(self._zygote.end)
            self._zygote = None


async def _send(sock: socket.socket, message: Mapping[str, Any], fds: Sequence[int]) -> None:
    """Send when there is room: a host that starts has hundreds of layers to wake."""
    while True:
        try:
            messages.send(sock, message, fds)
        except BlockingIOError:
            await trio.lowlevel.wait_writable(sock)
        else:
            return
