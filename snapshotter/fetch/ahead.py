"""How far to read ahead of a reader. Pure: no clock, no I/O.

A layer is read by many programs at once, and its server does not say which of them a read belongs to. What
can be seen is where reads happen, so a *stream* is recognised by its place: a read or first touch that falls
where an earlier one predicted continues that stream, anything else starts a new one. A new stream asks for
little; each confirmed prediction doubles its window. The rest of the file comes first, then what follows in
tar order: programs are packed in the order of their directories, and often read that way.

How often the first guess of a stream was right is remembered: where it mostly is wrong (random reads of a large
file), only every few streams guess at all, so that what is fetched for nothing stays a fraction.

As in the kernel, the next piece is asked for when half of the window is used up, so that pieces are large
and come before they are needed.

Concurrency: the main loop only, one object per open layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FIRST_WINDOW = 4
"""Spans asked for beyond the first miss of a stream. Of 1, 4 and 8, a program of 319 spans waited 138, 79 and 62 times
and fetched 1.23, 1.29 and 1.37 times the bytes of what it used (docs/performance.md)."""

MAX_WINDOW = 16
"""64 MiB of inflated data at the usual span size: more than a program uses while a range is on its way."""

BEYOND_WINDOW = 4
"""Most spans asked for beyond the end of the file: programs stop reading at the end of a file more often than
anywhere else, and what then has come for nothing is a few spans instead of many."""

PROVEN_WINDOW = 2 * FIRST_WINDOW
"""From here on (one confirmed prediction) spans behind the file's end are inflated too, not only fetched."""

MAX_STREAMS = 16
"""Streams remembered per layer; the one that was quiet longest is replaced. No measurement behind it."""

TRUST = 0.25
"""Least share of right first guesses with which every new stream guesses; below it, only every PROBE-th."""

PROBE = 8 * FIRST_WINDOW
"""Random reads then fetch an eighth of a span each for nothing."""

MEMORY = 8
"""Guesses over which that share is about averaged."""

JUDGED_AFTER = 4
"""Streams that begin after one until its guess counts as wrong. None of the four has a measurement behind it."""


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
    confirmed: bool = False
    """Whether a read came where the first guess was."""

    def advance(self, position: int) -> None:
        """A read went on to `position`; a step forward confirms the prediction."""
        if position > self.position:
            self.confirmed = True
            self.window = min(2 * self.window, MAX_WINDOW)
            self.position = position
            self.reach = max(self.reach, position)


class ReadAhead:
    """The streams of one layer."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes
        self._streams: list[_Stream] = []
        """The most recently active one is last."""
        self._recent: list[_Stream] = []
        """Those whose first guess has not been judged, in the order in which they began."""
        self._share = 0.5
        """Of first guesses that were right."""
        self._unguessed = 0
        """New streams since one that guessed."""

    def want(self, first: int, end: int, file_end: int, room: int) -> Plan | None:
        """A reader is blocked on `[first, end)` of a file that goes on to `file_end`.

        `room` is how many compressed bytes may be asked for; a plan exceeds it by at most one span.
        """
        stream = self._find(first)
        if stream is None:
            stream = self._begin(end)
        else:
            stream.advance(end)
        stream.file_end = file_end
        if not stream.confirmed and not self._guesses():
            return None
        return self._extend(stream, room)

    def touch(self, span: int, room: int) -> Plan | None:
        """A reader used `span` for the first time without having to wait for it."""
        stream = self._find(span)
        if stream is None:
            return None
        stream.advance(span + 1)
        return self._extend(stream, room)

    def _begin(self, position: int) -> _Stream:
        """Start a stream at `position`; see whether the guess of an earlier one was right."""
        self._recent.append(_Stream(position=position, reach=position))
        if len(self._recent) > JUDGED_AFTER:
            self._share += (self._recent.pop(0).confirmed - self._share) / MEMORY
        self._streams.append(self._recent[-1])
        del self._streams[:-MAX_STREAMS]
        return self._recent[-1]

    def _guesses(self) -> bool:
        """Say whether a stream of which nothing is known yet is worth a guess."""
        self._unguessed += 1
        if self._share < TRUST and self._unguessed < PROBE:
            return False
        self._unguessed = 0
        return True

    def _find(self, span: int) -> _Stream | None:
        """Return the stream that predicted a read of `span`, or just had one, and make it the latest."""
        for stream in reversed(self._streams):
            if stream.position - 1 <= span <= stream.reach:
                self._streams.remove(stream)
                self._streams.append(stream)
                return stream
        return None

    def _extend(self, stream: _Stream, room: int) -> Plan | None:
        beyond = max(stream.file_end - stream.position, 0) + BEYOND_WINDOW
        window = min(stream.window, beyond)
        first = end = stream.reach
        if first - stream.position > window // 2:
            return None
        goal = min(stream.position + window, len(self._sizes))
        if stream.confirmed and first == stream.position < goal:
            # However slow the link: a program that reads on can think while its next span comes.
            room = max(room, self._sizes[first])
        while end < goal and self._sizes[end] <= room:
            room -= self._sizes[end]
            end += 1
        if end == first:
            return None
        stream.reach = end
        inflate_end = end if stream.window >= PROVEN_WINDOW else min(max(stream.file_end, first), end)
        return Plan(first, inflate_end, end)
