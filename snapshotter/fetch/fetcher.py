"""The fetcher: layers are opened and closed, servers come and go, sources arrive; the parts are wired here.

Concurrency: everything runs on one trio thread, in steps that never wait for a disk or a network. Opening a
layer's files is the one slow thing, and happens in a thread; whoever needs the layer meanwhile waits for it.
"""

from __future__ import annotations

import logging
import socket
from functools import partial

import trio

from snapshotter.errors import RegistryError, SpanInflateError
from snapshotter.fetch import control, trace
from snapshotter.fetch.background import Background
from snapshotter.fetch.context import Context
from snapshotter.fetch.demand import Demand
from snapshotter.fetch.downloads import Downloads
from snapshotter.fetch.eviction import Eviction
from snapshotter.fetch.flight import Stage
from snapshotter.fetch.landing import Landing
from snapshotter.fetch.layerstate import ActiveLayer, LayerFiles
from snapshotter.fetch.readers import Reader
from snapshotter.fetch.sources import Sources
from snapshotter.fetch.space import Space
from snapshotter.layer.spans import boot_id
from snapshotter.layer.store import LayerStore
from snapshotter.layer.wire import Doubt, Message, Touch, Want
from snapshotter.units import Digest

log = logging.getLogger(__name__)

TRACE_DELAY = 1.0
"""Seconds between a first use and its being written down: one write for all that come together."""

READ_SECONDS = 10.0
"""A layer that was read so short a time ago is being read: a program that starts computes for seconds in between."""


