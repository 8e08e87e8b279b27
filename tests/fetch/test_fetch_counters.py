"""Names of counters and the histogram of waits."""

from __future__ import annotations

import os

import pytest

from snapshotter.counters import CounterPage
from snapshotter.fetch.counters import COUNTERS, GAUGES, NAMES, WAIT_NAMES, count_wait


def test_names_are_unique_and_all_there() -> None:
    assert len(set(NAMES)) == len(NAMES) == len(COUNTERS) + len(GAUGES)
    assert set(WAIT_NAMES) < set(COUNTERS)


@pytest.mark.parametrize(
    ("seconds", "bucket"),
    [
        (0.0, "wait_le_0.001s"),
        (0.001, "wait_le_0.001s"),
        (0.0011, "wait_le_0.002s"),
        (59.0, "wait_le_60s"),
        (61.0, "wait_longer"),
    ],
)
def test_a_wait_is_counted_in_its_bucket(seconds: float, bucket: str) -> None:
    fd = CounterPage.create("test", NAMES)
    page = CounterPage(fd, NAMES, writable=True)
    os.close(fd)
    count_wait(page, seconds)
    counts = {name: count for name, count in page.snapshot().items() if count}
    expected = {bucket: 1, "wait_count": 1}
    if seconds:
        expected["wait_microseconds"] = int(seconds * 1e6)
    assert counts == expected
    page.close()
