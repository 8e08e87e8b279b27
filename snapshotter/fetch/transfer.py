"""One range on its way: the bytes of neighbouring spans, each handed on as soon as it is whole.

The main loop makes a transfer and may cut it short; one thread runs it. Both sides meet in a lock around two
numbers: the span that is arriving, and the span before which to stop. A cut never gives up the span that
is arriving, so it wastes nothing but what the sockets have buffered.

The range begins at the first byte of the blob when span 0 is in it: the bytes before span 0 belong to no
span, and are needed for the layer's digest.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import TypeAlias

from snapshotter.fetch.flight import Flight
from snapshotter.fetch.layerstate import ActiveLayer
from snapshotter.fetch.memory import Buffers
from snapshotter.fetch.readers import Reader
from snapshotter.fetch.schedule import Priority
from snapshotter.registry.ranges import RangeClient
from snapshotter.registry.source import BlobSource

Deliver: TypeAlias = Callable[[Flight[Reader], memoryview, memoryview], None]
"""Takes a whole span: its flight, its bytes, and the blob's bytes before span 0 if they came with it."""


class _Cut(Exception):
    """Not an error: it leaves a read in the middle, because the rest is not wanted any more."""


class Transfer:
    """The spans of `flights`, which are neighbours in this order, in one request.

    `run` belongs to one thread, which writes `received` (anybody may read it); what both sides change is behind
    the lock; the rest is the main loop's.
    """

    def __init__(
        self,
        layer: ActiveLayer,
        flights: list[Flight[Reader]],
        priority: Priority,
        buffers: Buffers,
        *,
        now: float,
    ) -> None:
        self.layer = layer
        self.flights = flights
        self.priority = priority
        self.generation = layer.source.generation
        """Of the source that it uses."""
        self.mirror = "" if layer.source.source is None else layer.source.source.mirror
        """The mirror that gave that source; empty for the registry itself."""
        self.host = layer.source.source.host if layer.source.source is not None else ""
        self.started = now
        self.counted = 0
        """Bytes that the link's estimate and the counters know of."""
        self.admitted = 0
        """Bytes set aside for it on disk; 0: nothing of it is stored."""
        self.written = 0
        """Spans that have come back from a worker."""
        self.ended = False
        spans = [layer.files.span(flight.span) for flight in flights]
        self.start_byte = spans[0].compressed_start if spans[0].id else 0
        self._header_size = spans[0].compressed_start - self.start_byte
        self._bounds = [
            (span.compressed_start - self.start_byte, span.compressed_end - self.start_byte) for span in spans
        ]
        self.size = self._bounds[-1][1]
        self.buffer = buffers.take(self.size)
        """Free again when `ended`, and every span that was delivered is `written`."""
        self.received = 0
        self._lock = Lock()
        self._arriving = 0
        self._limit = len(flights)

    @property
    def background(self) -> bool:
        """Whether it uses a background connection."""
        return self.priority is Priority.BACKGROUND

    def run(self, client: RangeClient, source: BlobSource, deadline: float, deliver: Deliver) -> None:
        """Read the range once and deliver its spans in order (thread). `deadline` is of `time.monotonic`.

        Raises RegistryError as `RangeClient.read` does; what was delivered until then stays delivered.
        """
        buffer = self.buffer.view[: self.size]
        header = buffer[: self._header_size]

        def progress(count: int) -> None:
            self.received += count
            while (index := self._whole(self.received)) is not None:
                start, stop = self._bounds[index]
                deliver(self.flights[index], buffer[start:stop], header if index == 0 else header[:0])

        end_byte = self.start_byte + self.size
        try:
            client.read(
                source, self.start_byte, end_byte, deadline=deadline, into=buffer, on_progress=progress
            )
        except _Cut:
            return

    def undelivered(self) -> list[Flight[Reader]]:
        """Return the flights that were neither delivered nor given up, the arriving one first."""
        with self._lock:
            return self.flights[self._arriving : self._limit]

    def delivered(self) -> int:
        """Return how many spans were handed on."""
        with self._lock:
            return self._arriving

    def cut(self) -> list[Flight[Reader]]:
        """Stop behind the span that is arriving (main loop); return the flights that are given up."""
        with self._lock:
            given_up = self.flights[self._arriving + 1 : self._limit]
            self._limit -= len(given_up)
            return given_up

    def distance(self, span: int) -> int:
        """Return how many bytes have to arrive before the first byte of `span` does."""
        return max(self._bounds[span - self.flights[0].span][0] - self.received, 0)

    def remaining(self) -> int:
        """Return how many bytes are still to come."""
        return self.size - self.received

    def _whole(self, received: int) -> int | None:
        """Return the index of the arriving span once all its bytes are there, and go on to the next (thread).

        Raises _Cut when there is none left and the range goes on.
        """
        with self._lock:
            index = self._arriving
            if index == self._limit:
                if index < len(self.flights):
                    raise _Cut
                return None
            if received < self._bounds[index][1]:
                return None
            self._arriving += 1
            return index
