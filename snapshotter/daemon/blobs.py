"""Where the blobs of a parallel pull go: into containerd's content store, or nowhere for good.

With containerd, manifest and config are read there too: they are what the client has pulled just now, and
their absence shows that this is not the containerd which asks. What is written is under a lease, and named by the
manifest's labels, before anybody could collect it.

Concurrency: plain blocking calls, for threads; `BlobSite` belongs to one job.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from snapshotter.containerd.client import Containerd
from snapshotter.containerd.content import ContentStore
from snapshotter.containerd.labels import layer_references
from snapshotter.daemon.localcontent import ANSWER_WITHIN_S
from snapshotter.download.downloads import BlobStore
from snapshotter.download.files import FileStore
from snapshotter.errors import InvalidIndex, NotFound, Unavailable
from snapshotter.oci.descriptor import Descriptor
from snapshotter.oci.manifest import ImageConfig, ImageManifest, parse, parse_config
from snapshotter.soci.content import read_verified
from snapshotter.units import Digest


@dataclass(frozen=True, slots=True)
class Documents:
    """What an image says of its layers."""

    manifest: ImageManifest
    config: ImageConfig


class BlobSite(Protocol):
    """A store for the blobs of one image, from which they can be read while they are unpacked."""

    store: BlobStore

    def open(self, layer: Descriptor) -> IO[bytes]:
        """Return the file of a blob that was stored. Raises SnapshotterError, OSError."""


class _InFiles:
    """Blobs that are discarded."""

    def __init__(self, store: FileStore) -> None:
        self._files = store
        self.store: BlobStore = store

    def open(self, layer: Descriptor) -> IO[bytes]:
        return self._files.take(layer.digest)


class _InContainerd:
    """Blobs that stay."""

    def __init__(self, content: ContentStore, scratch: Path) -> None:
        self._content = content
        self._scratch = scratch
        self.store: BlobStore = content

    def open(self, layer: Descriptor) -> IO[bytes]:
        file = self._content.open_file(layer.digest)
        if file is not None:
            return file
        # containerd's files are not to be seen from here, as in a container of our own.
        with ExitStack() as undo:
            copy = undo.enter_context(tempfile.TemporaryFile(dir=self._scratch))
            for chunk in self._content.chunks(layer.digest):
                copy.write(chunk)
            copy.flush()
            undo.pop_all()
        return copy


@contextmanager
def discarding(scratch: Path, uses: Iterable[Digest]) -> Iterator[BlobSite]:
    """Give a site whose blobs are gone when they have been opened and closed, each as often as it is in `uses`."""
    with closing(FileStore(scratch, uses)) as store:
        yield _InFiles(store)


class KeptBlobs:
    """The content store of one containerd."""

    def __init__(self, address: str, scratch: Path) -> None:
        self._address = address
        self._scratch = scratch

    def documents(self, namespace: str, manifest: Digest) -> Documents:
        """Return manifest and config. Raises Unavailable when that containerd does not have them, CorruptData."""
        with Containerd.connect(self._address, namespace, timeout=ANSWER_WITHIN_S) as containerd:
            try:
                parsed = parse(read_verified(containerd.content, manifest))
                if not isinstance(parsed, ImageManifest):
                    raise InvalidIndex(f"{manifest} is a list of images, not the image of one platform")
                config = parse_config(read_verified(containerd.content, parsed.config.digest))
            except NotFound as error:
                raise Unavailable(
                    f"containerd at {self._address} is not the one that pulls ({error}); "
                    "[content_store] containerd_address names its socket"
                ) from error
        return Documents(parsed, config)

    @contextmanager
    def site(self, namespace: str, manifest: Digest, documents: Documents) -> Iterator[BlobSite]:
        """Give a site in `namespace` whose blobs live as long as the manifest, and at least as long as the block."""
        with ExitStack() as stack:
            containerd = stack.enter_context(Containerd.connect(self._address, namespace))
            leased = stack.enter_context(containerd.lease())
            leased.content.label(manifest, layer_references(documents.manifest.layers))
            yield _InContainerd(leased.content, self._scratch)
