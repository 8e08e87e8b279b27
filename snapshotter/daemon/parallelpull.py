"""Pulling layers in full, faster than containerd does: of images that are not lazy, and those of an image that are not.

When containerd asks for an image's first layer, that one and all above it are downloaded, in parallel ranges, and
unpacked, several at once, into directories of our own. Each later call of containerd finds its layer done or waits for
it; the directory becomes the snapshot's. Blobs go to containerd's content store as they would without us; those of a
lazy image, whose others are not there either, are discarded.

A failure is the end of the job: containerd is told to go on by itself, for this layer and those after it; a layer of a
lazy image is then pulled alone.

Owns the directories below `<root>/unpack`. Concurrency: trio, one loop; a job is one task and what it starts.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio

from snapshotter.containerd.labels import source_label
from snapshotter.daemon.asked import Asked
from snapshotter.daemon.blobs import BlobSite, Documents, KeptBlobs, discarding
from snapshotter.daemon.config import Config
from snapshotter.daemon.config.sources import DecompressorConfig
from snapshotter.daemon.discovery import image_manifest
from snapshotter.daemon.unpacking import PackedLayer, Unpacker
from snapshotter.download.downloads import Downloads, Limits
from snapshotter.errors import ConfigError, InvalidIndex, ProcessFailed, SnapshotterError, Unavailable
from snapshotter.heap import trim_heap
from snapshotter.layer.inherit import Parent
from snapshotter.nursery import open_nursery
from snapshotter.oci.descriptor import Descriptor
from snapshotter.oci.manifest import MAX_CONFIG_SIZE, ImageManifest, parse_config
from snapshotter.oci.reference import Reference
from snapshotter.registry.client import RegistryClient
from snapshotter.registry.retry import RetryPolicy, Timeouts
from snapshotter.snapshot.directories import delete_tree
from snapshotter.snapshot.layers import LayerRequest
from snapshotter.snapshot.model import Usage
from snapshotter.units import Digest

_log = logging.getLogger(__name__)

_ABANDONED_S: Final = 120.0
"""Without any call of containerd for so long, its pull has ended: unpacking a layer is waited for in a call."""

_FAILED_HOLDS_S: Final = 30.0
"""After a failure: containerd pulls this image itself, and a second download beside it would be in its way."""

_RANGE: Final = 8 << 20
"""Bytes per request unless the configuration says otherwise: what the reference recommends."""

_LARGEST_RANGE: Final = 32 << 20
"""A range is in memory until it is stored, and there are as many as connections."""

_MANY: Final = 32
"""Connections of an image that has no limit."""


@dataclass(frozen=True, slots=True)
class ParallelSettings:
    """How much is done at once. None stands for no limit."""

    always: bool
    """For every image; none is lazy then."""
    fallback: bool
    """For images without an index."""
    keep_blobs: bool
    containerd_address: str
    limits: Limits
    """Of one image."""
    downloads: int | None
    """Ranges in the whole daemon."""
    unpacks: int | None
    unpacks_per_image: int | None
    programs: Mapping[str, Sequence[str]]
    """Commands that decompress layers, by compression."""


def settings_of(config: Config, retry: RetryPolicy, timeouts: Timeouts) -> ParallelSettings:
    """Return what the configuration says of parallel pulls. Raises ConfigError for a program that is none."""
    parallel_pull_unpack = config.pull_modes.parallel_pull_unpack
    connections = parallel_pull_unpack.max_concurrent_downloads_per_image
    size = parallel_pull_unpack.download_chunk_bytes or _RANGE
    return ParallelSettings(
        always=parallel_pull_unpack.enable,
        fallback=parallel_pull_unpack.experimental_parallel_pull_as_fallback,
        keep_blobs=not parallel_pull_unpack.discard_unpacked_layers,
        containerd_address=config.content_store.containerd_address,
        limits=Limits(
            connections=_MANY if connections < 0 else max(connections, 1),
            range_size=min(size, _LARGEST_RANGE),
            retry=retry,
            timeouts=timeouts,
        ),
        downloads=_at_most(parallel_pull_unpack.max_concurrent_downloads),
        unpacks=_at_most(parallel_pull_unpack.max_concurrent_unpacks),
        unpacks_per_image=_at_most(parallel_pull_unpack.max_concurrent_unpacks_per_image),
        programs={
            compression: _command(compression, program)
            for compression, program in parallel_pull_unpack.decompress_streams.items()
        },
    )


def _command(compression: str, program: DecompressorConfig) -> Sequence[str]:
    path = Path(program.path)
    if not path.is_file() or not os.access(path, os.X_OK):
        table = f"[pull_modes.parallel_pull_unpack.decompress_streams.{compression}]"
        raise ConfigError(f"{table} path: {program.path!r} is not a program")
    return [program.path, *program.args]


def _at_most(number: int) -> int | None:
    return None if number < 0 else max(number, 1)


@dataclass(slots=True)
class _Layer:
    """One layer of a job."""

    packed: PackedLayer
    directory: Path
    taken: bool = False
    asked: trio.Event = field(default_factory=trio.Event)
    """containerd wants it: `parents` are known."""
    parents: list[Parent] = field(default_factory=list)
    done: trio.Event = field(default_factory=trio.Event)
    usage: Usage | None = None
    error: Exception | None = None


class ParallelPulls:
    """The jobs of one daemon."""

    def __init__(
        self,
        settings: ParallelSettings,
        *,
        root: Path,
        client: RegistryClient,
        unpacker: Unpacker,
        nursery: trio.Nursery,
    ) -> None:
        self.settings = settings
        self._client = client
        self._unpacker = unpacker
        self._nursery = nursery
        self._directory = root / "unpack"
        self._directory.mkdir(mode=0o700, exist_ok=True)
        self._kept = KeptBlobs(settings.containerd_address, unpacker.scratch)
        self._downloads = _semaphore(settings.downloads)
        self._unpacks = _semaphore(settings.unpacks)
        self._jobs: dict[tuple[str, Digest], _Job] = {}
        self._failed: dict[tuple[str, Digest], tuple[float, Exception]] = {}
        nursery.start_soon(self._tidy, list(self._directory.iterdir()))

    async def provide(self, request: LayerRequest, asked: Asked, parents: list[Parent]) -> Usage:
        """Make `request.directory` the unpacked layer and return what it occupies.

        Raises SnapshotterError or OSError when containerd had better do it itself.
        """
        key = (request.namespace, asked.manifest)
        self._forget_failures()
        if key in self._failed:
            raise self._failed[key][1]
        job = self._jobs.get(key)
        if job is None:
            job = self._start(key, _Job(asked.layer, len(parents)), asked.image)
        return await job.provide(asked.layer, request.directory, parents)

    def begin(
        self, request: LayerRequest, asked: Asked, manifest: ImageManifest, packed: AbstractSet[Digest]
    ) -> None:
        """Start pulling the `packed` layers of a lazy image, from the one that is asked for up. To be called for each
        layer of the image: it tells that its client goes on.
        """
        key = (request.namespace, asked.manifest)
        self._forget_failures()
        if (job := self._jobs.get(key)) is not None:
            job.note_call()
        elif packed and key not in self._failed:
            self._start(key, _Job(asked.layer, len(request.parent_ids), manifest, packed), asked.image)

    async def take(self, request: LayerRequest, asked: Asked, parents: list[Parent]) -> Usage:
        """Make `request.directory` what `begin` has made of the layer, and return what it occupies.

        Raises SnapshotterError or OSError when it has to be had otherwise.
        """
        job = self._jobs.get((request.namespace, asked.manifest))
        if job is None:
            raise Unavailable(f"nothing of {asked.image} is being pulled")
        return await job.provide(asked.layer, request.directory, parents)

    def _start(self, key: tuple[str, Digest], job: _Job, image: Reference) -> _Job:
        self._jobs[key] = job
        self._nursery.start_soon(self._run, key, job, image)
        return job

    def _forget_failures(self) -> None:
        now = trio.current_time()
        self._failed = {key: failure for key, failure in self._failed.items() if failure[0] > now}

    async def _run(self, key: tuple[str, Digest], job: _Job, image: Reference) -> None:
        try:
            await self._pull(key, job, image)
        except (SnapshotterError, OSError) as error:
            _log.info("layers cannot be pulled ahead", extra={"image": str(image), "error": str(error)})
            self._failed[key] = (trio.current_time() + _FAILED_HOLDS_S, error)
            job.fail(error)
        except Exception as error:  # noqa: BLE001 - a defect of ours must not fail a pull
            _log.exception("parallel pull failed", extra={"image": str(image)})
            job.fail(ProcessFailed(f"a defect: {error!r}"))
        finally:
            del self._jobs[key]
            trim_heap()
            job.fail(ProcessFailed("the pull was given up"))
            with trio.CancelScope(shield=True):
                await self._tidy([layer.directory.parent for layer in job.layers.values()])

    async def _pull(self, key: tuple[str, Digest], job: _Job, image: Reference) -> None:
        namespace, manifest = key
        keeps = self.settings.keep_blobs and job.lazy is None
        documents = await self._documents(namespace, image, job.lazy, keeps=keeps)
        job.plan(documents, self._place)
        site: AbstractContextManager[BlobSite] = (
            self._kept.site(namespace, manifest, documents)
            if keeps
            else discarding(
                self._unpacker.scratch, (each.packed.descriptor.digest for each in job.layers.values())
            )
        )
        async with _entered(site) as blobs, open_nursery() as nursery:
            nursery.start_soon(job.wait_for_client)
            await self._unpack_all(job, image, blobs)
            await job.all_taken.wait()
            nursery.cancel_scope.cancel()

    async def _unpack_all(self, job: _Job, image: Reference, blobs: BlobSite) -> None:
        limits, labels = self.settings.limits, source_label(image)
        downloads = Downloads(
            image, self._client, blobs.store, limits=limits, labels=labels, gate=self._downloads
        )
        places = _semaphore(self.settings.unpacks_per_image)
        # One process more than may work: it starts while the one before it works.
        started = _semaphore(self.settings.unpacks_per_image and self.settings.unpacks_per_image + 1)
        with closing(downloads):
            async with open_nursery() as nursery:
                downloads.start([layer.packed.descriptor for layer in job.layers.values()], nursery)
                for layer in job.layers.values():
                    await downloads.wait(layer.packed.descriptor.digest)
                    place = _Place()
                    await place.take(started)
                    nursery.start_soon(self._unpack, layer, blobs, place, places)

    async def _unpack(
        self, layer: _Layer, blobs: BlobSite, place: _Place, places: trio.Semaphore | None
    ) -> None:
        async def begin() -> None:
            await place.take(places)
            await place.take(self._unpacks)

        async def parents() -> list[Parent]:
            # It may be long until those below are there, and they may need the place.
            place.give_back()
            await layer.asked.wait()
            return layer.parents

        try:
            await trio.to_thread.run_sync(os.makedirs, layer.directory)
            with await trio.to_thread.run_sync(blobs.open, layer.packed.descriptor) as blob:
                layer.usage = await self._unpacker.run(
                    blob.fileno(), layer.packed, layer.directory, parents, begin
                )
        finally:
            place.give_back()
        layer.done.set()

    async def _documents(
        self, namespace: str, image: Reference, manifest: ImageManifest | None, *, keeps: bool
    ) -> Documents:
        if keeps:
            assert image.digest is not None
            return await trio.to_thread.run_sync(self._kept.documents, namespace, image.digest)
        if manifest is None:
            manifest, _data = await image_manifest(self._client, image)
        config = await self._client.blob(image, manifest.config, max_size=MAX_CONFIG_SIZE)
        return Documents(manifest, parse_config(config))

    def _place(self) -> Path:
        return self._directory / secrets.token_hex(8) / "fs"

    async def _tidy(self, directories: Sequence[Path]) -> None:
        for directory in directories:
            try:
                await trio.to_thread.run_sync(delete_tree, directory)
            except OSError as error:
                _log.warning("remains of a pull stay", extra={"path": str(directory), "error": str(error)})


class _Job:
    """One image that is being pulled, from the layer that was asked for first; of a `lazy` one the `packed` layers."""

    def __init__(
        self,
        first: Digest,
        depth: int,
        lazy: ImageManifest | None = None,
        packed: AbstractSet[Digest] = frozenset(),
    ) -> None:
        self.lazy = lazy
        self._packed = packed
        self._first = first
        self._depth = depth
        self._planned = trio.Event()
        self._error: Exception | None = None
        self._calls = 0
        self._last_call = trio.current_time()
        self.layers: dict[int, _Layer] = {}
        """By their position in the image."""
        self.all_taken = trio.Event()

    def plan(self, documents: Documents, place: Callable[[], Path]) -> None:
        """Say which layers there are. Raises InvalidIndex, UnsupportedLayer."""
        layers, diff_ids = documents.manifest.layers, documents.config.diff_ids
        if len(diff_ids) != len(layers):
            raise InvalidIndex(f"an image has {len(layers)} layers and {len(diff_ids)} diffIDs in its config")
        if self._depth >= len(layers) or layers[self._depth].digest != self._first:
            raise InvalidIndex(f"layer {self._first} is not number {self._depth + 1} of its image")
        for position in range(self._depth, len(layers)):
            if self.lazy is not None and layers[position].digest not in self._packed:
                continue
            packed = PackedLayer(_plain(layers[position]), diff_ids[position], is_base=position == 0)
            _ = packed.compression
            self.layers[position] = _Layer(packed, place())
        self._planned.set()

    def note_call(self) -> None:
        """The client goes on, with another layer."""
        self._last_call = trio.current_time()

    def fail(self, error: Exception) -> None:
        """End every call, and those to come, with `error`; the first one counts."""
        self._error = self._error or error
        self._planned.set()
        for layer in self.layers.values():
            if not layer.done.is_set():
                layer.error = self._error
                layer.done.set()

    async def provide(self, digest: Digest, target: Path, parents: list[Parent]) -> Usage:
        """Return when the layer `digest`, on `parents`, is at `target`. Raises what the job failed with."""
        self._calls += 1
        try:
            await self._planned.wait()
            if self._error is not None:
                raise self._error
            layer = self.layers.get(len(parents))
            if layer is None:
                raise Unavailable(f"layer {digest} is not one that is being pulled")
            if layer.taken or layer.packed.descriptor.digest != digest:
                raise Unavailable(f"layer {digest} belongs to another pull of the same image")
            layer.taken = True
            layer.parents = parents
            layer.asked.set()
            await layer.done.wait()
            if layer.error is not None:
                raise layer.error
            assert layer.usage is not None
            await trio.to_thread.run_sync(_hand_over, layer.directory, target)
            return layer.usage
        finally:
            self._calls -= 1
            self.note_call()
            if self.layers and all(each.taken for each in self.layers.values()) and not self._calls:
                self.all_taken.set()

    async def wait_for_client(self) -> None:
        """Raise ProcessFailed when containerd has not called for a while."""
        while self._calls or trio.current_time() - self._last_call < _ABANDONED_S:  # noqa: ASYNC110 - it is time that passes
            await trio.sleep(_ABANDONED_S / 10)
        raise ProcessFailed("containerd asked for no more layers of this image")


class _Place:
    """Places in some semaphores, given back all at once."""

    def __init__(self) -> None:
        self._held: list[trio.Semaphore] = []

    async def take(self, semaphore: trio.Semaphore | None) -> None:
        """Take one more; None has room for everybody."""
        if semaphore is not None:
            await semaphore.acquire()
            self._held.append(semaphore)

    def give_back(self) -> None:
        """Give back what is held."""
        while self._held:
            self._held.pop().release()


@asynccontextmanager
async def _entered(site: AbstractContextManager[BlobSite]) -> AsyncIterator[BlobSite]:
    """Enter and leave a site in threads."""
    blobs = await trio.to_thread.run_sync(site.__enter__)
    try:
        yield blobs
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(site.__exit__, None, None, None)


def _semaphore(size: int | None) -> trio.Semaphore | None:
    return None if size is None else trio.Semaphore(size)


def _plain(layer: Descriptor) -> Descriptor:
    return Descriptor(layer.media_type, layer.digest, layer.size)


def _hand_over(source: Path, target: Path) -> None:
    """Put the directory `source` in the place of the empty directory `target`, with its owner and mode."""
    status = target.stat()
    os.chown(source, status.st_uid, status.st_gid)
    source.chmod(status.st_mode & 0o7777)
    source.rename(target)
    parent = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
