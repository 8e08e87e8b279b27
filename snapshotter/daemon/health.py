"""Whether the daemon is well: one answer, for systemd's watchdog and for /healthz.

Well means that a restart could not help: the loop turns (what looks runs in it), the database answers a worker
thread, and gRPC greets a new connection on the socket that containerd uses. A registry that is down, a pull that takes
long, or a fetcher being started again are no reasons to kill anything; /healthz tells of a fetcher that is missing.

Concurrency: trio; `report` is for other threads.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import trio

from snapshotter.errors import SnapshotterError

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""What an HTTP/2 client says first (RFC 9113, 3.4), with an empty SETTINGS frame."""

_FRAME_HEADER = 9
_SETTINGS = 4

_PATIENCE_S = 10.0
"""For /healthz. Out of the air; kubelet's probes have a second unless they say otherwise."""


class Fetcher(Protocol):
    """The process that fetches."""

    @property
    def pid(self) -> int | None:
        """None while there is none."""


class Laziness(Protocol):
    """Who knows whether layers can be lazy."""

    @property
    def not_lazy(self) -> str:
        """Why nothing is lazy; empty if it is."""


class Health:
    """Looks whether the daemon is well. Made in the loop."""

    def __init__(
        self,
        address: Path,
        read_database: Callable[[], object],
        fetcher: Fetcher,
        laziness: Laziness,
    ) -> None:
        self._address = address
        self._read_database = read_database
        self._fetcher = fetcher
        self._laziness = laziness
        self._loop = trio.lowlevel.current_trio_token()
        # Not one of the loop's common threads: those may all be waiting for a slow disk, and that is no reason to end.
        self._thread = trio.CapacityLimiter(1)

    def report(self) -> dict[str, Any]:
        """Return what /healthz tells: "ok", the "trouble" that a restart might end, what is "missing" for a moment, and
        why nothing is lazy. For other threads than the loop's; returns when the loop turns."""
        try:
            trouble = trio.from_thread.run(self.look, _PATIENCE_S, trio_token=self._loop)
        except (trio.RunFinishedError, trio.Cancelled):
            trouble = "the daemon is ending"
        missing = [] if self._fetcher.pid else ["fetcher"]
        return {
            "ok": not trouble and not missing,
            "trouble": trouble,
            "missing": missing,
            "not_lazy_because": self._laziness.not_lazy,
        }

    async def look(self, seconds: float) -> str:
        """Return what `find_trouble` finds, or that it took longer than `seconds`."""
        with trio.move_on_after(seconds):
            return await self.find_trouble()
        return f"no answer within {seconds:g} s"

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
