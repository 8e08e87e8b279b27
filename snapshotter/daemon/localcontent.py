"""SOCI artifacts that are on this host already: made here by `soci create`, or pulled together with the image.

They are looked for before the registry is asked, in containerd's content store or in our own below --root, as
[content_store] says; both are shared with `soci`. What is used is copied into the layer's own files, so that the store may
lose it at any time: containerd's garbage collector decides over its content, and the daemon over its own.

containerd is asked in every namespace: it does not tell a snapshotter for which one it works.

Owns nothing. Concurrency: trio; each look takes a thread for a moment.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol, TypeVar

import trio

from snapshotter.containerd.client import Containerd
from snapshotter.containerd.labels import GC_CONTENT
from snapshotter.errors import InvalidIndex, NotFound, SnapshotterError
from snapshotter.oci.descriptor import Descriptor
from snapshotter.oci.manifest import parse as parse_manifest
from snapshotter.oci.reference import Reference
from snapshotter.soci.artifacts import ArtifactDatabase
from snapshotter.soci.content import ContentSource, read_verified
from snapshotter.soci.index import SociIndex
from snapshotter.soci.index import parse as parse_index
from snapshotter.soci.store import LayoutStore
from snapshotter.units import Digest

_log = logging.getLogger(__name__)

ANSWER_WITHIN_S: Final = 5.0
"""Longest wait for containerd, in place of which the registry is asked: it answers in milliseconds."""

_FIRST_ZTOC: Final = f"{GC_CONTENT}.ztoc.0"
"""A label that every SOCI index has, for it keeps the zTOCs from being collected."""

T = TypeVar("T")


class Artifacts(Protocol):
    """Where manifests, SOCI indices and zTOCs come from; `RegistryClient` is one such place."""

    async def manifest(self, ref: Reference) -> tuple[Descriptor, bytes]:
        """Return the manifest at `ref`, verified. Raises RegistryError, CorruptData."""

    async def blob(self, ref: Reference, target: Descriptor, *, max_size: int) -> bytes:
        """Return a whole blob, verified. Raises RegistryError, CorruptData."""

    async def referrers(self, ref: Reference, artifact_type: str) -> tuple[Descriptor, ...]:
        """Return the manifests of that type whose subject is `ref.digest`. Raises RegistryError."""


class LocalStore(Protocol):
    """Artifacts of this host; any thread may call."""

    def read(self, digest: Digest, limit: int | None = None) -> bytes:
        """Return content of at most `limit` bytes, verified. Raises NotFound and other SnapshotterError."""

    def indices(self) -> list[Digest]:
        """Return the SOCI indices, the newest last. Raises SnapshotterError."""


class LocalFirst:
    """The artifacts of a registry, but those that are on this host from here."""

    def __init__(self, local: LocalStore, registry: Artifacts) -> None:
        self._local = local
        self._registry = registry

    async def manifest(self, ref: Reference) -> tuple[Descriptor, bytes]:
        """Return the manifest at `ref`; a tag is for the registry to resolve."""
        digest = ref.digest
        if digest is not None:
            data = await self._look(lambda: self._local.read(digest))
            if data is not None:
                with suppress(InvalidIndex):
                    return Descriptor(parse_manifest(data).media_type, digest, len(data)), data
        return await self._registry.manifest(ref)

    async def blob(self, ref: Reference, target: Descriptor, *, max_size: int) -> bytes:
        """Return a whole blob of at most `max_size` bytes."""
        data = await self._look(lambda: self._local.read(target.digest, max_size))
        return await self._registry.blob(ref, target, max_size=max_size) if data is None else data

    async def referrers(self, ref: Reference, artifact_type: str) -> tuple[Descriptor, ...]:
        """Return the indices of `ref.digest` that are here; if there is none, what the registry has."""
        found = await self._look(self._indices) or []
        descriptors = tuple(
            index.descriptor
            for index in found
            if index.subject is not None
            and index.subject.digest == ref.digest
            and index.version.media_type == artifact_type
        )
        return descriptors or await self._registry.referrers(ref, artifact_type)

    def _indices(self) -> list[SociIndex]:
        found = []
        for digest in self._local.indices():
            with suppress(NotFound, InvalidIndex):  # collected meanwhile; no SOCI index
                found.append(parse_index(self._local.read(digest)))
        return found

    async def _look(self, read: Callable[[], T]) -> T | None:
        """Return what is here, None if it is not, or cannot be had."""
        try:
            return await trio.to_thread.run_sync(read)
        except NotFound:
            return None
        except SnapshotterError as error:
            _log.warning("no help from the local content store", extra={"error": str(error)})
            return None


class LayoutArtifacts:
    """Our own store: what `soci --content-store soci` keeps below the same root."""

    def __init__(self, root: Path) -> None:
        self._content = LayoutStore(root / "content")
        self._database = ArtifactDatabase(root)

    def read(self, digest: Digest, limit: int | None = None) -> bytes:
        """Return content, verified. Raises NotFound, CorruptData."""
        return _read(self._content, digest, limit)

    def indices(self) -> list[Digest]:
        """Return the SOCI indices in the database, the newest last."""
        return list(dict.fromkeys(row.digest for row in reversed(self._database.indices())))


class ContainerdArtifacts:
    """containerd's content store, of every namespace. A connection for each look: containerd may be restarted."""

    def __init__(self, address: str) -> None:
        self._address = address

    def read(self, digest: Digest, limit: int | None = None) -> bytes:
        """Return content, verified. Raises NotFound and other SnapshotterError."""
        with Containerd.connect(self._address, timeout=ANSWER_WITHIN_S) as containerd:
            for name in containerd.namespaces():
                with suppress(NotFound):
                    return _read(containerd.in_namespace(name).content, digest, limit)
        raise NotFound(f"content {digest}: not in containerd at {self._address}")

    def indices(self) -> list[Digest]:
        """Return the content that refers to zTOCs, the newest last."""
        with Containerd.connect(self._address, timeout=ANSWER_WITHIN_S) as containerd:
            found = [
                one
                for name in containerd.namespaces()
                for one in containerd.in_namespace(name).content.labelled(_FIRST_ZTOC)
            ]
        return list(dict.fromkeys(digest for _created, digest in sorted(found)))


def _read(content: ContentSource, digest: Digest, limit: int | None) -> bytes:
    return read_verified(content, digest) if limit is None else read_verified(content, digest, limit=limit)
