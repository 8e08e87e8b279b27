"""The layer provider: from containerd's labels to a mounted layer, or to the reason why not.

For an image's first layer the index is found and every zTOC in it is fetched and compiled at once, so that the
Prepares of the other layers, which containerd sends one after another, find everything done. A layer that
is not in the index is unpacked as ordinary files, so that the layers above it can still be lazy: after one
answer other than "already exists" containerd downloads all that remain.

It owns the answer to "who uses this layer": when the last mount of one is gone, its files are removed.

Concurrency: `provide`, `release`, … are called from gRPC threads and hop into the trio loop; everything else is in
the loop. Nothing is locked across the network but a layer by itself: who wants the same layer waits, and its removal.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import trio

from snapshotter.daemon.artifacts import LayerArtifacts
from snapshotter.daemon.asked import IMAGE_REF, LAYER_DIGEST, LAYER_SIZE, Asked
from snapshotter.daemon.catalog import Catalog
from snapshotter.daemon.discovery import Found
from snapshotter.daemon.fetching import FetcherProcess
from snapshotter.daemon.locks import Locks
from snapshotter.daemon.mending import Mender
from snapshotter.daemon.parallelpull import ParallelPulls
from snapshotter.daemon.phases import Phase, Phases
from snapshotter.daemon.reasons import REASONS, reason_of
from snapshotter.daemon.sources import BlobSources
from snapshotter.daemon.unpacking import Unpacker
from snapshotter.errors import NoIndex, NoZtoc, SnapshotterError, Unavailable, UsageError
from snapshotter.fuse import mounting
from snapshotter.fuse.keeper import Keeper
from snapshotter.fuse.mountpoint import MountSpec
from snapshotter.layer.inherit import Parent
from snapshotter.layer.spans import boot_id, is_of_boot
from snapshotter.layer.store import LayerStore
from snapshotter.oci.descriptor import Descriptor
from snapshotter.oci.reference import Reference
from snapshotter.snapshot.layers import Deferred, LayerRequest, Lazy, Local, Provided
from snapshotter.snapshot.model import LazyMount, Usage
from snapshotter.snapshot.store import SnapshotStore
from snapshotter.units import Digest

_log = logging.getLogger(__name__)

_RESTORE_PATIENCE_S = 20.0
"""How long a start waits for the fetcher to look at what the host's last boot has left; then it comes later."""


@dataclass(frozen=True, slots=True)
class ProviderSettings:
    """Of the configuration, what the provider goes by."""

    background: bool
    mount_timeout_s: float
    min_layer_size: int
    prepared_at_once: int
    """Layers whose zTOCs are fetched and compiled ahead."""


