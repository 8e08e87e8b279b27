"""An index with its artifacts on the way into a registry.

Order: zTOCs and the config blob, then the index that names them, then (where the registry keeps no list of referrers
itself) the fallback tag. So a reader never finds an index whose zTOCs are missing, and a run that was refused midway is
finished by the next one, which sends only what the registry does not have.
"""

from __future__ import annotations

from dataclasses import dataclass

import trio

from snapshotter.cli.options import DEFAULT_UPLOADS
from snapshotter.errors import BlobNotFound
from snapshotter.nursery import open_nursery
from snapshotter.oci.media_types import OCI_MANIFEST
from snapshotter.oci.reference import Reference
from snapshotter.registry.client import RegistryClient
from snapshotter.soci.content import ArtifactStore, read_verified
from snapshotter.soci.create import MAX_ZTOC_SIZE
from snapshotter.soci.index import CONFIG_BLOB, IndexVersion, SociIndex
from snapshotter.soci.platforms import PlatformImage
from snapshotter.units import Digest


@dataclass(frozen=True, slots=True)
class Publication:
    """One index that is to be published."""

    image: PlatformImage
    index: SociIndex


class Push:
    """Uploads to one repository. One task at a time calls `publish`."""

    def __init__(
        self,
        registry: RegistryClient,
        store: ArtifactStore,
        reference: Reference,
        *,
        concurrency: int = DEFAULT_UPLOADS,
        existing: str = "warn",
        quiet: bool = False,
        silent: bool = False,
    ) -> None:
        """`quiet` prints only the digests of the indices, `silent` nothing."""
        self._registry = registry
        self._store = store
        self._reference = reference
        self._limit = trio.CapacityLimiter(concurrency)
        self._existing = existing
        self._quiet = quiet
        self._silent = silent

    async def publish(self, publication: Publication) -> bool:
        """Push one index with its artifacts; say whether it was, for --existing-index may forbid it."""
        subject = self._reference.with_digest(publication.image.descriptor.digest)
        if self._existing != "allow" and not await self._may_go_on(subject):
            return False
        index = publication.index
        if self._quiet and not self._silent:
            print(index.digest, flush=True)
        self._say(f"pushing soci index with digest: {index.digest}")
        artifacts = [entry.ztoc for entry in index.ztocs]
        artifacts += [descriptor.digest for _, descriptor in index.prefetch]
        async with open_nursery() as nursery:
            for digest in dict.fromkeys(artifacts):
                nursery.start_soon(self._upload, digest)
            nursery.start_soon(self._registry.push_blob, self._reference, CONFIG_BLOB)
        await self._registry.push_referrer(self._reference, index.data, OCI_MANIFEST)
        self._say(f"successfully pushed artifact with digest: {index.digest}")
        return True

    async def _may_go_on(self, subject: Reference) -> bool:
        self._say("checking if a soci index already exists in remote repository...")
        try:
            found = await self._registry.referrers(subject, IndexVersion.V1.media_type)
        except BlobNotFound:
            # No such repository yet; whether it may be made is for the registry to say.
            found = ()
        if not found:
            return True
        what = (
            "multiple soci indices found in remote repository"
            if len(found) > 1
            else f"soci index found in remote repository with digest: {found[0].digest}"
        )
        if self._existing == "skip":
            self._say(f"{what}: skipping pushing artifacts for image manifest: {subject.digest}")
            return False
        print(f"[WARN] {what}: pushing index anyway", flush=True)
        return True

    async def _upload(self, digest: Digest) -> None:
        async with self._limit:
            self._say(f"pushing artifact with digest: {digest}")
            data = await trio.to_thread.run_sync(self._read, digest)
            await self._registry.push_blob(self._reference, data)
            self._say(f"successfully pushed artifact with digest: {digest}")

    def _read(self, digest: Digest) -> bytes:
        return read_verified(self._store, digest, limit=MAX_ZTOC_SIZE)

    def _say(self, line: str) -> None:
        if not self._quiet and not self._silent:
            print(line, flush=True)
