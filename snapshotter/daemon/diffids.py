"""Whether a layer is the one that its images' configurations name, by the names of snapshots.

An image's configuration lists the diffID of each layer: the digest of its tar stream. containerd names the snapshot of
a layer by its chain ID, a digest of the diffIDs up to it; so a diffID that was found can be checked without the
configuration. An ordinary pull makes the same check when it has unpacked a layer, a lazy one when the layer is complete.

Concurrency: trio; the database is read in a thread.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import trio

from snapshotter.snapshot.store import SnapshotStore
from snapshotter.units import Digest, sha256_digest

_log = logging.getLogger(__name__)

_CHAIN_ID = re.compile(r"(?:.*/)?(sha256:[0-9a-f]{64})")
"""containerd puts its namespace and a number before the chain ID; other clients may choose any name."""


async def note_complete(store: SnapshotStore, layer: Digest, verified: bool, diff_id: str) -> None:
    """Say that a layer is complete; when its diffID was found out, say of which images it is not the layer."""
    _log.info("layer is complete", extra={"layer": layer, "verified": verified, "diff_id": diff_id})
    if not diff_id:
        return
    for name, image in await trio.to_thread.run_sync(lambda: list(misnamed(store, layer, diff_id))):
        _log.error(
            "a layer is not the one that the image's configuration names: do not trust the image",
            extra={"layer": layer, "diff_id": diff_id, "snapshot": name, "image": image},
        )


def misnamed(store: SnapshotStore, layer: Digest, diff_id: str) -> Iterator[tuple[str, str]]:
    """Yield (name, image) of each snapshot of `layer` whose name says that its diffID is another than `diff_id`."""
    images = {mount.snapshot_id: mount.image_ref for mount in store.lazy_mounts() if mount.layer == layer}
    for snapshot in store.all():
        if snapshot.id not in images:
            continue
        chain, parent = _CHAIN_ID.fullmatch(snapshot.info.name), _CHAIN_ID.fullmatch(snapshot.info.parent)
        if chain is None or (snapshot.info.parent and parent is None):
            continue  # not committed yet, or not by its chain ID
        expected = sha256_digest(f"{parent[1]} {diff_id}".encode()) if parent is not None else diff_id
        if chain[1] != expected:
            yield snapshot.info.name, images[snapshot.id]
