"""What is known of images: manifest and SOCI index by manifest digest, in memory and on disk.

    <root>/images/<hex of the manifest digest>/manifest         verbatim, re-checked by its digest
                                               index-<hex>      verbatim, re-checked by the digest in its name
                                               found            how the index was found

An image that was resolved once needs no network to be resolved again. That there is no index is remembered
for a moment only, because containerd asks once for each layer; a failure of the registry for less.

Concurrency: trio; one discovery per image at a time.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections import OrderedDict
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import trio

from snapshotter.daemon.discovery import Found, Modes, find_index
from snapshotter.daemon.flights import Flights
from snapshotter.daemon.localcontent import Artifacts
from snapshotter.daemon.phases import Phase, Phases
from snapshotter.errors import CorruptData, NoIndex, SnapshotterError
from snapshotter.oci.manifest import ImageManifest
from snapshotter.oci.manifest import parse as parse_manifest
from snapshotter.oci.reference import Reference
from snapshotter.soci.index import parse as parse_index
from snapshotter.units import Digest, digest_hex, sha256_digest

_log = logging.getLogger(__name__)

_KEPT_IN_MEMORY = 128
"""Images; a manifest and an index are some 10 KiB together."""

_NO_INDEX_HOLDS_S = 30.0
"""A pull of an image without index asks for each of its layers within this time."""

_FAILURE_HOLDS_S = 2.0

_YOUNG_S = 600.0
"""Longer than the pull of an image takes from its first layer to its first mount."""

_Key = tuple[str, Digest, Digest | None]


class Catalog:
    """Resolves images, each once."""

    def __init__(
        self, root: Path, artifacts: Artifacts, modes: Modes, nursery: trio.Nursery, phases: Phases
    ) -> None:
        self._phases = phases
        self._directory = root / "images"
        self._directory.mkdir(mode=0o700, exist_ok=True)
        self._artifacts = artifacts
        self._modes = modes
        self._flights: Flights[Found] = Flights(nursery)
        self._known: OrderedDict[_Key, Found] = OrderedDict()
        self._failed: dict[_Key, tuple[float, SnapshotterError]] = {}
        self._saving = trio.Lock()

    async def resolve(self, image: Reference, explicit: Digest | None) -> Found:
        """Return manifest and index of `image` (a reference with a digest).

        Raises NoIndex, RegistryError or InvalidIndex.
        """
        assert image.digest is not None
        key = (image.locator, image.digest, explicit)
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        until, error = self._failed.get(key, (0.0, None))
        if error is not None and trio.current_time() < until:
            raise error
        self._failed.pop(key, None)
        return await self._flights.join(key, lambda: self._resolve(key, image, explicit))

    async def _resolve(self, key: _Key, image: Reference, explicit: Digest | None) -> Found:
        assert image.digest is not None
        found = await trio.to_thread.run_sync(self._load, image.digest, explicit)
        if found is None:
            try:
                with self._phases.timed(Phase.INDEX, image.digest, answers=(NoIndex,)):
                    found = await find_index(self._artifacts, image, explicit=explicit, modes=self._modes)
            except SnapshotterError as error:
                holds = _NO_INDEX_HOLDS_S if isinstance(error, NoIndex) else _FAILURE_HOLDS_S
                self._failed = {k: v for k, v in self._failed.items() if v[0] > trio.current_time()}
                self._failed[key] = (trio.current_time() + holds, error)
                raise
            async with self._saving:  # the same image may be known by several names
                await trio.to_thread.run_sync(self._save, image.digest, found)
        self._known[key] = found
        if len(self._known) > _KEPT_IN_MEMORY:
            self._known.popitem(last=False)
        _log.info(
            "SOCI index found",
            extra={
                "image": str(image),
                "index": found.index.digest,
                "how": found.how,
                "ztocs": len(found.index.ztocs),
            },
        )
        return found

    async def recall(self, image: Reference) -> Found:
        """Return what `image`, of which something is mounted, was resolved to; it is resolved again where that is lost.

        Raises as `resolve` does.
        """
        assert image.digest is not None
        found = await trio.to_thread.run_sync(self._read, image.digest)
        return found or await self.resolve(image, None)

    def tidy(self, used: Collection[str]) -> None:
        """Remove from disk what is known of images that nothing uses; `used` are manifest digests. For a thread.

        What is young stays: its image may be on its way.
        """
        names = {digest_hex(Digest(manifest)) for manifest in used}
        for directory in self._directory.iterdir():
            with suppress(FileNotFoundError):
                age = time.time() - directory.stat().st_mtime
                if directory.name not in names and not 0 <= age < _YOUNG_S:
                    shutil.rmtree(directory, ignore_errors=True)

    def _load(self, manifest: Digest, explicit: Digest | None) -> Found | None:
        """Return what is on disk, None when there is nothing whole that may be used."""
        found = self._read(manifest)
        if found is None:
            return None
        if explicit is not None:
            return replace(found, how="explicit") if explicit == found.index.digest else None
        return found if {"v1": self._modes.v1, "v2": self._modes.v2}.get(found.how, False) else None

    def _read(self, manifest: Digest) -> Found | None:
        """Return what is on disk, None when it is not whole."""
        directory = self._directory / digest_hex(manifest)
        try:
            how = (directory / "found").read_text("ascii")
            data = (directory / "manifest").read_bytes()
            index_path = next(directory.glob("index-*"))
            index = parse_index(index_path.read_bytes())
            parsed = parse_manifest(data)
        except (OSError, StopIteration, CorruptData, UnicodeError):
            return None
        whole = sha256_digest(data) == manifest and index_path.name == f"index-{digest_hex(index.digest)}"
        return Found(parsed, data, index, how) if whole and isinstance(parsed, ImageManifest) else None

    def _save(self, manifest: Digest, found: Found) -> None:
        """Store what was found. A disk that refuses costs the next start a look at the registry, nothing else."""
        directory = self._directory / digest_hex(manifest)
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
            for old in (directory / "found", *directory.glob("index-*")):
                old.unlink(missing_ok=True)
            for name, data in (
                ("manifest", found.manifest_data),
                (f"index-{digest_hex(found.index.digest)}", found.index.data),
                ("found", found.how.encode()),  # last: without it the others do not count
            ):
                temporary = directory / ".tmp"
                temporary.write_bytes(data)
                os.replace(temporary, directory / name)
        except OSError as error:
            _log.warning("what is known of an image could not be stored", extra={"error": str(error)})
