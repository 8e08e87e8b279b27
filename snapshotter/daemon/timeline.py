"""What happened in the last cold starts, for `soci trace`: steps of the daemon, waits and ranges of the fetcher.

Both come from rings in memory that are filled anyway; nothing is collected until somebody asks on the socket
`trace.sock` in the root, which answers with one JSON object and closes.

Concurrency: as status.py.
"""

from __future__ import annotations

import time
from typing import Any

from snapshotter.daemon.fetching import FetcherProcess
from snapshotter.daemon.phases import Phases
from snapshotter.reports import TRACE_FORMAT
from snapshotter.snapshot.store import SnapshotStore
from snapshotter.units import digest_hex


class Timeline:
    """Collects what there is to tell."""

    def __init__(self, *, phases: Phases, fetcher: FetcherProcess, store: SnapshotStore) -> None:
        self._phases = phases
        self._fetcher = fetcher
        self._store = store

    def collect(self) -> dict[str, Any]:
        """Return steps, events and the layers they are about; times are seconds of the clock whose now is `now`."""
        layers: dict[str, dict[str, Any]] = {}
        for mount in self._store.lazy_mounts():
            known = layers.setdefault(
                digest_hex(mount.layer)[:16], {"digest": mount.layer, "images": [], "manifests": []}
            )
            known["images"].append(mount.image_ref)
            known["manifests"].append(mount.manifest_digest)
        return {
            "format": TRACE_FORMAT,
            "now": time.monotonic(),
            "wall": time.time(),
            "layers": layers,
            "steps": [
                {
                    "phase": str(step.phase),
                    "about": step.about,
                    "start": step.start,
                    "seconds": step.seconds,
                    "failed": step.failed,
                }
                for step in self._phases.steps()
            ],
            "events": [
                {
                    "kind": event.kind.name.lower(),
                    "layer": event.layer,
                    "start": event.start,
                    "seconds": event.seconds,
                    "span": event.span,
                    "spans": event.spans,
                    "bytes": event.size,
                }
                for event in self._fetcher.events()
            ],
        }
