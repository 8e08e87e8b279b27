"""What the link gives, and what the background may therefore take. Pure: times are arguments.

The rate is measured over the time in which at least one transfer was under way, all connections together. A
sample can fall short of what the link gives for many reasons (round trips, a slow disk), and exceed it when
this process was kept from reading and then finds much at once. So the estimate is neither the mean nor the best
of the last samples, but their upper quartile.

Two modes. While nobody reads, the background may use all of the link: ranges long enough that the round
trip does not matter, and as many at once as have been seen to help (the width is tried upwards, and taken
back when the rate does not follow). While somebody reads, and a while after, it only takes what is *near*: the rest of
the layers that are being read, in short ranges, and while nothing is on its way to a reader. Most of what a program
that starts will read lies there, and it needs the processors at least as much as the link. If that goes on for
long, everything else gets one short range now and then. What is already under way is never abandoned; it is short
enough to be over soon.

Concurrency: the main loop only.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

MIB = 1 << 20

SAMPLE_SECONDS = 0.2
"""Busy time per sample: several round trips. On a machine with five runnable processes per CPU, samples of 0.1 s
saw up to five times the rate of a 50 Mbit/s link."""

SAMPLE_BYTES = MIB
MAX_SAMPLE_SECONDS = 2.0
"""A sample has many pieces of a body in it, unless the link is so slow that waiting for them says nothing."""

SAMPLES = 12
"""Samples that are looked at: two or three busy seconds, after which a slower or faster link is believed."""

RANGE_SECONDS = 0.3
"""Time one background range should take when nobody reads: fifteen round trips of 20 ms."""

BESIDE_SECONDS = 0.05
"""The same for a range beside readers: the most that an on-demand range is held up by one that is under way."""

PATIENT_SECONDS = 10.0
"""The background waits no longer than this for readers to become quiet. No measurement behind it: it is longer than
a program starts, and lets a layer that is always read from become complete all the same."""

MIN_RANGE = MIB
"""Below this a range is mostly round trip; a slow link has fewer of them rather than shorter ones. The first
ranges, before any sample, are twice as long."""

FIRST_WIDTH = 2
"""Background ranges at once before anything is known: one in transit while another is asked for."""

GAIN = 1.1
"""A wider background is kept if the rate rises at least so much."""

TRIAL = 3
"""Samples by which a width is judged; the first may still hold ranges of the width before."""

PATIENCE = 10
"""Trials until a width that did not help is tried again: about six seconds of full use."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """What the background may have under way: `ranges` at once, of `size` bytes each."""

    ranges: int
    size: int
    near: bool = False
    """Only of layers that are being read."""


class Link:
    """Estimates one link from the transfers of one process."""

    def __init__(self, *, max_width: int, max_range: int, quiet_s: float) -> None:
        self._quiet_s = quiet_s
        self._max_width = max_width
        self._max_range = max_range
        self._samples: deque[float] = deque(maxlen=SAMPLES)
        self._transfers = 0
        self._busy_since = 0.0
        self._window_bytes = 0
        self._window_busy = 0.0
        self._width = min(FIRST_WIDTH, max_width)
        self._trial: list[float] = []
        self._narrow_rate = 0.0
        """Mean rate of one range fewer, while a width is on trial; 0 when none is."""
        self._patience = 0
        self._readers_until = float("-inf")
        self._background_since = float("-inf")
        """When the background last had a range, or nothing to wait for."""

    @property
    def rate(self) -> float:
        """Bytes per second, 0 while nothing has been measured."""
        return sorted(self._samples)[len(self._samples) * 3 // 4] if self._samples else 0.0

    @property
    def width(self) -> int:
        """Background ranges at once while nobody reads."""
        return self._width

    def active(self, now: float) -> None:
        """Somebody reads, or is about to."""
        if now >= self._readers_until:
            self._background_since = now
        self._readers_until = now + self._quiet_s

    def started(self, now: float, *, reader: bool) -> None:
        """A transfer begins; `reader` says that it is for one, or ahead of one."""
        if self._transfers == 0:
            self._busy_since = now
        self._transfers += 1
        if not reader:
            self._background_since = now

    def received(self, now: float, size: int) -> None:
        """`size` more bytes have come on one of the transfers."""
        self._window_bytes += size
        self._sample(now)

    def ended(self, now: float, *, reader: bool) -> None:
        """A transfer is over."""
        self._sample(now)
        self._transfers -= 1
        if self._transfers == 0:
            self._window_busy += now - self._busy_since
        if reader:
            self.active(now)

    def quiet_at(self) -> float:
        """Return the time from which the background has a range to expect, if no reader comes until then."""
        return min(self._readers_until, self._background_since + PATIENT_SECONDS)

    def background(self, now: float, *, reader_bytes: int) -> Allowance:
        """Return what the background may have under way while `reader_bytes` are on their way to readers."""
        rate = self.rate
        if reader_bytes == 0 and now >= self._readers_until:
            share = int(rate * RANGE_SECONDS) if rate else 2 * MIN_RANGE * self._width
            ranges = min(max(share // MIN_RANGE, 1), self._width)
            return Allowance(ranges, min(max(share // ranges, MIN_RANGE), self._max_range))
        size = min(max(int(rate * BESIDE_SECONDS), MIN_RANGE // 4) if rate else MIN_RANGE, self._max_range)
        if now >= self._background_since + PATIENT_SECONDS:
            return Allowance(1, size)
        return Allowance(min(FIRST_WIDTH, self._max_width) if reader_bytes == 0 else 0, size, near=True)

    def ahead_room(self, in_flight: int) -> int:
        """Return how many bytes may be asked for ahead of readers while `in_flight` bytes are on their way."""
        return (int(self.rate * RANGE_SECONDS) or 2 * MIN_RANGE) - in_flight

    def _sample(self, now: float) -> None:
        if self._transfers == 0:
            return
        busy = self._window_busy + (now - self._busy_since)
        if busy < SAMPLE_SECONDS or (self._window_bytes < SAMPLE_BYTES and busy < MAX_SAMPLE_SECONDS):
            return
        rate = self._window_bytes / busy
        self._samples.append(rate)
        self._window_bytes, self._window_busy, self._busy_since = 0, 0.0, now
        if self._transfers >= self._width:
            self._steer(rate)

    def _steer(self, rate: float) -> None:
        """Widen while it helps; take one step back when it does not, and be patient then."""
        self._trial.append(rate)
        if len(self._trial) < TRIAL:
            return
        mean, before = sum(self._trial) / TRIAL, self._narrow_rate
        self._trial.clear()
        self._narrow_rate = 0.0
        if before and mean < before * GAIN:
            self._width -= 1
            self._patience = PATIENCE
        elif self._patience > 0:
            self._patience -= 1
        elif self._width < self._max_width:
            self._narrow_rate = mean
            self._width += 1