class Provider:
    """The LayerProvider of the daemon."""

    def __init__(
        self,
        settings: ProviderSettings,
        *,
        root: Path,
        layers: LayerStore,
        store: SnapshotStore,
        catalog: Catalog,
        artifacts: LayerArtifacts,
        sources: BlobSources,
        fetcher: FetcherProcess,
        keeper: Keeper,
        unpacker: Unpacker,
        parallel: ParallelPulls,
        nursery: trio.Nursery,
        phases: Phases,
        on_work: Callable[[], None] = lambda: None,
        not_lazy: str = "",
    ) -> None:
        self._on_work = on_work
        self._phases = phases
        self.settings = settings
        """May be replaced: the next pull looks here."""
        self._snapshots = root / "snapshotter" / "snapshots"
        self._layers = layers
        self._store = store
        self._catalog = catalog
        self._artifacts = artifacts
        self._sources = sources
        self._fetcher = fetcher
        self._keeper = keeper
        self._unpacker = unpacker
        self._parallel = parallel
        self._nursery = nursery
        self.not_lazy = not_lazy
        """Why nothing can be lazy on this host; empty when it can, or as long as `tested` is not set."""
        self.tested = trio.Event()
        self._token = trio.lowlevel.current_trio_token()
        self._uses: dict[Digest, int] = {}
        self._locks = Locks()
        self._calls: set[trio.CancelScope] = set()
        self._ending = False
        self._prepared: set[Digest] = set()
        self._ahead = trio.CapacityLimiter(settings.prepared_at_once)
        self._recorded: dict[int, Digest] = {}
        """Layers by the snapshots whose mount they are, or would be if it could have been restored."""
        self._mender = Mender(
            store=store,
            catalog=catalog,
            artifacts=artifacts,
            fetcher=fetcher,
            locks=self._locks,
            layers=layers,
            snapshots=self._snapshots,
            uses=self._uses.keys(),
        )
        self.fallbacks: dict[str, int] = {}
        """How often a layer was not lazy, by reason."""

    # --- called from gRPC threads -------------------------------------------------------------------------

    def provide(self, request: LayerRequest) -> Provided:
        """Mount or unpack the layer, or say why neither."""
        return trio.from_thread.run(self._until_the_end, self._provide, request, trio_token=self._token)

    def check(self, ids: Sequence[int]) -> None:
        """Raise Unavailable when one of these lazy snapshots is not mounted."""
        for snapshot_id in ids:
            if snapshot_id not in self._keeper.mounts:
                raise Unavailable(
                    f"lazy layer of snapshot {snapshot_id} is not mounted; see the daemon's log of its start"
                )

    def wake(self, ids: Sequence[int]) -> None:
        """Start servers for these lazy snapshots."""
        self._token.run_sync_soon(self._keeper.wake, tuple(ids))

    def usage(self, snapshot_id: int) -> Usage | None:
        """Return what the layer of a lazy snapshot occupies in the cache."""
        mountpoint = self._keeper.mounts.get(snapshot_id)
        if mountpoint is None:
            return None
        return Usage(*self._layers.usage(mountpoint.spec.layer))

    def release(self, snapshot_id: int, directory: Path) -> bool:
        """Unmount a lazy layer."""
        released = trio.from_thread.run(self._release, snapshot_id, directory, trio_token=self._token)
        self._store.forget_mount(snapshot_id)
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._nursery.start_soon, self._tidy_images)
        return released

    def close(self) -> None:
        """Nothing: mounts outlive the daemon."""

    # --- in the loop --------------------------------------------------------------------------------------

    async def restore(self) -> None:
        """Take every mount that the store knows back into service, and remove the layers of others; needs no network."""
        specs = []
        images: dict[Digest, str] = {}
        for mount in await trio.to_thread.run_sync(self._store.lazy_mounts):
            try:
                self._sources.learn(mount.layer, Reference.parse(mount.image_ref))
            except UsageError as error:
                _log.error(
                    "the image of a layer is not known", extra={"layer": mount.layer, "error": str(error)}
                )
            self._recorded[mount.snapshot_id] = mount.layer
            self._uses[mount.layer] = self._uses.get(mount.layer, 0) + 1
            images.setdefault(mount.layer, mount.manifest_digest)
            specs.append(self._spec(mount.snapshot_id, mount.layer, mount.tree_variant))
        for layer in set(await trio.to_thread.run_sync(self._layers.layers)) - self._uses.keys():
            await self._remove(layer)
        await self._tidy_images()
        boot = boot_id()
        with trio.move_on_after(_RESTORE_PATIENCE_S) as patience:
            async with trio.open_nursery() as unknown:
                for layer, image in images.items():
                    known = is_of_boot(self._layers.paths(layer).spans, boot)
                    nursery = self._nursery if known else unknown
                    nursery.start_soon(self._mender.open, layer, image, self.settings.background)
        if patience.cancelled_caught:
            _log.error("no fetcher yet: layers are served as far as they are there")
        await self._keeper.restore(specs)

    async def _tidy_images(self) -> None:
        """Forget images of which nothing is mounted any more."""
        mounts = await trio.to_thread.run_sync(self._store.lazy_mounts)
        used = {mount.manifest_digest for mount in mounts}
        try:
            await trio.to_thread.run_sync(self._catalog.tidy, used)
        except OSError as error:
            _log.warning("what is known of unused images stays", extra={"error": str(error)})

    async def _open(self, layer: Digest, image: str) -> None:
        await self._fetcher.open(layer, background=self.settings.background, image=image)

    async def mend(self, spec: MountSpec) -> None:
        """Have the files of a mount made whole again. Raises as `Mender.mend` does, and trio.TooSlowError."""
        with trio.fail_after(self.settings.mount_timeout_s):
            await self._mender.mend(spec.snapshot_id, spec.layer, self.settings.background)

    def gone(self, spec: MountSpec) -> None:
        """Note that a mount has ended; the last one of a layer takes its files along."""
        self._nursery.start_soon(self._drop_use, spec.layer)

    def end(self) -> None:
        """End the calls of containerd that are under way, and those that still come: they are Unavailable."""
        self._ending = True
        for call in self._calls:
            call.cancel()

    async def _until_the_end(
        self, work: Callable[[LayerRequest], Awaitable[Provided]], request: LayerRequest
    ) -> Provided:
        with trio.CancelScope() as call:
            if self._ending:
                call.cancel()
            self._calls.add(call)
            try:
                return await work(request)
            finally:
                self._calls.discard(call)
                self._on_work()
        raise Unavailable("the snapshotter is ending; the pull can go on when it is back")

    async def _provide(self, request: LayerRequest) -> Provided:
        asked = Asked.from_labels(request.labels)
        if asked is None:
            return self._deferred(
                "missing-labels", request, "the client sent no labels for a remote snapshotter"
            )
        if self._parallel.settings.always:
            return await self._in_parallel("parallel-mode", request, asked, "every image is pulled in full")
        await self.tested.wait()
        if self.not_lazy:
            return await self._in_parallel("not-lazy", request, asked, self.not_lazy)
        try:
            with trio.fail_after(self.settings.mount_timeout_s):
                found = await self._catalog.resolve(asked.image, asked.index)
        except NoIndex as error:
            return await self._in_parallel("no-index", request, asked, error)
        except trio.TooSlowError:
            return self._deferred("timeout", request, f"no index within {self.settings.mount_timeout_s} s")
        except SnapshotterError as error:
            return self._deferred("index-failed", request, error)
        self._prepare_ahead(asked.image, found)
        self._unpack_ahead(request, asked, found)
        try:
            return await self._provide_lazily(request, asked, found)
        except NoZtoc as error:
            self._count("no-ztoc")
            _log.info("layer is unpacked", extra={"layer": asked.layer, "reason": str(error)})
        except (SnapshotterError, OSError, ValueError, trio.TooSlowError) as error:
            self._count(reason_of(error))
            _log.warning(
                "layer cannot be lazy; it is unpacked",
                extra={"layer": asked.layer, "error": str(error) or type(error).__name__},
            )
        return await self._provide_locally(request, asked, found)

    async def _provide_lazily(self, request: LayerRequest, asked: Asked, found: Found) -> Lazy:
        ztoc = found.index.ztoc_for(asked.layer)
        if ztoc is None:
            raise NoZtoc(f"index {found.index.digest} has no zTOC for layer {asked.layer}")
        size = request.labels.get(LAYER_SIZE, "")
        if size.isdigit() and int(size) < self.settings.min_layer_size:
            raise NoZtoc(f"layer {asked.layer} of {size} bytes is below min_layer_size")
        layer = asked.layer
        with self._phases.timed(Phase.PROVIDE, asked.layer), trio.fail_after(self.settings.mount_timeout_s):
            async with self._locks.hold(layer):
                await self._artifacts.ensure(asked.image, layer, ztoc, found.index.prefetch_for(layer))
                variant = await self._artifacts.variant_for(layer, self._parents(request.parent_ids))
                self._uses[layer] = self._uses.get(layer, 0) + 1
                try:
                    self._sources.learn(layer, asked.image)
                    await self._open(layer, str(asked.image.digest))
                    await self._mount(request, asked, variant)
                except BaseException:
                    self._nursery.start_soon(self._drop_use, layer)
                    raise
        self._keeper.wake([request.snapshot_id])
        return Lazy(layer, Usage(*await trio.to_thread.run_sync(self._layers.usage, layer)))

    async def _mount(self, request: LayerRequest, asked: Asked, variant: str) -> None:
        """Record the mount, then make it: a crash in between is one that `restore` makes up for."""
        record = LazyMount(
            request.snapshot_id,
            asked.layer,
            variant,
            str(asked.image),
            str(asked.image.digest),
            request.namespace,
        )
        await trio.to_thread.run_sync(self._store.record_mount, record)
        self._recorded[request.snapshot_id] = asked.layer
        try:
            with self._phases.timed(Phase.MOUNT, asked.layer):
                await self._keeper.mount(self._spec(request.snapshot_id, asked.layer, variant))
        except BaseException:
            del self._recorded[request.snapshot_id]
            self._store.forget_mount(request.snapshot_id)
            raise

    async def _provide_locally(self, request: LayerRequest, asked: Asked, found: Found) -> Provided:
        try:
            parents = self._parents(request.parent_ids)
            with self._phases.timed(Phase.UNPACK, asked.layer):
                usage = await self._unpack(request, asked, found, parents)
        except (SnapshotterError, OSError) as error:
            return self._deferred("unpack-failed", request, error)
        return Local(usage)

    async def _unpack(
        self, request: LayerRequest, asked: Asked, found: Found, parents: list[Parent]
    ) -> Usage:
        with suppress(SnapshotterError, OSError):  # a head start only; what is wrong is said now
            return await self._parallel.take(request, asked, parents)
        return await self._unpacker.unpack(
            asked.image, found.manifest, asked.layer, request.directory, parents
        )

    async def _in_parallel(self, reason: str, request: LayerRequest, asked: Asked, why: object) -> Provided:
        """Pull an image that cannot be lazy, for this `reason`, if that is what we do; else leave it to the client."""
        if not (self._parallel.settings.always or self._parallel.settings.fallback):
            return self._deferred(reason, request, why)
        try:
            with self._phases.timed(Phase.UNPACK, asked.layer):
                parents = self._parents(request.parent_ids)
                usage = await self._parallel.provide(request, asked, parents)
        except (Unavailable, UsageError) as error:
            return self._deferred(reason, request, f"{why}; nor can it be pulled in parallel: {error}")
        except (SnapshotterError, OSError) as error:
            return self._deferred("parallel-failed", request, error)
        self._count(reason)
        return Local(usage)

    def _prepare_ahead(self, image: Reference, found: Found) -> None:
        """Start fetching and compiling every zTOC of the index, and learn where the blobs are."""
        for entry in found.index.ztocs:
            if entry.layer not in self._prepared:
                self._prepared.add(entry.layer)
                self._nursery.start_soon(self._prepare_layer, image, found, entry.layer, entry.descriptor())

    def _unpack_ahead(self, request: LayerRequest, asked: Asked, found: Found) -> None:
        """Start pulling the layers from this one up that will not be lazy: there may be dozens of small ones."""
        above = found.manifest.layers[len(request.parent_ids) :]
        packed = {each.digest for each in above if not self._is_lazy(found, each.digest, each.size)}
        self._parallel.begin(request, asked, found.manifest, packed)

    def _is_lazy(self, found: Found, layer: Digest, size: int) -> bool:
        return found.index.ztoc_for(layer) is not None and size >= self.settings.min_layer_size

    async def _prepare_layer(self, image: Reference, found: Found, layer: Digest, ztoc: Descriptor) -> None:
        try:
            async with self._ahead, self._locks.hold(layer):
                await self._artifacts.ensure(image, layer, ztoc, found.index.prefetch_for(layer))
            self._sources.learn(layer, image)
            self._fetcher.offer(layer, await self._sources.find(layer, renew=False))
        except Exception as error:  # noqa: BLE001 - a head start only; what is wrong is said when it is needed
            self._prepared.discard(layer)
            _log.info("layer could not be prepared ahead", extra={"layer": layer, "error": str(error)})

    async def _release(self, snapshot_id: int, directory: Path) -> bool:
        layer = self._recorded.pop(snapshot_id, None)
        if await self._keeper.unmount(snapshot_id):
            return True
        # It could not be restored, or a crash came before it was recorded: what may be mounted there is dead.
        detached = await trio.to_thread.run_sync(mounting.detach, str(directory))
        if layer is not None:
            self._nursery.start_soon(self._drop_use, layer)
        return detached or layer is not None

    async def _drop_use(self, layer: Digest) -> None:
        async with self._locks.hold(layer):
            self._uses[layer] -= 1
            if self._uses[layer]:
                return
            del self._uses[layer]
            self._prepared.discard(layer)
            self._fetcher.close(layer)
            self._sources.forget(layer)
            await self._remove(layer)

    async def _remove(self, layer: Digest) -> None:
        try:
            await trio.to_thread.run_sync(self._layers.remove, layer)
        except OSError as error:
            _log.error("files of a layer stay", extra={"layer": layer, "error": str(error)})
        else:
            _log.info("layer removed: nothing uses it", extra={"layer": layer})

    def _spec(self, snapshot_id: int, layer: Digest, variant: str) -> MountSpec:
        paths = self._layers.paths(layer, variant)
        target = self._snapshots / str(snapshot_id) / "fs"
        return MountSpec(snapshot_id, layer, str(target), str(paths.tree), str(paths.data), str(paths.spans))

    def _parents(self, ids: Sequence[int]) -> list[Parent]:
        """Return where the layers below can be looked at. Raises Unavailable: never at a mount that is not kept."""
        parents = []
        for snapshot_id in ids:
            mountpoint = self._keeper.mounts.get(snapshot_id)
            if mountpoint is not None:
                parents.append(Parent(tree=Path(mountpoint.spec.tree)))
            elif snapshot_id in self._recorded:
                raise Unavailable(f"the lazy layer of snapshot {snapshot_id} below it is not mounted")
            else:
                parents.append(Parent(directory=self._snapshots / str(snapshot_id) / "fs"))
        return parents

    def _count(self, reason: str) -> None:
        assert reason in REASONS
        self.fallbacks[reason] = self.fallbacks.get(reason, 0) + 1

    def _deferred(self, reason: str, request: LayerRequest, why: object) -> Deferred:
        self._count(reason)
        _log.warning(
            "layer is left to the client",
            extra={
                "reason": reason,
                "image": request.labels.get(IMAGE_REF, ""),
                "layer": request.labels.get(LAYER_DIGEST, ""),
                "error": str(why),
            },
        )
        return Deferred(reason)
