"""The ring of events: what was told is there, also for another process, and the newest replace the oldest."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from snapshotter.events import EventRing, Kind
from snapshotter.units import sha256_digest

LAYER = sha256_digest(b"a layer")


@pytest.fixture
def fd() -> Iterator[int]:
    made = EventRing.create("test")
    yield made
    os.close(made)


def test_events_are_told_whole(fd: int) -> None:
    ring = EventRing(fd, writable=True)
    before = time.monotonic()
    ring.add(Kind.WAIT, LAYER, 0.25, span=7)
    ring.add(Kind.BACKGROUND, LAYER, 1.5, span=8, spans=3, size=5 << 32)
    wait, background = EventRing(fd, writable=False).snapshot()
    assert (wait.kind, wait.span, wait.spans, wait.size) == (Kind.WAIT, 7, 1, 0)
    assert wait.layer == LAYER.partition(":")[2][:16]
    assert wait.seconds == 0.25
    assert 0 <= wait.start + wait.seconds - before < 60
    assert (background.kind, background.spans, background.size) == (Kind.BACKGROUND, 3, 5 << 32)


def test_an_empty_ring_has_nothing(fd: int) -> None:
    assert EventRing(fd, writable=False).snapshot() == []


def test_the_newest_replace_the_oldest(fd: int) -> None:
    ring = EventRing(fd, writable=True)
    for number in range(20_000):
        ring.add(Kind.WAIT, LAYER, 0, span=number)
    spans = [event.span for event in ring.snapshot()]
    assert spans == list(range(20_000 - len(spans), 20_000))
    assert len(spans) > 8000


def test_a_successor_goes_on_where_a_killed_writer_was(fd: int) -> None:
    program = (
        "import os, sys; from snapshotter.events import EventRing, Kind\n"
        "EventRing(int(sys.argv[1]), writable=True).add(Kind.WAIT, sys.argv[2], 0, span=1)\n"
        "os.kill(os.getpid(), 9)"
    )
    for _ in range(2):
        subprocess.run([sys.executable, "-c", program, str(fd), LAYER], pass_fds=[fd], check=False)
    EventRing(fd, writable=True).add(Kind.ON_DEMAND, LAYER, 0, span=2)
    assert [event.span for event in EventRing(fd, writable=False).snapshot()] == [1, 1, 2]


def test_a_reader_cannot_write(fd: int) -> None:
    with pytest.raises(TypeError):
        EventRing(fd, writable=False).add(Kind.WAIT, LAYER, 0, span=1)


def test_numbers_that_are_too_large_do_not_fail(fd: int) -> None:
    ring = EventRing(fd, writable=True)
    ring.add(Kind.WAIT, LAYER, 1e6, span=1)
    assert ring.snapshot()[0].seconds == pytest.approx(4294.967295)
