"""How long the steps of a cold start take, and how often they fail.

The names are those that an operator would use; `reference_metrics.py` tells the same numbers under the reference's.

Concurrency: `timed` and `observe` may be called from any thread; a scrape reads copies.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

BUCKETS_S = tuple(2.0**exponent / 1000 for exponent in range(15))
"""Upper bounds, seconds: 1 ms to 16.384 s, which are the reference's; one more bucket takes the rest."""


_STEPS_KEPT = 1024
"""Some 8 for each layer; the largest images have a hundred layers."""


class Phase(StrEnum):
    """A step of making a layer lazy."""

    INDEX = "index"
    """Manifest and SOCI index of an image, from the registry or from disk."""
    ZTOC = "ztoc"
    """One zTOC from the registry."""
    COMPILE = "compile"
    """One zTOC into a tree."""
    SOURCE = "source"
    """Where a layer's blob is: a token, a redirect."""
    MOUNT = "mount"
    """The FUSE mount alone."""
    PROVIDE = "provide"
    """A whole lazy layer, from containerd's Prepare to its mount."""
    UNPACK = "unpack"
    """A layer that is not lazy: download and unpack."""


@dataclass(slots=True)
class Timings:
    """The histogram of one phase; `counts` has each observation in its own bucket alone."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))
    sum_s: float = 0.0
    failures: int = 0


class Step(NamedTuple):
    """One phase that is over; `start` in seconds of `time.monotonic`."""

    phase: Phase
    about: str
    """The layer's or the manifest's digest."""
    start: float
    seconds: float
    failed: bool


class Phases:
    """The timings of every phase since the daemon's start, and the last steps one by one."""

    def __init__(self) -> None:
        self._timings = {phase: Timings() for phase in Phase}
        self._steps: deque[Step] = deque(maxlen=_STEPS_KEPT)
        self._lock = threading.Lock()

    @contextmanager
    def timed(self, phase: Phase, about: str, *, answers: tuple[type[Exception], ...] = ()) -> Iterator[None]:
        """Time what is done inside for the digest `about`.

        What it raises goes on, and is a failure unless it is one of `answers`.
        """
        started = time.monotonic()
        failed = True
        try:
            yield
            failed = False
        except answers:
            failed = False
            raise
        finally:
            seconds = time.monotonic() - started
            with self._lock:
                self._steps.append(Step(phase, about, started, seconds, failed))
                self._timings[phase].failures += failed
            if not failed:
                self.observe(phase, seconds)

    def observe(self, phase: Phase, seconds: float) -> None:
        """Count one that took `seconds`."""
        with self._lock:
            timings = self._timings[phase]
            timings.counts[bisect_left(BUCKETS_S, seconds)] += 1
            timings.sum_s += seconds

    def steps(self) -> list[Step]:
        """Return the last steps, the one that ended first being the first."""
        with self._lock:
            return list(self._steps)

    def snapshot(self) -> Mapping[Phase, Timings]:
        """Return a copy of the timings by phase."""
        with self._lock:
            return {
                phase: Timings(list(each.counts), each.sum_s, each.failures)
                for phase, each in self._timings.items()
            }
