"""What the fetcher counts, by name, in the order of its counter page.

Concurrency: the page is written by the main loop only (`snapshotter/counters.py` says why); threads hand
their numbers over with their results.
"""

from __future__ import annotations

from bisect import bisect_left

from snapshotter.counters import CounterPage

WAIT_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the histogram of waits, seconds; one more bucket takes the rest."""

WAIT_NAMES = (*(f"wait_le_{bound:g}s" for bound in WAIT_BUCKETS), "wait_longer")
"""Counters of the histogram. Each counts the waits of its own bucket alone, not those below it too."""

OFFLINE_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
"""The same of how long layers needed the network, seconds."""

OFFLINE_NAMES = (*(f"offline_le_{bound:g}s" for bound in OFFLINE_BUCKETS), "offline_longer")

COUNTERS = (
    # What went over the link. Bytes are those that arrived, also of ranges that failed half way.
    "ondemand_ranges",
    "ondemand_bytes",
    "background_ranges",
    "background_bytes",
    "ahead_spans",  # spans asked for ahead of a reader
    "cut_ranges",  # ended early, because a reader wanted something behind what was arriving
    # What spans came to.
    "wants",  # spans that readers asked for
    "spans_from_cache",  # of these, how many were usable at once
    "spans_fetched",
    "spans_inflated",
    "spans_doubted",  # inflated, and still a server could not read them
    "spans_checked",  # suspect or doubted ones that were hashed again
    "spans_damaged",  # of these, how many were no longer right
    "spans_lent",  # served from memory, because the disk had no room
    "evicted_data_spans",  # inflated bytes given up to make room
    "evicted_blob_spans",  # compressed bytes given up to make room
    "layers_reopened",  # cache files of theirs were deleted while they were open
    "layers_verified",
    "layers_mismatched",  # complete, every span right, and still not the layer's digest
    # What went wrong.
    "retries",
    "circuits_opened",  # hosts that failed some times in a row, and were left alone from then on
    "failures",  # spans whose waiters were told that they cannot have them
    "budget_exceeded",  # of these, how many because the read's time was up
    "digest_mismatches",
    "inflate_errors",
    "range_not_honoured",
    "source_renewals",
    "mirrors_passed_over",
    "source_errors",
    "disk_full",
    "bad_messages",
    # How long readers waited for a span that was not usable at once.
    *WAIT_NAMES,
    "wait_count",
    "wait_microseconds",
    # How long layers were mounted until they were verified.
    *OFFLINE_NAMES,
    "offline_milliseconds",
)

GAUGES = (
    "layers_open",
    "hosts_away",  # hosts left alone at the moment
    "cache_bytes",  # on disk, at the last look
    "readers",
    "spans_under_way",
    "queued_ondemand",
    "queued_ahead",
    "queued_background",
    "transfers_ondemand",
    "transfers_background",
    "memory_bytes",  # of ranges under way or waiting for a worker
    "memory_idle_bytes",  # kept for the next ranges
    "link_bytes_per_second",
    "background_width",
)

NAMES = (*COUNTERS, *GAUGES)
"""All of them; the daemon makes the page with these."""


def count_wait(page: CounterPage, seconds: float) -> None:
    """Count one wait of a reader for one span."""
    index = bisect_left(WAIT_BUCKETS, seconds)
    page.add(WAIT_NAMES[index])
    page.add("wait_count")
    page.add("wait_microseconds", int(seconds * 1e6))


def count_offline(page: CounterPage, seconds: float) -> None:
    """Count a layer that needs the network no more, so long after it was first mounted."""
    page.add(OFFLINE_NAMES[bisect_left(OFFLINE_BUCKETS, seconds)])
    page.add("offline_milliseconds", int(seconds * 1e3))
