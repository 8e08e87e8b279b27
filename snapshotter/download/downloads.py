"""Layers on their way from a registry into a store: several at once, each in several ranges at once.

A range keeps its place until its bytes were passed on, in order, so memory is bounded by the places. What broke is
read again from the beginning of its range. A registry that does not honour ranges is asked for the whole blob instead.
A blob that is wrong although every range came is fetched once more, without the mirrors that had a part in it.

Concurrency: one trio task calls `start` and `wait`; the work runs in the nursery it was given. Cancelling the nursery
drops every unfinished blob.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeAlias

import trio

from snapshotter.download.rangereader import RANGE_SIZE, RangeReader
from snapshotter.errors import (
    AlreadyExists,
    DigestMismatch,
    FailedPrecondition,
    RangeNotHonoured,
    SnapshotterError,
)
from snapshotter.nursery import open_nursery
from snapshotter.oci.descriptor import Descriptor
from snapshotter.oci.reference import Reference
from snapshotter.registry.client import RegistryClient
from snapshotter.registry.retry import DEFAULT_RETRY, DEFAULT_TIMEOUTS, RetryPolicy, Timeouts
from snapshotter.units import Digest

DEFAULT_CONCURRENCY: Final = 3
"""Ranges at once, as many as containerd's own client fetches layers at once."""

Piece: TypeAlias = bytes | bytearray | memoryview
_Pieces: TypeAlias = "trio.MemorySendChannel[Piece]"
_Send: TypeAlias = Callable[[Descriptor, _Pieces], Awaitable[None]]


class Sink(Protocol):
    """One blob on its way into a store; used by one thread at a time. Left without `commit`, it leaves nothing."""

    @property
    def complete(self) -> bool:
        """Whether the store has every byte."""

    def write(self, data: Piece, /) -> None:
        """Append."""

    def commit(self, labels: Mapping[str, str] | None = None) -> None:
        """Keep the blob. Raises AlreadyExists, FailedPrecondition when it is not what was announced."""

    def close(self) -> None:
        """Forget what was not committed."""


class BlobStore(Protocol):
    """Where blobs go."""

    def ingest(self, digest: Digest, size: int) -> Sink:
        """Return a sink for a blob. Raises AlreadyExists."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much at once, and how hard to try."""

    connections: int = DEFAULT_CONCURRENCY
    """Ranges at once, of all layers; each is in memory until it is passed on."""
    range_size: int = RANGE_SIZE
    retry: RetryPolicy = DEFAULT_RETRY
    timeouts: Timeouts = DEFAULT_TIMEOUTS


DEFAULT_LIMITS: Final = Limits()


@dataclass(slots=True)
class _Layer:
    """One layer's fate; whoever sets `done` has set `error` before."""

    done: trio.Event = field(default_factory=trio.Event)
    error: SnapshotterError | None = None


@dataclass(slots=True)
class _Range:
    """A range that is being read; `data` is there when it is `done`."""

    start: int
    end: int
    done: trio.Event = field(default_factory=trio.Event)
    data: Piece = b""


class Downloads:
    """Layers of one image that are being fetched.

    `labels` are for the store. `gate` is shared with the downloads of other images. `on_progress` is told of the bytes
    of each piece that was stored.
    """

    def __init__(
        self,
        reference: Reference,
        registry: RegistryClient,
        store: BlobStore,
        *,
        limits: Limits = DEFAULT_LIMITS,
        labels: Mapping[str, str] | None = None,
        gate: trio.Semaphore | None = None,
        on_progress: Callable[[Descriptor, int], None] = lambda _layer, _size: None,
    ) -> None:
        self._reference = reference
        self._registry = registry
        self._store = store
        self._labels = labels
        self._gate = gate
        self._on_progress = on_progress
        self._range_size = limits.range_size
        self._limit = trio.CapacityLimiter(limits.connections)
        self._places = trio.Semaphore(limits.connections)
        self._ranges = RangeReader(
            registry,
            reference,
            connections=limits.connections,
            retry=limits.retry,
            timeouts=limits.timeouts,
        )
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
        """Return when a layer that was started is in the store. Raises what went wrong."""
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
        while True:
            try:
                await self._fetch_once(layer)
            except DigestMismatch as error:
                if not error.elsewhere:
                    raise
            else:
                return

    async def _fetch_once(self, layer: Descriptor) -> None:
        # Somebody may have the blob before we begin, or before we end: either way it is there.
        with contextlib.suppress(AlreadyExists):
            try:
                await self._transfer(layer, self._send_ranges)
            except RangeNotHonoured:
                await self._transfer(layer, self._send_stream)

    async def _transfer(self, layer: Descriptor, send: _Send) -> None:
        """Pass what `send` produces on to the store, both working at the same time."""
        sink = await trio.to_thread.run_sync(self._store.ingest, layer.digest, layer.size)
        try:
            if not sink.complete:
                await self._pump(layer, sink, send)
            await trio.to_thread.run_sync(sink.commit, self._labels)
        except FailedPrecondition as error:
            raise DigestMismatch(
                f"layer {layer.digest} of {self._reference.locator}: the registry sent other bytes ({error})",
                elsewhere=self._ranges.distrust(layer),
            ) from error
        finally:
            sink.close()

    async def _pump(self, layer: Descriptor, sink: Sink, send: _Send) -> None:
        sender, receiver = trio.open_memory_channel[Piece](0)

        async def produce() -> None:
            with sender:
                await send(layer, sender)

        async with open_nursery() as nursery:
            nursery.start_soon(produce)
            async for piece in receiver:
                await trio.to_thread.run_sync(sink.write, piece)
                self._on_progress(layer, len(piece))

    async def _send_ranges(self, layer: Descriptor, pieces: _Pieces) -> None:
        """Read ranges side by side and pass them on in order."""
        begin, begun = trio.open_memory_channel[_Range](math.inf)
        held: set[int] = set()

        async def read_all() -> None:
            with begin:
                for start in range(0, layer.size, self._range_size):
                    await self._places.acquire()
                    held.add(start)
                    one = _Range(start, min(start + self._range_size, layer.size))
                    begin.send_nowait(one)
                    nursery.start_soon(self._read, layer, one)

        try:
            async with open_nursery() as nursery:
                nursery.start_soon(read_all)
                async for one in begun:
                    await one.done.wait()
                    await pieces.send(one.data)
                    one.data = b""
                    held.discard(one.start)
                    self._places.release()
        finally:
            for _ in held:
                self._places.release()

    async def _read(self, layer: Descriptor, one: _Range) -> None:
        async with self._gate or contextlib.nullcontext():
            one.data = await self._ranges.read(layer, one.start, one.end)
        one.done.set()

    async def _send_stream(self, layer: Descriptor, pieces: _Pieces) -> None:
        async with contextlib.aclosing(self._registry.stream_blob(self._reference, layer)) as stream:
            async for piece in stream:
                await pieces.send(piece)
