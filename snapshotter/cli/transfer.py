"""The content of a new image on its way into a registry: blobs, then manifests, then the name.

A blob that the repository has is not sent; one that another repository of the registry has is mounted; any other is
streamed. A name never points to an image that is not complete, and a run that broke is finished by the next.

Concurrency: `Destination.sink` and the sinks it returns are for the threads that read layers; the rest is for tasks.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import trio

from snapshotter.cli.remotecontent import Piece, RegistryContent, Sink
from snapshotter.errors import NotFound, SnapshotterError
from snapshotter.nursery import open_nursery
from snapshotter.oci.descriptor import Descriptor
from snapshotter.oci.media_types import INDEX_TYPES, MANIFEST_TYPES
from snapshotter.oci.reference import Reference
from snapshotter.registry.client import RegistryClient
from snapshotter.registry.upload import BlobUpload
from snapshotter.soci.content import ContentSource, read_verified
from snapshotter.soci.create import MAX_ZTOC_SIZE

CONCURRENCY = 3


class Destination:
    """The repository of `reference`, where the image `content` goes that is in the repository of `origin`."""

    def __init__(
        self, registry: RegistryClient, reference: Reference, content: RegistryContent, origin: Reference
    ) -> None:
        self._registry = registry
        self._reference = reference
        self._content = content
        self._origin = origin
        self._limit = trio.CapacityLimiter(CONCURRENCY)

    def sink(self, layer: Descriptor) -> Sink | None:
        """Return where to send a layer that is about to be read, None when it is there already."""
        if self._content.call(lambda: self._is_there(layer)):
            return None
        upload = self._registry.upload(self._reference, layer.digest)
        self._content.call(upload.open)
        return _UploadSink(self._content, upload)

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

    async def _push_blob(self, entry: Descriptor, artifacts: ContentSource) -> None:
        async with self._limit:
            if await trio.to_thread.run_sync(_has, artifacts, entry):
                data = await trio.to_thread.run_sync(self._read, entry, artifacts)
                await self._registry.push_blob(self._reference, data)
            elif not await self._is_there(entry):
                await trio.to_thread.run_sync(self._copy, entry)

    def _copy(self, entry: Descriptor) -> None:
        upload = self._registry.upload(self._reference, entry.digest)
        self._content.call(upload.open)
        sink = _UploadSink(self._content, upload)
        try:
            for piece in self._content.pieces(entry):
                sink.write(piece)
            sink.commit()
        except BaseException:
            sink.abort()
            raise

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


class _UploadSink:
    """Sends a piece while its reader works on it; the next piece waits until that one has arrived."""

    def __init__(self, content: RegistryContent, upload: BlobUpload) -> None:
        self._content = content
        self._upload = upload
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._sending: Future[None] | None = None

    def write(self, piece: Piece) -> None:
        self._wait()
        self._sending = self._pool.submit(self._content.call, lambda: self._upload.write(piece))

    def commit(self) -> None:
        self._wait()
        self._content.call(self._upload.commit)
        self._pool.shutdown()

    def abort(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        try:
            self._content.call(self._upload.abort)
        except (SnapshotterError, trio.RunFinishedError):
            return

    def _wait(self) -> None:
        if self._sending is not None:
            self._sending.result()


def _has(source: ContentSource, entry: Descriptor) -> bool:
    try:
        source.size(entry.digest)
    except NotFound:
        return False
    return True