class Fetcher:
    """All layers of one host. Make it inside a trio run, and run `context.timers` and `context.rest` beside it."""

    def __init__(self, context: Context, store: LayerStore) -> None:
        self._context = context
        self._store = store
        self._boot_id = context.options.boot_id or boot_id()
        self._sources = Sources(context, self._pump, self._source_failed)
        self._space = Space(context, self._make_room, self._pump)
        self._landing = Landing(context, self._space, self._changed, self._span_failed)
        self._downloads = Downloads(context, self._sources, self._landing, self._space)
        self._eviction = Eviction(context, self._landing, self._space, self._downloads.reachable)
        self._demand = Demand(context, self._downloads, self._landing)
        self._background = Background(context, self._landing, self._pump)
        self._turn: dict[Digest, trio.Lock] = {}
        """Of layers that are being opened."""

    async def open(self, digest: Digest, *, background: bool, image: str = "") -> None:
        """Open a layer, or say that an open one is to become complete, as a part of `image`.

        Raises SnapshotterError or OSError when its files cannot be used.
        """
        layer = await self._layer(digest)
        layer.image = layer.image or image
        if background and not layer.background:
            self._complete(layer)

    async def serve(self, digest: Digest, sock: socket.socket) -> None:
        """Serve one layer server until it goes away; owns `sock`.

        Raises SnapshotterError or OSError when the layer's files cannot be used.
        """
        reader = Reader(sock)
        try:
            layer = await self._layer(digest)
            layer.readers.add(reader)
            self._set_gauges()
            try:
                await reader.run(partial(self._message, layer, reader))
            except ValueError as error:
                self._context.counters.add("bad_messages")
                log.warning("server dropped", extra={"layer": digest, "reason": str(error)})
            finally:
                layer.readers.discard(reader)
                if not layer.closed:
                    self._demand.leave(layer, reader)
                self._set_gauges()
        finally:
            reader.close()

    def close(self, digest: Digest) -> None:
        """Close a layer: its servers are hung up on, its flights end. Nothing happens when it is not open."""
        layer = self._context.layers.pop(digest, None)
        if layer is None:
            return
        self._context.schedule.remove_layer(digest)
        self._downloads.stop(layer)
        self._save_trace(layer)
        for reader in layer.readers:
            reader.close()
        layer.close()
        self._space.changed()
        self._set_gauges()

    def answer(self, message: control.Source | control.NoSource) -> None:
        """Take the daemon's word on where a blob is; one for a layer that is not open is ignored."""
        layer = self._context.layers.get(message.layer)
        if layer is None:
            return
        if isinstance(message, control.Source):
            self._sources.arrived(layer, message.source)
        else:
            self._sources.failed(layer, message.error, temporary=message.temporary)

    def at_rest(self) -> None:
        """Let go of what only work needs."""
        self._downloads.let_go()

    def leave_clean(self) -> None:
        """Write down what is to be found at the next start, and close every layer. Ends all use."""
        for layer in self._context.layers.values():
            self._context.schedule.remove_layer(layer.digest)  # a transfer that ends now starts no other
            try:
                trace.append(layer.files.paths.trace, layer.trace.take_unsaved())
            except OSError as error:
                self._trace_saved(layer, error)
            layer.close()
        self._context.layers.clear()

    # ---- layers ----

    async def _layer(self, digest: Digest) -> ActiveLayer:
        """Return the open layer, opening it first if need be, and again when its files have lost their names."""
        turn = self._turn.setdefault(digest, trio.Lock())
        try:
            async with turn:
                layer = self._context.layers.get(digest)
                if layer is None:
                    return await self._open(digest)
                return await self._open_again(layer) if layer.files.is_displaced() else layer
        finally:
            if not turn.locked():  # a lock that somebody awaits is handed over, and never free
                self._turn.pop(digest, None)

    async def _open(self, digest: Digest) -> ActiveLayer:
        files = await trio.to_thread.run_sync(
            partial(
                LayerFiles.open,
                self._store,
                digest,
                boot_id=self._boot_id,
                span_max=self._context.options.span_max_bytes,
            )
        )
        layer = self._context.layers[digest] = ActiveLayer(files)
        self._context.schedule.add_layer(digest, files.sizes, recorded=bool(files.recorded))
        self._set_gauges()
        if files.states.verified:
            self._context.tell_daemon(control.Complete(digest, verified=True))
        return layer

    async def _open_again(self, layer: ActiveLayer) -> ActiveLayer:
        """Open a layer of which files were deleted under us: those that are missing are made, and filled, anew."""
        log.warning("cache files of a layer were deleted; they are made again", extra={"layer": layer.digest})
        self._context.counters.add("layers_reopened")
        layer.files.displace()
        self.close(layer.digest)
        again = await self._open(layer.digest)
        again.source = layer.source
        if layer.background:
            self._complete(again)
        return again

    def _complete(self, layer: ActiveLayer) -> None:
        """Begin to make a layer complete: it is mounted, because it is about to be read."""
        layer.background = True
        self._context.link.active(trio.current_time())
        self._background.start(layer)
        self._pump()

    # ---- servers ----

    def _message(self, layer: ActiveLayer, reader: Reader, message: Message) -> None:
        """Deal with one message. Raises ValueError when no server would send it."""
        if layer.closed:
            return  # it came on its way out
        self._context.link.active(trio.current_time())
        match message:
            case Want(first, end, _):
                self._demand.want(layer, reader, message)
                self._used(layer, range(first, end))
            case Doubt(span):
                self._demand.doubt(layer, reader, span)
            case Touch(span):
                self._demand.touch(layer, span)
                self._used(layer, range(span, span + 1))
            case _:
                raise ValueError(f"a server sent {message}")

    def _used(self, layer: ActiveLayer, spans: range) -> None:
        now = trio.current_time()
        for span in spans:
            layer.used[span] = now
        layer.read_until = now + READ_SECONDS
        self._context.schedule.read(layer.digest, spans.stop)
        fresh = [span for span in spans if layer.trace.add(span)]
        if fresh and not layer.trace_pending:
            layer.trace_pending = True
            self._context.timers.after(TRACE_DELAY, partial(self._save_trace, layer))

    def _save_trace(self, layer: ActiveLayer) -> None:
        layer.trace_pending = False
        unsaved = layer.trace.take_unsaved()
        if unsaved:
            self._context.chores.submit(
                0, partial(trace.append, layer.files.paths.trace, unsaved), partial(self._trace_saved, layer)
            )

    def _trace_saved(self, layer: ActiveLayer, outcome: Exception | None) -> None:
        if outcome is not None and not isinstance(
            outcome, FileNotFoundError
        ):  # the layer is removed, trace and all
            log.warning("trace not written", extra={"layer": layer.digest, "reason": str(outcome)})

    # ---- what the parts report ----

    def _pump(self) -> None:
        self._downloads.pump()

    def _make_room(self, size: int) -> None:
        self._eviction.make_room(size)

    def _changed(self, layer: ActiveLayer) -> None:
        self._background.changed(layer)
        self._downloads.pump()

    def _span_failed(self, layer: ActiveLayer, error: Exception) -> None:
        if not isinstance(error, SpanInflateError):  # which says nothing about registry or disk
            self._downloads.recovery.rest(layer, error)

    def _source_failed(self, layer: ActiveLayer, error: RegistryError) -> None:
        """Nothing of the layer can be fetched for now."""
        self._downloads.recovery.rest(layer, error)
        doomed = [flight for flight in layer.flights if flight.stage is Stage.QUEUED]
        for (
            flight
        ) in doomed:  # all of them first: telling one reader must not make another one's span ask again
            self._context.schedule.discard(layer.digest, flight.span)
        for flight in doomed:
            if flight.waiters:
                self._landing.failed(layer, flight, error)
            else:
                self._landing.abandon(layer, flight)

    def _set_gauges(self) -> None:
        layers = self._context.layers.values()
        self._context.counters.set("layers_open", len(layers))
        self._context.counters.set("readers", sum(len(layer.readers) for layer in layers))
