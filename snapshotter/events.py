"""A ring of what has just happened, in memory that outlives the process that tells.

The daemon makes it (a memfd) and hands it to the fetcher, which writes; whoever wants to see the last cold start
reads. Nothing is sent, nothing waits, and what a killed process has told stays told. When the ring is full the
oldest events go.

Concurrency: one thread writes. Readers may look at any time: the event that is being overwritten at that moment
is among the oldest ones, which a full ring does not show.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from enum import IntEnum
from typing import NamedTuple

from snapshotter.units import Digest

_HEAD = struct.Struct("<Q")
_RECORD = struct.Struct("<QQQIIIBx2x")
_CAPACITY = 8192
_UNSHOWN = 16
"""Of a full ring, how many of the oldest events are not shown: the writer may be at one of them."""

_SIZE = _HEAD.size + _CAPACITY * _RECORD.size


class Kind(IntEnum):
    """What an event is of. The number is stored."""

    WAIT = 1
    """A reader waited for a span, and got it."""
    WAIT_FAILED = 2
    """A reader waited for a span in vain."""
    ON_DEMAND = 3
    """A range that a reader waited for."""
    AHEAD = 4
    """A range ahead of a reader."""
    BACKGROUND = 5
    """A range of the rest of a layer."""


class Event(NamedTuple):
    """Something that took time. Spans [span, span + spans) of a layer; `size` in bytes, 0 where nothing was moved."""

    kind: Kind
    layer: str
    """The first 16 hexadecimal digits of its digest: enough to find it among those of a host."""
    start: float
    """Seconds of `time.monotonic`."""
    seconds: float
    span: int
    spans: int
    size: int


class EventRing:
    """The ring behind a descriptor."""

    def __init__(self, fd: int, *, writable: bool) -> None:
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._map = mmap.mmap(fd, _SIZE, flags=mmap.MAP_SHARED, prot=protection)
        self._count = _HEAD.unpack_from(self._map, 0)[0]

    @staticmethod
    def create(label: str) -> int:
        """Return the descriptor of a new, empty ring. The caller owns it. Pages cost memory when they are written."""
        fd = os.memfd_create(label, os.MFD_CLOEXEC)
        os.ftruncate(fd, _SIZE)
        return fd

    def add(
        self, kind: Kind, layer: Digest, seconds: float, span: int, spans: int = 1, size: int = 0
    ) -> None:
        """Tell of something that ends now and took `seconds`."""
        offset = _HEAD.size + self._count % _CAPACITY * _RECORD.size
        start_us = max(0, int((time.monotonic() - seconds) * 1e6))
        short = int(layer.partition(":")[2][:16], 16)
        _RECORD.pack_into(
            self._map, offset, start_us, short, size, min(int(seconds * 1e6), 0xFFFF_FFFF), span, spans, kind
        )
        self._count += 1
        _HEAD.pack_into(self._map, 0, self._count)

    def snapshot(self) -> list[Event]:
        """Return what the ring has, in the order in which it was told."""
        count = _HEAD.unpack_from(self._map, 0)[0]
        first = max(0, count - _CAPACITY + _UNSHOWN)
        return [self._event(number) for number in range(first, count)]

    def close(self) -> None:
        """Unmap the ring."""
        self._map.close()

    def _event(self, number: int) -> Event:
        offset = _HEAD.size + number % _CAPACITY * _RECORD.size
        start_us, short, size, took_us, span, spans, kind = _RECORD.unpack_from(self._map, offset)
        return Event(Kind(kind), f"{short:016x}", start_us / 1e6, took_us / 1e6, span, spans, size)
