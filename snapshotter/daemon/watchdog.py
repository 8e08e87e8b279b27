"""The watchdog: tells systemd that the daemon is well, but only when it has just been seen to be.

Well means that a restart could not help: the loop turns (this task runs in it), the database answers a worker
thread, and gRPC greets a new connection on the socket that containerd uses. A registry that is down, a pull that takes
long, or a fetcher being started again are no reasons to kill anything. A daemon that is not well says so once in the
log; if it stays so, systemd ends it and starts another, which takes the mounts over.

Concurrency: trio; one task.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import trio

from snapshotter.errors import SnapshotterError
from snapshotter.sdnotify import Notifier

_log = logging.getLogger(__name__)

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""What an HTTP/2 client says first (RFC 9113, 3.4), with an empty SETTINGS frame."""

_FRAME_HEADER = 9
_SETTINGS = 4


class Health:
    """Looks whether the daemon is well."""

    def __init__(self, address: Path, read_database: Callable[[], object]) -> None:
        self._address = address
        self._read_database = read_database
        # Not one of the loop's common threads: those may all be waiting for a slow disk, and that is no reason to end.
        self._thread = trio.CapacityLimiter(1)

    async def find_trouble(self) -> str:
        """Return what is wrong, or the empty string. Takes as long as the parts take to answer: limit it."""
        try:
            await trio.to_thread.run_sync(self._read_database, abandon_on_cancel=True, limiter=self._thread)
        except (SnapshotterError, OSError) as error:
            return f"the database cannot be read: {error}"
        try:
            async with await trio.open_unix_socket(str(self._address)) as stream:
                await stream.send_all(_PREFACE)
                frame = b""
                while len(frame) < _FRAME_HEADER:
                    data = await stream.receive_some()
                    if not data:
                        return "gRPC closes new connections"
                    frame += data
        except (OSError, trio.BrokenResourceError) as error:
            return f"gRPC does not answer: {error}"
        return "" if frame[3] == _SETTINGS else "gRPC does not speak HTTP/2"


async def watch(health: Health, notifier: Notifier, interval: float | None) -> None:
    """Say every `interval` seconds that all is well, when it is. Returns at once when nobody wants to know."""
    if interval is None:
        return
    was_well = True
    while True:
        trouble = f"no answer within {interval / 2:g} s"
        with trio.move_on_after(interval / 2):
            trouble = await health.find_trouble()
        if not trouble:
            notifier.watchdog()
        elif was_well:
            _log.error("not well; systemd will start another daemon", extra={"reason": trouble})
        was_well = not trouble
        await trio.sleep(interval)
