"""The reference's metrics under its own names and labels, so that dashboards made for it go on working.

Where the reference gives every layer series of its own for ever, the label is empty here ("" is its own word for
"the whole daemon"), and only what is mounted now has series by image or layer. Operations that have no
counterpart are left out; docs/metrics.md lists both. Some of its names are not what Prometheus asks of a name
(milliseconds, a counter without `_total`): they are facts by now, and exported as untyped where they must be.

Concurrency: as metrics.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

from prometheus_client.core import HistogramMetricFamily, Metric

from snapshotter.daemon.metrics import cumulative
from snapshotter.daemon.phases import BUCKETS_S, Phase, Timings
from snapshotter.units import Digest

DURATIONS: Mapping[str, Phase] = {
    "mount": Phase.PROVIDE,
    "init_metadata_store": Phase.COMPILE,
    "fuse_mount": Phase.MOUNT,
    "blob_redirect": Phase.SOURCE,
    "soci_index_fetch": Phase.INDEX,
    "ztoc_fetch": Phase.ZTOC,
}
"""`operation_type` of soci_fs_operation_duration_milliseconds -> our phase."""

SERVED: Mapping[str, str] = {
    "synchronous_read_count": "requests_read",
    "synchronous_read_remote_registry_fetch_count": "spans_awaited",
    "fuse_node_getattr_failure_count": "failures_getattr",
    "fuse_node_listxattr_failure_count": "failures_listxattr",
    "fuse_node_lookup_failure_count": "failures_lookup",
    "fuse_node_open_failure_count": "failures_open",
    "fuse_node_readdir_failure_count": "failures_readdir",
    "fuse_file_read_failure_count": "failures_read",
    "fuse_unknown_operation_failure_count": "failures_other",
}
"""`operation_type` of soci_fs_operation_count -> our counter of layer servers."""

FETCHED: Mapping[str, str] = {"background_span_fetch_count": "background_ranges"}
"""The same for the fetcher's counters."""

FALLBACKS: Mapping[str, str] = {
    "fuse_mount_failure_count": "mount-failed",
    "local_mount_failure_count": "unpack-failed",
}
"""The same for reasons why a layer was not lazy."""

IMAGE_OPERATIONS: Mapping[str, str] = {
    "node.Getattr": "requests_getattr",
    "node.Getxattr": "requests_getxattr",
    "node.Listxattr": "requests_listxattr",
    "node.Lookup": "requests_lookup",
    "node.Open": "requests_open",
    "node.Readdir": "requests_readdir",
    "node.Readlink": "requests_readlink",
    "file.Read": "requests_read",
}
"""`operation_type` of soci_fs_image_operation_count_key -> our counter of layer servers."""


class LayerNumbers(NamedTuple):
    """One mounted layer: sizes in bytes, `fetched` of its compressed blob."""

    layer: Digest
    image: str
    """Digest of the manifest for which it was mounted."""
    target: str
    size: int
    fetched: int
    counters: Mapping[str, int]


class ReferenceNumbers(Protocol):
    """Where the numbers come from."""

    def served(self) -> Mapping[str, int]:
        """Return the layer servers' counters, summed over all mounts that are or were."""

    def fetched(self) -> Mapping[str, int]:
        """Return the fetcher's counters."""

    def fallbacks(self) -> Mapping[str, int]:
        """Return how often a layer was not lazy, by reason."""

    def phases(self) -> Mapping[Phase, Timings]:
        """Return how long the steps of cold starts took."""

    def layers(self) -> Iterable[LayerNumbers]:
        """Return what is mounted."""


class ReferenceCollector:
    """Turns numbers into the reference's families."""

    def __init__(self, numbers: ReferenceNumbers) -> None:
        self._numbers = numbers

    def collect(self) -> Iterator[Metric]:
        """Yield every family."""
        yield self._durations()
        served = self._numbers.served()
        yield self._counts(served)
        bytes_served = _untyped("soci_fs_bytes_served", "Bytes handed to readers.")
        _add(bytes_served, served.get("read_bytes", 0), operation_type="synchronous_bytes_served", layer="")
        yield bytes_served
        yield from self._by_image_and_layer()

    def _durations(self) -> Metric:
        family = HistogramMetricFamily(
            "soci_fs_operation_duration_milliseconds",
            "Operations of the snapshotter.",
            labels=["operation_type", "layer"],
        )
        phases = self._numbers.phases()
        for name, phase in DURATIONS.items():
            buckets = cumulative([bound * 1000 for bound in BUCKETS_S], phases[phase].counts)
            family.add_metric([name, ""], buckets, phases[phase].sum_s * 1000)
        return family

    def _counts(self, served: Mapping[str, int]) -> Metric:
        family = _untyped("soci_fs_operation_count", "Operations of the snapshotter.")
        sources = (SERVED, served), (FETCHED, self._numbers.fetched()), (FALLBACKS, self._numbers.fallbacks())
        for names, numbers in sources:
            for name, ours in names.items():
                _add(family, numbers.get(ours, 0), operation_type=name, layer="")
        return family

    def _by_image_and_layer(self) -> Iterator[Metric]:
        images: dict[str, dict[str, int]] = {}
        sizes = _untyped("soci_fs_layer_size_bytes", "Compressed bytes of each mounted layer.")
        fetched = _untyped("soci_fs_layer_fetched_size_bytes", "How many of them are on this host.")
        for each in self._numbers.layers():
            _add(sizes, each.size, digest=each.layer, mountpoint=each.target)
            _add(fetched, each.fetched, digest=each.layer, mountpoint=each.target)
            sums = images.setdefault(each.image, dict.fromkeys(IMAGE_OPERATIONS.values(), 0))
            for ours in sums:  # of all its counters these alone: hundreds of mounts are scraped at once
                sums[ours] += each.counters.get(ours, 0)
        operations = _untyped("soci_fs_image_operation_count_key", "FUSE requests by mounted image.")
        for image, counters in sorted(images.items()):
            for name, ours in IMAGE_OPERATIONS.items():
                _add(operations, counters[ours], operation_type=name, image=image)
        yield operations
        yield sizes
        yield fetched


def _untyped(name: str, documentation: str) -> Metric:
    return Metric(name, documentation, "unknown")


def _add(family: Metric, value: float, **labels: str) -> None:
    family.add_sample(family.name, labels, value)
