"""Room on the disk: how much there is for the cache, and what goes when there is none.

Two limits hold, either of which may be 0 for "none": a cap on what the files of all open layers occupy, and the
free space that the cache leaves to others. (Layers that are not open have no files: the daemon removes them with
their last mount.) Both are looked up where they are true, in the inodes and the file system, and
estimated in between by what was admitted since.

Below the limits lies a *headroom*. Readers and read-ahead may use it; the background may not, and stops there. When
it is used up, spans are evicted (`eviction.py`) until it is free again. What is not admitted after that is not
stored, but lent to its readers from memory.

Concurrency: the main loop only.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import trio

from snapshotter.fetch.context import Context

log = logging.getLogger(__name__)

HEADROOM = 64 << 20
"""Bytes below a limit that only readers may use: as much as the fetcher has in memory at once."""

FRESH_SECONDS = 1.0
"""How long a look at the disk is believed while there is plenty of room."""

LEAST_SECONDS = 0.05
"""Time between two looks at the disk, however short of room it is: a look costs some us per layer."""

AGAIN_SECONDS = 10.0
"""When the background looks again whether somebody else has made room on the disk."""

COMPLAINT_SECONDS = 60.0
"""Time between two log lines that say that there is no room."""

ROUNDING = 2 * 4096
"""What a span occupies beyond its bytes, because a file system gives whole blocks."""

UNLIMITED = 1 << 62


class Space:
    """Admits what is to be stored. `make_room` is called with a number of bytes that should go, `pump` when there
    may be room again."""

    def __init__(self, context: Context, make_room: Callable[[int], None], pump: Callable[[], None]) -> None:
        self._context = context
        self._make_room = make_room
        self._pump = pump
        self._looked = float("-inf")
        self._hard = self._soft = UNLIMITED
        """Bytes up to the limits, and up to the headroom, at the last look."""
        self._since = 0
        """Bytes admitted since, and still on their way at the last look."""
        self._pending = 0
        """Bytes admitted and not yet written."""
        self._complaint = float("-inf")
        self._timer = float("-inf")

    def admit(self, size: int) -> bool:
        """Say whether `size` bytes may be stored for readers, making room if need be. `settle` takes them back."""
        if self._left(soft=True) < size:
            self._look(LEAST_SECONDS)
            if self._left(soft=True) < size:
                self._make_room(size - self._left(soft=True))
        if self._left(soft=False) >= size:
            self.take(size)
            return True
        now = trio.current_time()
        if self._complaint <= now:
            self._complaint = now + COMPLAINT_SECONDS
            log.warning("no room in the cache: reads are served from memory", extra={"wanted_bytes": size})
        return False

    def has_room(self, size: int) -> bool:
        """Say whether `size` bytes may be stored for nobody in particular; takes and evicts nothing."""
        if self._left(soft=True) < size:
            self._look(LEAST_SECONDS)
        if self._left(soft=True) < size:
            now = trio.current_time()
            if self._timer <= now:
                self._timer = now + AGAIN_SECONDS
                self._context.timers.at(self._timer, self._pump)
                log.info("the background pauses: no room in the cache")
            return False
        return True

    def take(self, size: int) -> None:
        """`size` bytes are going to be stored. `settle` takes that back."""
        self._since += size
        self._pending += size

    def settle(self, size: int) -> None:
        """`size` admitted bytes have been written, or have not."""
        self._pending -= size

    def refused(self) -> None:
        """The disk took no more, whatever the last look has said."""
        disk = os.fstatvfs(next(iter(self._context.layers.values())).files.blob_fd)
        self._make_room(_headroom(disk.f_blocks * disk.f_frsize))

    def freed(self, size: int) -> None:
        """About `size` bytes are being given back."""
        self._since -= size

    def changed(self) -> None:
        """What was seen of the disk is not true any more."""
        self._looked = float("-inf")
        self._pump()

    # ---- how much there is ----

    def _left(self, *, soft: bool) -> int:
        self._look(FRESH_SECONDS)
        return (self._soft if soft else self._hard) - self._since

    def _look(self, age: float) -> None:
        """Look at the disk unless that was done in the last `age` seconds."""
        now = trio.current_time()
        layers = list(self._context.layers.values())
        if now - self._looked < age or not layers:
            return
        self._looked, self._since = now, self._pending
        options = self._context.options
        used = sum(layer.files.disk_usage() for layer in layers)
        self._context.counters.set("cache_bytes", used)
        self._hard = self._soft = UNLIMITED
        if options.cache_max_bytes:
            self._limit(options.cache_max_bytes - used, _headroom(options.cache_max_bytes))
        if options.cache_min_free_bytes:
            disk = os.fstatvfs(layers[0].files.blob_fd)
            left = disk.f_bavail * disk.f_frsize - options.cache_min_free_bytes
            self._limit(left, _headroom(disk.f_blocks * disk.f_frsize))

    def _limit(self, left: int, headroom: int) -> None:
        self._hard = min(self._hard, left)
        self._soft = min(self._soft, left - headroom)


def _headroom(size: int) -> int:
    """Return the headroom below a limit of `size` bytes: less where there is little to begin with."""
    return min(HEADROOM, size // 8)
