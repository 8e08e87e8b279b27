"""Where the metrics get their numbers: the parts of the daemon, asked at the moment of a scrape.

It owns the sums over mounts that have ended, and remembers of which image each mount is.

Concurrency: called from the threads of `web.py`, while the loop changes what is looked at; every look is at a copy.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress

from snapshotter.daemon.credentials import Family
from snapshotter.daemon.fetching import FetcherProcess
from snapshotter.daemon.phases import Phase, Phases, Timings
from snapshotter.daemon.provider import Provider
from snapshotter.daemon.reasons import REASONS
from snapshotter.daemon.reference_metrics import LayerNumbers
from snapshotter.daemon.totals import Totals
from snapshotter.fuse.counters import NAMES
from snapshotter.fuse.keeper import Keeper
from snapshotter.snapshot.store import SnapshotStore


class Numbers:
    """The numbers of one daemon."""

    def __init__(
        self,
        *,
        keeper: Keeper,
        fetcher: FetcherProcess,
        provider: Provider,
        store: SnapshotStore,
        phases: Phases,
        registry: Callable[[], Iterator[Family]],
    ) -> None:
        self._keeper = keeper
        self._fetcher = fetcher
        self._provider = provider
        self._store = store
        self._phases = phases
        self.registry = registry
        """What is known of hosts and keychains."""
        self._totals = Totals(self._counters)
        self._images: dict[int, str] = {}
        """Manifest digests by snapshot id: what a mount is of never changes."""

    def retire(self, counters: Mapping[str, int]) -> None:
        """Keep the counts of a mount that has ended."""
        self._totals.retire(counters)

    def mounts(self) -> Mapping[str, int]:
        """Return how many lazy mounts there are, by state."""
        found = Counter(str(each.state) for each in list(self._keeper.mounts.values()))
        return {"asleep": 0, "waking": 0, "awake": 0} | found

    def served(self) -> Mapping[str, int]:
        """Return the layer servers' counters, summed over all mounts that are or were."""
        return self._totals.sum()

    def fetched(self) -> Mapping[str, int]:
        """Return the fetcher's counters."""
        return self._fetcher.counters()

    def fallbacks(self) -> Mapping[str, int]:
        """Return how often a layer was not lazy, by reason."""
        return dict.fromkeys(REASONS, 0) | self._provider.fallbacks

    def phases(self) -> Mapping[Phase, Timings]:
        """Return how long the steps of cold starts took."""
        return self._phases.snapshot()

    def layers(self) -> Iterator[LayerNumbers]:
        """Return what is mounted, with its size and how much of it is here."""
        mountpoints = list(self._keeper.mounts.items())
        if any(snapshot_id not in self._images for snapshot_id, _each in mountpoints):
            self._images = {each.snapshot_id: each.manifest_digest for each in self._store.lazy_mounts()}
        for snapshot_id, mountpoint in mountpoints:
            image = self._images.get(snapshot_id)
            if image is None:
                continue
            size = mountpoint.facts.compressed_size
            with suppress(KeyError, OSError):
                spec = mountpoint.spec
                yield LayerNumbers(
                    spec.layer,
                    image,
                    spec.target,
                    size,
                    min(size, _bytes_on_disk(os.path.join(os.path.dirname(spec.spans), "blob"))),
                    self._keeper.counters(snapshot_id),
                )

    def _counters(self) -> Iterator[Mapping[str, int]]:
        """Yield the sums over all mounts: by column, for there may be hundreds, each with dozens of counters."""
        rows = []
        for snapshot_id in list(self._keeper.mounts):
            with suppress(KeyError, OSError):
                rows.append(self._keeper.counters(snapshot_id).values())
        yield dict(zip(NAMES, map(sum, zip(*rows, strict=True)), strict=False))


def _bytes_on_disk(path: str) -> int:
    try:
        return os.stat(path).st_blocks * 512
    except FileNotFoundError:
        return 0
