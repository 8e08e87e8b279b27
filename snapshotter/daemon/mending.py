"""Files of a mounted layer that were deleted or damaged, made again: zTOC, trees, and what the fetcher keeps.

What a zTOC has to be is in the image's index, which is on this host as long as the image is mounted; so a tree is made
again without the network where the zTOC is there, and the zTOC is fetched again where it is not. Trees are made by the
same steps as at the first pull.

Concurrency: trio; one layer at a time, under the lock of the layer, so that its removal waits.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from pathlib import Path

import trio

from snapshotter.daemon.artifacts import LayerArtifacts
from snapshotter.daemon.catalog import Catalog
from snapshotter.daemon.fetching import FetcherProcess
from snapshotter.daemon.locks import Locks
from snapshotter.errors import NotFound, NoZtoc, ProcessFailed, SnapshotterError, UnsupportedLayer
from snapshotter.layer.inherit import Parent
from snapshotter.layer.store import LayerStore
from snapshotter.oci.reference import Reference
from snapshotter.snapshot.model import LazyMount
from snapshotter.snapshot.store import SnapshotStore
from snapshotter.units import Digest

_log = logging.getLogger(__name__)

_FIRST_WAIT_S = 5.0
_MAX_WAIT_S = 300.0
"""Between two tries: what is missing has to come from the registry."""


_Below = tuple[int, LazyMount | None]
"""A snapshot below another, and what is recorded of it when it is lazy."""


class Mender:
    """Makes the files of layers whole again. `snapshots` is the directory of all snapshots, `uses` the layers in use."""

    def __init__(
        self,
        *,
        store: SnapshotStore,
        catalog: Catalog,
        artifacts: LayerArtifacts,
        fetcher: FetcherProcess,
        locks: Locks,
        layers: LayerStore,
        snapshots: Path,
        uses: Collection[Digest],
    ) -> None:
        self._store = store
        self._catalog = catalog
        self._artifacts = artifacts
        self._fetcher = fetcher
        self._locks = locks
        self._layers = layers
        self._snapshots = snapshots
        self._uses = uses

    async def mend(self, snapshot_id: int, layer: Digest, background: bool) -> None:
        """Return when every file of a lazy snapshot's layer is there and can be used.

        Raises NotFound when the snapshot is no lazy one any more; RegistryError, ProcessFailed, UnsupportedLayer,
        CorruptData, OSError.
        """
        async with self._locks.hold(layer):
            if layer not in self._uses:
                raise NotFound(f"layer {layer} is not in use any more")
            mount, below = await trio.to_thread.run_sync(self._known, snapshot_id)
            if not await self._artifacts.are_whole(layer, mount.tree_variant):
                _log.warning("a tree is missing or damaged; it is made again", extra={"layer": layer})
                await self._make_trees(mount, below)
            await self._fetcher.open(layer, background=background, image=mount.manifest_digest)

    async def open(self, layer: Digest, image: str, background: bool) -> None:
        """Have the fetcher open a layer of `image`, a manifest's digest; mend it as soon as possible if it cannot be."""
        try:
            await self._fetcher.open(layer, background=background, image=image)
        except ProcessFailed as error:
            if layer not in self._uses:  # it was removed meanwhile
                return
            _log.error("a layer's cache cannot be used", extra={"layer": layer, "error": str(error)})
            await self._mend_at_last(layer, background)

    async def _mend_at_last(self, layer: Digest, background: bool) -> None:
        """Mend a layer as soon as that is possible; return, too, when nobody wants it any more."""
        wait = _FIRST_WAIT_S
        while True:
            mounts = await trio.to_thread.run_sync(self._store.lazy_mounts)
            users = [mount.snapshot_id for mount in mounts if mount.layer == layer]
            if not users:
                return None
            try:
                return await self.mend(users[0], layer, background)
            except NotFound:
                return None
            except (SnapshotterError, OSError) as error:
                _log.info("a layer cannot be mended yet", extra={"layer": layer, "error": str(error)})
            await trio.sleep(wait)
            wait = min(2 * wait, _MAX_WAIT_S)

    async def _make_trees(self, mount: LazyMount, below: Sequence[_Below]) -> None:
        image, layer = Reference.parse(mount.image_ref), mount.layer
        found = await self._catalog.recall(image)
        ztoc = found.index.ztoc_for(layer)
        if ztoc is None:
            raise NoZtoc(f"index {found.index.digest} has no zTOC for layer {layer} any more")
        await self._artifacts.ensure(image, layer, ztoc)
        if mount.tree_variant:
            variant = await self._artifacts.variant_for(layer, await self._parents(below))
            if variant != mount.tree_variant:
                raise UnsupportedLayer(
                    f"layer {layer} would look otherwise now: the layers below it have changed"
                )

    async def _parents(self, below: Sequence[_Below]) -> list[Parent]:
        """Return where the layers below can be looked at, mounted or not; a tree that cannot is made first.

        Without the locks of those layers: as long as there is one above them nobody removes them.
        """
        parents = []
        for position, (snapshot_id, mount) in enumerate(below):
            if mount is None:
                parents.append(Parent(directory=self._snapshots / str(snapshot_id) / "fs"))
                continue
            if not await self._artifacts.are_whole(mount.layer, mount.tree_variant):
                await self._make_trees(mount, below[position + 1 :])
            parents.append(Parent(tree=self._layers.paths(mount.layer, mount.tree_variant).tree))
        return parents

    def _known(self, snapshot_id: int) -> tuple[LazyMount, Sequence[_Below]]:
        """Return what is recorded of a lazy snapshot, and those below it, nearest first. Raises NotFound."""
        mounts = {mount.snapshot_id: mount for mount in self._store.lazy_mounts()}
        if snapshot_id not in mounts:
            raise NotFound(f"snapshot {snapshot_id} is not a lazy one any more")
        for snapshot in self._store.all():
            if snapshot.id == snapshot_id:
                chain = self._store.chain(snapshot.info.parent)
                return mounts[snapshot_id], [(each.id, mounts.get(each.id)) for each in chain]
        return mounts[snapshot_id], []
