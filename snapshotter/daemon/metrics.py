"""Our metrics: what the counters of all processes say, at the moment of a scrape.

No process but the daemon knows Prometheus; they count into shared pages (snapshotter/counters.py), and this
collector reads the pages. Every label has a fixed set of values: nothing here grows with images or layers.

Concurrency: a scrape runs in a thread of the server (`web.py`) and reads snapshots of plain numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from snapshotter.daemon.credentials import Family
from snapshotter.daemon.phases import BUCKETS_S, Phase, Timings
from snapshotter.fetch.counters import GAUGES, OFFLINE_BUCKETS, OFFLINE_NAMES, WAIT_BUCKETS, WAIT_NAMES
from snapshotter.fuse.counters import NAMES, REQUEST_KINDS


class Numbers(Protocol):
    """Where the numbers come from."""

    def mounts(self) -> Mapping[str, int]:
        """Return how many lazy mounts there are, by state."""

    def served(self) -> Mapping[str, int]:
        """Return the layer servers' counters, summed over all mounts that are or were."""

    def fetched(self) -> Mapping[str, int]:
        """Return the fetcher's counters."""

    def fallbacks(self) -> Mapping[str, int]:
        """Return how often a layer was not lazy, by reason."""

    def phases(self) -> Mapping[Phase, Timings]:
        """Return how long the steps of cold starts took."""

    def registry(self) -> Iterator[Family]:
        """Yield what is known of hosts and keychains."""


class Collector:
    """Turns numbers into metric families."""

    def __init__(self, numbers: Numbers) -> None:
        self._numbers = numbers

    def collect(self) -> Iterator[Metric]:
        """Yield every family."""
        mounts = GaugeMetricFamily("soci_lazy_mounts", "Lazy mounts by what they do.", labels=["state"])
        for state, count in sorted(self._numbers.mounts().items()):
            mounts.add_metric([state], count)
        yield mounts
        served = {**dict.fromkeys(NAMES, 0), **self._numbers.served()}
        requests = CounterMetricFamily(
            "soci_fuse_requests", "FUSE requests that reached a server.", labels=["kind"]
        )
        failures = CounterMetricFamily("soci_fuse_failures", "FUSE requests that failed.", labels=["kind"])
        for kind in REQUEST_KINDS:
            requests.add_metric([kind], served.get(f"requests_{kind}", 0))
            failures.add_metric([kind], served.get(f"failures_{kind}", 0))
        yield requests
        yield failures
        for name, value in served.items():
            if not name.startswith(("requests_", "failures_")):
                yield _plain("soci_serve_", name, value, gauge=name in SERVER_GAUGES)
        fetched = self._numbers.fetched()
        for name, value in fetched.items():
            if not name.startswith(("wait_", "offline_")):
                yield _plain("soci_fetch_", name, value, gauge=name in GAUGES)
        yield _waits(fetched)
        yield _offline(fetched)
        fallbacks = CounterMetricFamily(
            "soci_not_lazy_layers", "Layers not served lazily.", labels=["reason"]
        )
        for reason, count in sorted(self._numbers.fallbacks().items()):
            fallbacks.add_metric([reason], count)
        yield fallbacks
        yield from _phases(self._numbers.phases())
        for numbers in self._numbers.registry():
            family = CounterMetricFamily if numbers.is_counter else GaugeMetricFamily
            labelled = family(numbers.name, numbers.doc, labels=numbers.labels)
            for values, number in sorted(numbers.rows):
                labelled.add_metric(values, float(number))
            yield labelled


SERVER_GAUGES = frozenset({"reads_waiting"})
"""Of the servers' counters, those that go down as well."""


def _plain(prefix: str, name: str, value: float, *, gauge: bool) -> Metric:
    if name.endswith("_us"):  # Prometheus wants base units
        name, value = name.removesuffix("us") + "seconds", value / 1e6
    family = GaugeMetricFamily if gauge else CounterMetricFamily
    return family(prefix + name, f"{name.replace('_', ' ').capitalize()}.", value=value)


def _phases(phases: Mapping[Phase, Timings]) -> Iterator[Metric]:
    durations = HistogramMetricFamily("soci_phase_seconds", "Steps of cold starts.", labels=["phase"])
    failures = CounterMetricFamily(
        "soci_phase_failures", "Steps of cold starts that failed.", labels=["phase"]
    )
    for phase, timings in phases.items():
        durations.add_metric([phase], cumulative(BUCKETS_S, timings.counts), timings.sum_s)
        failures.add_metric([phase], timings.failures)
    yield durations
    yield failures


def cumulative(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    """Return Prometheus' buckets, each with those below it, of counts of each bucket alone (the last: the rest)."""
    sums = accumulate(counts)
    return [(bound, float(total)) for bound, total in zip((*map(str, bounds), "+Inf"), sums, strict=True)]


def _waits(fetched: Mapping[str, int]) -> Metric:
    """Return the histogram of how long readers waited for spans, in seconds."""
    family = HistogramMetricFamily(
        "soci_fetch_wait_seconds", "Waits of readers for a span that was not there."
    )
    buckets = cumulative(WAIT_BUCKETS, [fetched.get(name, 0) for name in WAIT_NAMES])
    family.add_metric([], buckets, fetched.get("wait_microseconds", 0) / 1e6)
    return family


def _offline(fetched: Mapping[str, int]) -> Metric:
    """Return the histogram of how long layers needed the network, in seconds."""
    family = HistogramMetricFamily(
        "soci_layer_offline_seconds",
        "From a layer's first mount until it was complete and verified, and needed the network no more.",
    )
    buckets = cumulative(OFFLINE_BUCKETS, [fetched.get(name, 0) for name in OFFLINE_NAMES])
    family.add_metric([], buckets, fetched.get("offline_milliseconds", 0) / 1e3)
    return family
