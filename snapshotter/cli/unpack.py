"""Turning the layers of an image into snapshots, as containerd's own client does it.

Layers go in order. For each one the snapshotter is asked to prepare it under its chain ID's label: a remote
snapshotter answers that it exists, and the layer's blob is never fetched. The first time a snapshotter gives ordinary
mounts instead, that layer and all above it are downloaded (concurrently, in the background) and each is applied and
committed when its turn comes.

Concurrency: one trio task. What a cancellation interrupts is removed: the half-made snapshot here, blobs by
`Downloads`, the rest by the lease that the caller holds.
"""

from __future__ import annotations

import contextlib
import functools
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

import trio

from snapshotter.cli.labels import SNAPSHOT_REF
from snapshotter.containerd.client import Containerd
from snapshotter.containerd.snapshots import Mounts
from snapshotter.download.downloads import Downloads
from snapshotter.errors import AlreadyExists, DigestMismatch, SnapshotterError
from snapshotter.nursery import open_nursery
from snapshotter.oci.descriptor import Descriptor
from snapshotter.units import Digest, sha256_digest

UNCOMPRESSED_LABEL: Final = "containerd.io/uncompressed"
"""On a layer blob: its diffID, once unpacking has shown it."""
_ATTEMPTS: Final = 3
"""To prepare a layer which the snapshotter says exists and then does not show; containerd's number."""


class Outcome(Enum):
    """How a layer's snapshot came to be."""

    PRESENT = "present"
    """It was there before."""
    REMOTE = "remote"
    """The snapshotter made it without the blob."""
    UNPACKED = "unpacked"
    """Its blob was downloaded and unpacked."""


@dataclass(frozen=True, slots=True)
class UnpackedLayer:
    """One layer that has a snapshot now."""

    layer: Descriptor
    chain_id: Digest
    outcome: Outcome
    seconds: float


def chain_ids(diff_ids: Sequence[Digest]) -> list[Digest]:
    """Return the name of each layer's snapshot: it depends on the layer and on every one below."""
    chain: list[Digest] = []
    for diff_id in diff_ids:
        chain.append(sha256_digest(f"{chain[-1]} {diff_id}".encode()) if chain else diff_id)
    return chain


@dataclass(frozen=True, slots=True)
class _Step:
    """One layer whose turn it is."""

    layer: Descriptor
    diff_id: Digest
    parent: str
    chain_id: Digest
    labels: Mapping[str, str]


class Unpacker:
    """Makes the snapshots of one image, in one snapshotter."""

    def __init__(
        self,
        containerd: Containerd,
        snapshotter: str,
        downloads: Downloads,
        *,
        labels: Callable[[int], Mapping[str, str]] = lambda _: {},
        report: Callable[[int, UnpackedLayer], None] = lambda _position, _layer: None,
    ) -> None:
        """`labels` are for the snapshot of the layer of that position, besides the chain ID's own."""
        self._containerd = containerd
        self._snapshots = containerd.snapshots(snapshotter)
        self._downloads = downloads
        self._more_labels = labels
        self._report = report

    async def unpack(self, layers: Sequence[Descriptor], diff_ids: Sequence[Digest]) -> list[UnpackedLayer]:
        """Make a snapshot of each layer, lowest first. Raises SnapshotterError naming the layer."""
        parent = ""
        finished: list[UnpackedLayer] = []
        async with open_nursery() as nursery:
            for position, (layer, chain_id) in enumerate(zip(layers, chain_ids(diff_ids), strict=True)):
                begin = time.monotonic()
                labels = {SNAPSHOT_REF: str(chain_id), **self._more_labels(position)}
                step = _Step(layer, diff_ids[position], parent, chain_id, labels)
                fetch = functools.partial(self._downloads.start, layers[position:], nursery)
                outcome = await self._snapshot(step, fetch)
                finished.append(UnpackedLayer(layer, chain_id, outcome, time.monotonic() - begin))
                self._report(position, finished[-1])
                parent = chain_id
            # Blobs of layers that turned out to have a snapshot are not waited for.
            nursery.cancel_scope.cancel()
        return finished

    async def _snapshot(self, step: _Step, fetch: Callable[[], None]) -> Outcome:
        if await trio.to_thread.run_sync(self._snapshots.exists, step.chain_id):
            return Outcome.PRESENT
        key = f"extract-{time.time_ns() % 1_000_000_000}-{secrets.token_urlsafe(3)} {step.chain_id}"
        mounts = await self._prepare(key, step)
        if mounts is None:
            return Outcome.REMOTE
        committed = False
        try:
            fetch()
            await self._downloads.wait(step.layer.digest)
            await self._apply(step, mounts)
            with contextlib.suppress(AlreadyExists):
                await trio.to_thread.run_sync(self._snapshots.commit, step.chain_id, key, step.labels)
                committed = True
        finally:
            if not committed:
                with contextlib.suppress(SnapshotterError):
                    self._snapshots.remove(key)
        label = {UNCOMPRESSED_LABEL: str(step.diff_id)}
        await trio.to_thread.run_sync(self._containerd.content.label, step.layer.digest, label)
        return Outcome.UNPACKED

    async def _prepare(self, key: str, step: _Step) -> Mounts | None:
        """Return where to unpack, or None when the snapshotter has made the layer itself."""
        for _ in range(_ATTEMPTS):
            try:
                return await trio.to_thread.run_sync(
                    self._snapshots.prepare, key, step.parent, step.labels, abandon_on_cancel=True
                )
            except AlreadyExists:
                if await trio.to_thread.run_sync(self._snapshots.exists, step.chain_id):
                    return None
        raise SnapshotterError(
            f"layer {step.layer.digest}: snapshotter {self._snapshots.snapshotter} says that snapshot"
            f" {step.chain_id} exists but does not show it"
        )

    async def _apply(self, step: _Step, mounts: Mounts) -> None:
        """Let containerd unpack a layer and check what it found; on cancellation, stop it before its directory goes."""
        work = self._containerd.apply(step.layer, mounts)
        try:
            found = await trio.to_thread.run_sync(work.result, abandon_on_cancel=True)
        finally:
            work.cancel()
        if found != step.diff_id:
            raise DigestMismatch(
                f"layer {step.layer.digest}: uncompressed it has digest {found},"
                f" but the image's config says {step.diff_id}"
            )
