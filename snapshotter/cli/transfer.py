"""The content of a new image on its way into a registry: blobs, then manifests, then the name.

A blob that the repository has is not sent; one that another repository of the registry has is mounted; any other is
streamed. A name never points to an image that is not complete, and a run that broke is finished by the next.

Concurrency: `Destination.sink` and the sinks it returns are for the threads that read layers; the rest is for tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Final

import trio

from snapshotter.cli.pipe import Pipe
from snapshotter.cli.remotecontent import RegistryContent, Sink
from snapshotter.errors import NotFound, SnapshotterError
from snapshotter.nursery import open_nursery
from snapshotter.oci.descriptor import Descriptor
from snapshotter.oci.media_types import INDEX_TYPES, MANIFEST_TYPES
from snapshotter.oci.reference import Reference
from snapshotter.registry.client import RegistryClient
from snapshotter.registry.sending import Piece
from snapshotter.soci.content import ContentSource, read_verified
from snapshotter.soci.create import MAX_ZTOC_SIZE
from snapshotter.units import Digest

CONCURRENCY: Final = 3
"""Blobs that are pushed or copied at the same time, those that travel while they are read not counted."""
TRAVELLING: Final = 6
"""Layers that travel at the same time: those that are being read, and those of which the end is still on its way."""


class Destination:
    """The repository of `reference`, where the image `content` goes that is in the repository of `origin`."""

    def __init__(
        self,
        registry: RegistryClient,
        reference: Reference,
        content: RegistryContent,
        origin: Reference,
        nursery: trio.Nursery,
    ) -> None:
        """`nursery` is for the uploads of layers that travel while they are read."""
        self._registry = registry
        self._reference = reference
        self._content = content
        self._origin = origin
        self._nursery = nursery
        self._limit = trio.CapacityLimiter(CONCURRENCY)
        self._room = trio.Semaphore(TRAVELLING)
        self._travelling: dict[Digest, _Travelling] = {}
        self._ahead: dict[Digest, trio.Event] = {}
        """Artifacts that were sent before `push`, and when that had ended."""
        self._arrived: set[Digest] = set()

    def sink(self, layer: Descriptor) -> Sink | None:
        """Return where to send a layer that is about to be read, None when it is there already."""
        if self._content.call(lambda: self._is_there(layer)):
            return None
        sink = _Travelling(self._content, layer)
        self._content.call(lambda: self._start(sink))
        return sink

    def send(self, digest: Digest, artifacts: ContentSource) -> None:
        """Send an artifact ahead of `push`, which sends it again if that fails; for the thread that made it."""

        async def start() -> None:
            self._ahead[digest] = trio.Event()
            self._nursery.start_soon(self._send_ahead, digest, artifacts)

        self._content.call(start)

    async def push(self, blobs: Iterable[Descriptor], artifacts: ContentSource, target: Descriptor) -> None:
        """Push an image: all that it consists of, each after what it names, and last `target`, under its name.

        `artifacts` has what is new. Raises RegistryError, DigestMismatch.
        """
        entries = list(blobs)
        manifests = [one for one in entries if one.media_type in MANIFEST_TYPES | INDEX_TYPES]
        async with open_nursery() as nursery:
            for entry in entries:
                if entry not in manifests:
                    nursery.start_soon(self._push_blob, entry, artifacts)
        for entry in manifests:
            data = await trio.to_thread.run_sync(self._read, entry, artifacts)
            name = self._reference
            if entry.digest != target.digest:
                name = name.with_digest(entry.digest)
            await self._registry.push_manifest(name, data, entry.media_type)

    async def _start(self, sink: _Travelling) -> None:
        await self._room.acquire()
        self._travelling[sink.layer.digest] = sink
        self._nursery.start_soon(self._send, sink)

    async def _send(self, sink: _Travelling) -> None:
        try:
            await self._registry.upload(self._reference, sink.layer, sink.pieces).run()
            sink.arrived = True
        except SnapshotterError as error:
            sink.fail(error)
        finally:
            # Cancelled: the threads at both ends must not wait for each other.
            sink.fail(SnapshotterError(f"layer {sink.layer.digest}: interrupted"))
            sink.ended.set()
            self._room.release()

    async def _send_ahead(self, digest: Digest, artifacts: ContentSource) -> None:
        try:
            async with self._limit:
                data = await trio.to_thread.run_sync(_read_artifact, artifacts, digest)
                await self._registry.push_blob(self._reference, data)
            self._arrived.add(digest)
        except SnapshotterError:
            return
        finally:
            self._ahead[digest].set()

    async def _push_blob(self, entry: Descriptor, artifacts: ContentSource) -> None:
        sink = self._travelling.get(entry.digest)
        if sink is not None and await sink.has_arrived():
            return
        if entry.digest in self._ahead:
            await self._ahead[entry.digest].wait()
        if entry.digest in self._arrived:
            return
        async with self._limit:
            if await trio.to_thread.run_sync(_has, artifacts, entry):
                data = await trio.to_thread.run_sync(self._read, entry, artifacts)
                await self._registry.push_blob(self._reference, data)
            elif not await self._is_there(entry):
                source = partial(self._content.pieces, entry, end=entry.size)
                await self._registry.upload(self._reference, entry, source).run()

    def _read(self, entry: Descriptor, artifacts: ContentSource) -> bytes:
        source = artifacts if _has(artifacts, entry) else self._content
        return read_verified(source, entry.digest, limit=MAX_ZTOC_SIZE)

    async def _is_there(self, entry: Descriptor) -> bool:
        """Say whether the repository has a blob, after having it mounted where that is possible."""
        if self._origin.locator == self._reference.locator:
            return True
        if await self._registry.has_blob(self._reference, entry.digest):
            return True
        if self._origin.registry != self._reference.registry:
            return False
        return await self._registry.mount_blob(self._reference, entry.digest, self._origin.repository)


class _Travelling:
    """A layer that is sent while its reader works on it, as its reader and its upload see it."""

    def __init__(self, content: RegistryContent, layer: Descriptor) -> None:
        self.layer = layer
        self.arrived = False
        self.ended = trio.Event()
        self._content = content
        self._pipe = Pipe()
        self._taken = 0
        self._aborted = False
        self._error: SnapshotterError | None = None

    async def has_arrived(self) -> bool:
        """Wait for the end of the upload; False means that its reader gave it up. Raises the upload's error."""
        await self.ended.wait()
        if not self.arrived and not self._aborted and self._error is not None:
            raise self._error
        return self.arrived

    def pieces(self, start: int) -> Iterator[Piece]:
        """Yield the layer from `start` on; what an attempt that broke has taken along is read again."""
        if start < self._taken:
            yield from self._content.pieces(self.layer, start, self._taken)
        while (piece := self._pipe.take()) is not None:
            self._taken += len(piece)
            yield piece

    def fail(self, error: SnapshotterError) -> None:
        """Let both ends know that this upload will not succeed."""
        self._error = self._error or error
        self._pipe.fail(error)

    def write(self, piece: Piece) -> None:
        self._pipe.put(piece)

    def commit(self) -> None:
        self._pipe.end()

    def abort(self) -> None:
        self._aborted = True
        self.fail(SnapshotterError(f"layer {self.layer.digest}: interrupted"))


def _read_artifact(artifacts: ContentSource, digest: Digest) -> bytes:
    return read_verified(artifacts, digest, limit=MAX_ZTOC_SIZE)


def _has(source: ContentSource, entry: Descriptor) -> bool:
    try:
        source.size(entry.digest)
    except NotFound:
        return False
    return True
