"""Layers on their way from a registry into containerd's content store, several at once.

Each layer is read in ranges, one range ahead of what containerd is hashing, and resumed at the range where the
connection broke. A registry that does not honour ranges is asked for the whole blob instead.

Concurrency: one trio task calls `start` and `wait`; the work runs in the nursery it was given. Cancelling the nursery
drops every unfinished blob.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import trio

from snapshotter.cli.nursery import open_nursery
from snapshotter.cli.rangereader import RANGE_SIZE, RangeReader
from snapshotter.containerd.content import ContentStore, Ingest
from snapshotter.errors import (
    AlreadyExists,
    DigestMismatch,
    FailedPrecondition,
    RangeNotHonoured,
    SnapshotterError,
)
from snapshotter.oci.descriptor import Descriptor
from snapshotter.oci.reference import Reference
from snapshotter.registry.client import RegistryClient
from snapshotter.units import Digest

DEFAULT_CONCURRENCY: Final = 3
"""Layers at once, as containerd's own client."""

Piece: TypeAlias = bytes | bytearray | memoryview
_Pieces: TypeAlias = "trio.MemorySendChannel[Piece]"
_Send: TypeAlias = Callable[[Descriptor, _Pieces], Awaitable[None]]


@dataclass(slots=True)
class _Layer:
    """One layer's fate; whoever sets `done` has set `error` before."""

    done: trio.Event = field(default_factory=trio.Event)
    error: SnapshotterError | None = None


class Downloads:
    """Layers of one image that are being fetched."""

    def __init__(
        self,
        reference: Reference,
        registry: RegistryClient,
        content: ContentStore,
        *,
        concurrency: int = DEFAULT_CONCURRENCY,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        self._reference = reference
        self._registry = registry
        self._content = content
        self._labels = labels
        self._limit = trio.CapacityLimiter(concurrency)
        self._ranges = RangeReader(registry, reference, connections=concurrency)
        self._layers: dict[Digest, _Layer] = {}

    def close(self) -> None:
        """Drop the connections."""
        self._ranges.close()

    def start(self, layers: Sequence[Descriptor], nursery: trio.Nursery) -> None:
        """Begin to fetch `layers`, the first ones first; those that were begun before are left alone."""
        for layer in layers:
            if layer.digest not in self._layers:
                self._layers[layer.digest] = _Layer()
                nursery.start_soon(self._run, layer)

    async def wait(self, layer: Digest) -> None:
        """Return when a layer that was started is in the content store. Raises what went wrong."""
        state = self._layers[layer]
        await state.done.wait()
        if state.error is not None:
            raise state.error

    async def _run(self, layer: Descriptor) -> None:
        state = self._layers[layer.digest]
        try:
            async with self._limit:
                await self._fetch(layer)
        except SnapshotterError as error:
            # Not raised here: the layers below this one may still be unpacked before anybody asks for it.
            state.error = error
        state.done.set()

    async def _fetch(self, layer: Descriptor) -> None:
        # Somebody may have the blob before we begin, or before we end: either way it is there.
        with contextlib.suppress(AlreadyExists):
            try:
                await self._transfer(layer, self._send_ranges)
            except RangeNotHonoured:
                await self._transfer(layer, self._send_stream)

    async def _transfer(self, layer: Descriptor, send: _Send) -> None:
        """Pass what `send` produces on to the content store, both working at the same time."""
        ingest = await trio.to_thread.run_sync(self._content.ingest, layer.digest, layer.size)
        try:
            if not ingest.complete:
                await self._pump(layer, ingest, send)
            await trio.to_thread.run_sync(ingest.commit, self._labels)
        except FailedPrecondition as error:
            raise DigestMismatch(
                f"layer {layer.digest} of {self._reference.locator}: the registry sent other bytes ({error})"
            ) from error
        finally:
            ingest.close()

    async def _pump(self, layer: Descriptor, ingest: Ingest, send: _Send) -> None:
        sender, receiver = trio.open_memory_channel[Piece](0)

        async def produce() -> None:
            with sender:
                await send(layer, sender)

        async with open_nursery() as nursery:
            nursery.start_soon(produce)
            async for piece in receiver:
                await trio.to_thread.run_sync(ingest.write, piece)

    async def _send_ranges(self, layer: Descriptor, pieces: _Pieces) -> None:
        for start in range(0, layer.size, RANGE_SIZE):
            await pieces.send(await self._ranges.read(layer, start, min(start + RANGE_SIZE, layer.size)))

    async def _send_stream(self, layer: Descriptor, pieces: _Pieces) -> None:
        async with contextlib.aclosing(self._registry.stream_blob(self._reference, layer)) as stream:
            async for piece in stream:
                await pieces.send(piece)
