"""How far to read ahead of a reader. Pure: no clock, no I/O.

A layer is read by many programs at once, and its server does not say which of them a read belongs to. What
can be seen is where reads happen, so a *stream* is recognised by its place: a read or first touch that falls
where an earlier one predicted continues that stream, anything else starts a new one. A new stream asks for
little; each confirmed prediction doubles its window. The rest of the file comes first, then what follows in
tar order: programs are packed in the order of their directories, and often read that way.

As in the kernel, the next piece is asked for when half of the window is used up, so that pieces are large
and come before they are needed.

Concurrency: the main loop only, one object per open layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FIRST_WINDOW = 1
"""Spans asked for beyond the first miss of a stream. A span is some MiB of files: one is already a guess."""

MAX_WINDOW = 16
"""64 MiB of inflated data at the usual span size: more than a program uses while a range is on its way."""

PROVEN_WINDOW = 4
"""From here on (two confirmed predictions) spans behind the file's end are inflated too, not only fetched."""

MAX_STREAMS = 16
"""Streams remembered per layer; the one that was quiet longest is replaced. No measurement behind it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Spans to ask for now: `[first, inflate_end)` inflated, `[inflate_end, end)` compressed only."""

    first: int
    inflate_end: int
    end: int


@dataclass(slots=True, eq=False)
class _Stream:
    position: int
    """The span behind the last one that was read."""
    reach: int
    """The span behind the last one that was asked for."""
    file_end: int = 0
    """The span behind the file that was read last."""
    window: int = FIRST_WINDOW

    def advance(self, position: int) -> None:
        """A read went on to `position`; a step forward confirms the prediction."""
        if position > self.position:
            self.window = min(2 * self.window, MAX_WINDOW)
            self.position = position
            self.reach = max(self.reach, position)


class ReadAhead:
    """The streams of one layer."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes
        self._streams: list[_Stream] = []
        """The most recently active one is last."""

    def want(self, first: int, end: int, file_end: int, room: int) -> Plan | None:
        """A reader is blocked on `[first, end)` of a file that goes on to `file_end`.

        `room` is how many compressed bytes may be asked for; the plan never exceeds it.
        """
        stream = self._find(first)
        if stream is None:
            stream = _Stream(position=end, reach=end)
            self._streams.append(stream)
            del self._streams[:-MAX_STREAMS]
        else:
            stream.advance(end)
        stream.file_end = file_end
        return self._extend(stream, room)

    def touch(self, span: int, room: int) -> Plan | None:
        """A reader used `span` for the first time without having to wait for it."""
        stream = self._find(span)
        if stream is None:
            return None
        stream.advance(span + 1)
        return self._extend(stream, room)

    def _find(self, span: int) -> _Stream | None:
        """Return the stream that predicted a read of `span`, or just had one, and make it the latest."""
        for stream in reversed(self._streams):
            if stream.position - 1 <= span <= stream.reach:
                self._streams.remove(stream)
                self._streams.append(stream)
                return stream
        return None

    def _extend(self, stream: _Stream, room: int) -> Plan | None:
        if stream.reach - stream.position > stream.window // 2:
            return None
        first = stream.reach
        goal = min(stream.position + stream.window, len(self._sizes))
        end = first
        while end < goal and self._sizes[end] <= room:
            room -= self._sizes[end]
            end += 1
        if end == first:
            return None
        stream.reach = end
        inflate_end = end if stream.window >= PROVEN_WINDOW else min(max(stream.file_end, first), end)
        return Plan(first, inflate_end, end)
