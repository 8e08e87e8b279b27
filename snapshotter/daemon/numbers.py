"""Where the metrics get their numbers: the parts of the daemon, asked at the moment of a scrape.

It owns the sums over mounts that have ended, and remembers what never changes of a mounted layer.

Concurrency: called from the threads of `web.py`, while the loop changes what is looked at; every look is at a copy.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from snapshotter.daemon.credentials import Family
from snapshotter.daemon.fetching import FetcherProcess
from snapshotter.daemon.phases import Phase, Phases, Timings
from snapshotter.daemon.provider import REASONS, Provider
from snapshotter.daemon.reference_metrics import LayerNumbers
from snapshotter.daemon.totals import Totals
from snapshotter.errors import InvalidLayerFile
from snapshotter.fuse.keeper import Keeper
from snapshotter.fuse.mountpoint import MountSpec
from snapshotter.layer.tree import Tree
from snapshotter.snapshot.store import SnapshotStore

_log = logging.getLogger(__name__)


class _Facts(NamedTuple):
    """What does not change as long as a layer is mounted."""

    image: str
    size: int


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
        self._facts: dict[int, _Facts] = {}

    def retire(self, spec: MountSpec, counters: Mapping[str, int]) -> None:
        """Keep the counts of a mount that has ended."""
        self._totals.retire(counters)
        self._facts.pop(spec.snapshot_id, None)

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
        if any(snapshot_id not in self._facts for snapshot_id, _each in mountpoints):
            self._learn()
        for snapshot_id, mountpoint in mountpoints:
            facts = self._facts.get(snapshot_id)
            if facts is None:
                continue
            with suppress(KeyError, OSError):
                spec = mountpoint.spec
                yield LayerNumbers(
                    spec.layer,
                    facts.image,
                    spec.target,
                    facts.size,
                    min(facts.size, _bytes_on_disk(Path(spec.spans).with_name("blob"))),
                    self._keeper.counters(snapshot_id),
                )

    def health(self) -> dict[str, Any]:
        """Return whether the daemon does its work, and what is missing."""
        missing = [] if self._fetcher.pid else ["fetcher"]
        return {"ok": not missing, "missing": missing, "not_lazy_because": self._provider.not_lazy}

    def _counters(self) -> Iterator[Mapping[str, int]]:
        for snapshot_id in list(self._keeper.mounts):
            with suppress(KeyError, OSError):
                yield self._keeper.counters(snapshot_id)

    def _learn(self) -> None:
        for record in self._store.lazy_mounts():
            mountpoint = self._keeper.mounts.get(record.snapshot_id)
            if mountpoint is None or record.snapshot_id in self._facts:
                continue
            try:
                with open(mountpoint.spec.tree, "rb") as file:
                    tree = Tree(file.fileno())
            except (OSError, InvalidLayerFile) as error:
                _log.info("a layer has no size", extra={"layer": record.layer, "error": str(error)})
                continue
            self._facts[record.snapshot_id] = _Facts(record.manifest_digest, tree.compressed_size)
            tree.close()


def _bytes_on_disk(path: Path) -> int:
    try:
        return os.stat(path).st_blocks * 512
    except FileNotFoundError:
        return 0
