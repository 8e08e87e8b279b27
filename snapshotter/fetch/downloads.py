"""Starts transfers when there is room for them.

Room means a host that answers (`hosts.py`), a free thread, memory, and for the background what the link leaves. Readers and read-ahead have threads
of their own, so that they never queue behind the background; read-ahead may use half of them. A thread has a
connection for itself while it reads; idle ones are shared, so that a reader finds a warm one.

Memory is reserved for a range from its start until the last of its spans has been written. One range always
fits, however large. The background may use half of the memory.

Concurrency: the main loop only; `_run` and what it delivers happen in the threads of two pools.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import trio

from snapshotter.errors import RegistryUnavailable, SpanDigestMismatch
from snapshotter.events import Kind
from snapshotter.fetch import pipeline
from snapshotter.fetch.context import Context
from snapshotter.fetch.flight import Flight, Stage
from snapshotter.fetch.hosts import Hosts
from snapshotter.fetch.landing import Landing
from snapshotter.fetch.layerstate import ActiveLayer
from snapshotter.fetch.link import BESIDE_SECONDS
from snapshotter.fetch.memory import Buffers
from snapshotter.fetch.options import EIO
from snapshotter.fetch.pace import Pace
from snapshotter.fetch.pipeline import Outcome
from snapshotter.fetch.readers import Reader
from snapshotter.fetch.recovery import Recovery
from snapshotter.fetch.schedule import Batch, Priority
from snapshotter.fetch.sources import Sources
from snapshotter.fetch.space import ROUNDING, Space
from snapshotter.fetch.transfer import Transfer
from snapshotter.fetch.workers import WorkerPool
from snapshotter.layer.spans import SpanState
from snapshotter.registry.ranges import RangeClient
from snapshotter.registry.retry import Timeouts
from snapshotter.registry.source import BlobSource
from snapshotter.units import Digest

CUT_BYTES = 256 * 1024
"""A reader may have to wait for so much of a range in front of its span, however slow the link: below this a
new request is hardly faster. No measurement behind it."""

HOSTS_AT_ONCE = 4
"""Hosts that may be slow at once, each with all of its connections, before the layers of another wait. Nobody has
been seen to pull from more."""

_KIND_OF = {
    Priority.ON_DEMAND: Kind.ON_DEMAND,
    Priority.AHEAD: Kind.AHEAD,
    Priority.BACKGROUND: Kind.BACKGROUND,
}

HOST = ""
"""The name of the whole host among those that have a cap."""


class Downloads:
    """The transfers of one fetcher."""

    def __init__(self, context: Context, sources: Sources, landing: Landing, space: Space) -> None:
        self._context = context
        self._sources = sources
        self._landing = landing
        self._space = space
        self._hosts = Hosts(context, self.pump)
        self.recovery = Recovery(context, sources, landing, self.pump)
        options = context.options
        token = trio.lowlevel.current_trio_token()
        self._pools = {
            False: WorkerPool("get", options.on_demand_connections * HOSTS_AT_ONCE, token),
            True: WorkerPool("background-get", options.background_connections, token),
        }
        timeouts = Timeouts(
            connect=options.connect_timeout_s, read=options.read_timeout_s, total=options.range_timeout_s
        )
        ca_file = Path(options.ca_file) if options.ca_file else None
        self._client = RangeClient(
            connections=options.on_demand_connections + options.background_connections,
            timeouts=timeouts,
            ca_file=ca_file,
        )
        self._under_way: dict[Flight[Reader], Transfer] = {}
        self._transfers: dict[Transfer, None] = {}
        self._buffers = Buffers(options.memory_bytes)
        self._reserved = 0
        self._refusing = False
        self._quiet_timer = 0.0
        self._paces = (Pace(options.background_bytes_per_s), Pace(options.background_bytes_per_s_per_image))
        """Caps on the background: of the host, and of each image."""

    def pump(self) -> None:
        """Start every transfer that there is room for. Cheap when there is nothing to do."""
        if self._context.options.unreachable == EIO and not self._refusing:
            self._refuse_readers()
        while self._start_for_readers():
            pass
        while self._start_background():
            pass
        self._set_gauges()

    def ahead_room(self) -> int:
        """Return how many bytes may be asked for ahead of readers now."""
        queued = self._context.schedule.queued_bytes(Priority.AHEAD)
        return self._context.link.ahead_room(self._reader_bytes() + queued)

    def join(self, flight: Flight[Reader]) -> None:
        """A reader has begun to wait for a flight; if that is far back in a range, cut the range short."""
        transfer = self._under_way.get(flight)
        if transfer is None:
            return
        patience = max(int(self._context.link.rate * BESIDE_SECONDS), CUT_BYTES)
        if transfer.distance(flight.span) <= patience:
            return
        if any(other.waiters for other in transfer.undelivered()[1:] if other is not flight):
            return  # somebody waits for a nearer one: better all of them than a new request for each
        given_up = transfer.cut()
        if given_up:
            self._context.counters.add("cut_ranges")
        for other in given_up:
            del self._under_way[other]
            if transfer.background and not other.waiters:
                self._landing.abandon(transfer.layer, other)
            else:
                self._landing.queue(transfer.layer, other)

    def reachable(self, layer: ActiveLayer) -> bool:
        """Say whether what is given up of `layer` could be fetched again now."""
        source = layer.source.source
        return source is not None and not self._hosts.is_away(source.host)

    def stop(self, layer: ActiveLayer) -> None:
        """The layer is closed: its transfers end with the span that is arriving."""
        for transfer in self._transfers:
            if transfer.layer is layer:
                for flight in transfer.cut():
                    del self._under_way[flight]

    # ---- starting ----

    def _start_for_readers(self) -> bool:
        limit = self._room(self._context.options.memory_bytes)
        busy = [one.priority for one in self._transfers if not one.background and not one.ended]
        size = self._context.options.on_demand_connections
        if limit is None or len(busy) >= self._pools[False].size:
            return False
        batch = self._context.schedule.take(Priority.ON_DEMAND, limit, self._may_read)
        if batch is None and busy.count(Priority.AHEAD) < max(size // 2, 1):
            batch = self._context.schedule.take(Priority.AHEAD, limit, self._may_read)
        if batch is None:
            return False
        self._start(batch)
        return True

    def _start_background(self) -> bool:
        now = trio.current_time()
        limit = self._room(self._context.options.memory_bytes // 2)
        allowance = self._context.link.background(now, reader_bytes=self._reader_bytes())
        busy = sum(one.background and not one.ended for one in self._transfers)
        if not self._paces[0].allows(HOST, now):
            return False
        if limit is None or busy >= allowance.ranges:
            self._pump_when_quiet(now)
            return False
        size = min(allowance.size, limit)
        if not self._context.schedule.queued(Priority.BACKGROUND) or not self._space.has_room(size):
            return False
        may_start = self._may_beside_readers if allowance.near else self._may_background
        batch = self._context.schedule.take(Priority.BACKGROUND, size, may_start)
        if batch is None:
            self._pump_when_quiet(now)
            return False
        size, image = self._start(batch), self._context.layers[Digest(batch.layer)].image
        for pace, name in zip(self._paces, (HOST, image), strict=True):
            free_at = pace.spend(name, size, now)
            if free_at is not None:
                self._context.timers.at(free_at, self.pump)
        return True

    def _room(self, budget: int) -> int | None:
        """Return how large the next range may be, None when `budget` is used up."""
        largest = self._context.options.range_max_bytes
        if self._reserved == 0:
            return largest
        return min(budget - self._reserved, largest) if budget > self._reserved else None

    def _may_read(self, digest: str) -> bool:
        source = self._sources.usable(self._context.layers[Digest(digest)])
        if source is None:
            return False
        busy = sum(
            not one.background and not one.ended and one.host == source.host for one in self._transfers
        )
        return busy < self._context.options.on_demand_connections and self._hosts.allows(source.host)

    def _may_background(self, digest: str) -> bool:
        layer = self._context.layers[Digest(digest)]
        now = trio.current_time()
        if layer.rest_until > now or not self._paces[1].allows(layer.image, now):
            return False
        source = self._sources.usable(layer)
        return source is not None and self._hosts.allows(source.host)

    def _may_beside_readers(self, digest: str) -> bool:
        being_read = trio.current_time() < self._context.layers[Digest(digest)].read_until
        return being_read and self._may_background(digest)

    def _refuse_readers(self) -> None:
        """Fail the reads whose layer cannot be reached, as the policy `eio` has it."""
        self._refusing = True
        for layer in list(self._context.layers.values()):
            source = layer.source.source
            if self._hosts.is_away(source.host) if source is not None else self._sources.is_away(layer):
                error = RegistryUnavailable(f"layer {layer.digest} cannot be reached at the moment")
                for flight in layer.flights:
                    if flight.waiters and flight.stage in (Stage.QUEUED, Stage.PAUSED):
                        self._landing.failed(layer, flight, error)
        self._refusing = False

    def _reader_bytes(self) -> int:
        """Return how many bytes are on their way to readers and read-ahead."""
        return sum(one.remaining() for one in self._transfers if not one.background and not one.ended)

    def _pump_when_quiet(self, now: float) -> None:
        """Come back when readers have been quiet: nothing else would wake the background then."""
        quiet_at = self._context.link.quiet_at()
        if quiet_at > now >= self._quiet_timer:
            self._quiet_timer = quiet_at
            self._context.timers.at(quiet_at, self.pump)

    def _start(self, batch: Batch) -> int:
        """Start the transfer of `batch`; return its size."""
        layer = self._context.layers[Digest(batch.layer)]
        source = layer.source.source
        assert source is not None, "a batch is only taken when its layer has a source"
        flights = []
        for span in range(batch.first, batch.end):
            flight = layer.flights.get(span) or layer.flights.begin(span, SpanState.FETCHED)
            assert flight.stage is Stage.QUEUED, f"span {span} is in the schedule and {flight.stage}"
            flight.stage = Stage.TRANSFER
            flights.append(flight)
        transfer = Transfer(layer, flights, batch.priority, self._buffers, now=trio.current_time())
        transfer.admitted = self._admit(transfer)
        self._under_way.update(dict.fromkeys(flights, transfer))
        self._transfers[transfer] = None
        self._reserved += transfer.size
        self._context.link.started(trio.current_time(), reader=not transfer.background)
        self._context.counters.add("background_ranges" if transfer.background else "ondemand_ranges")
        layer.pin()
        self._pools[transfer.background].submit(
            batch.priority,
            partial(self._run, transfer, source, self._deadline(flights)),
            partial(self._ended, transfer),
        )
        return transfer.size

    def _admit(self, transfer: Transfer) -> int:
        """Return how many bytes on disk are set aside for what comes, 0 when there is no room."""
        files, size = transfer.layer.files, transfer.size + ROUNDING * len(transfer.flights)
        if transfer.background:
            self._space.take(size)
            return size
        if not files.shared:
            where = [files.span(one.span) for one in transfer.flights if one.goal is SpanState.INFLATED]
            size += sum(span.uncompressed_end - span.uncompressed_start + ROUNDING for span in where)
        return size if self._space.admit(size) else 0

    def _deadline(self, flights: list[Flight[Reader]]) -> float:
        """Return when a request for `flights` has to be over, on the clock of `time.monotonic`."""
        now = trio.current_time()
        since = [begin for flight in flights for begin in flight.waiters.values()]
        return time.monotonic() + (max(since, default=now) - now) + self._context.options.read_budget_s

    # ---- in threads ----

    def _run(self, transfer: Transfer, source: BlobSource, deadline: float) -> None:
        files = transfer.layer.files

        def deliver(flight: Flight[Reader], compressed: memoryview, header: memoryview) -> None:
            self._context.workers.submit(
                Priority.ON_DEMAND if flight.waiters else transfer.priority,
                partial(
                    pipeline.store,
                    files,
                    flight.span,
                    compressed,
                    header,
                    lambda: flight.goal,
                    keep=transfer.admitted > 0,
                ),
                partial(self._written, transfer, flight),
            )

        transfer.run(self._client, source, deadline, deliver)

    # ---- ending ----

    def _written(self, transfer: Transfer, flight: Flight[Reader], outcome: Outcome | Exception) -> None:
        layer = transfer.layer
        self._count_bytes()
        transfer.written += 1
        del self._under_way[flight]
        self._release(transfer)
        if layer.closed:
            if isinstance(outcome, Outcome):
                outcome.close()
            return
        if isinstance(outcome, Outcome):
            layer.source.expired = -1
            if flight.span == 0 and outcome.state is not SpanState.MISSING:
                layer.header_has_come()
            self._landing.stored(layer, flight, outcome)
        elif isinstance(outcome, SpanDigestMismatch):
            self.recovery.mismatched(transfer, flight, outcome)
        else:
            self._landing.failed(layer, flight, outcome)
        self.pump()

    def _ended(self, transfer: Transfer, outcome: Exception | None) -> None:
        layer = transfer.layer
        self._count_bytes()
        self._context.link.ended(trio.current_time(), reader=not transfer.background)
        transfer.ended = True
        self._context.events.add(
            _KIND_OF[transfer.priority],
            layer.digest,
            trio.current_time() - transfer.started,
            transfer.flights[0].span,
            len(transfer.flights),
            transfer.received,
        )
        if outcome is None or transfer.received:
            self._hosts.answered(transfer.host)
        else:
            self._hosts.failed(transfer.host, outcome)
        missed = transfer.undelivered()
        for flight in missed:
            del self._under_way[flight]
        self._release(transfer)
        if outcome is not None and not layer.closed:
            self.recovery.transfer_failed(transfer, missed, outcome)
        elif transfer.background:
            layer.rests = 0
        self.pump()

    def _release(self, transfer: Transfer) -> None:
        """Give back the memory of a transfer whose last span has been written."""
        if transfer.ended and transfer.written == transfer.delivered():
            del self._transfers[transfer]
            self._reserved -= transfer.size
            self._space.settle(transfer.admitted)
            self._buffers.give(transfer.buffer)
            transfer.layer.unpin()
            self._context.rest.disturb()

    def let_go(self) -> None:
        """Keep no buffers for later, unless something is under way that will want them."""
        if not self._transfers:
            self._buffers.clear()
            self._set_gauges()

    def _count_bytes(self) -> None:
        """Let the link's estimate and the counters know what has come, on all transfers."""
        now = trio.current_time()
        for one in self._transfers:
            fresh = one.received - one.counted
            if fresh:
                one.counted += fresh
                self._context.link.received(now, fresh)
                self._context.counters.add("background_bytes" if one.background else "ondemand_bytes", fresh)

    def _set_gauges(self) -> None:
        counters, schedule = self._context.counters, self._context.schedule
        running = [one.background for one in self._transfers if not one.ended]
        counters.set("transfers_ondemand", running.count(False))
        counters.set("transfers_background", running.count(True))
        counters.set("memory_bytes", self._reserved)
        counters.set("memory_idle_bytes", self._buffers.free_bytes)
        counters.set("queued_ondemand", schedule.queued(Priority.ON_DEMAND))
        counters.set("queued_ahead", schedule.queued(Priority.AHEAD))
        counters.set("queued_background", schedule.queued(Priority.BACKGROUND))
        counters.set("spans_under_way", len(self._under_way))
        counters.set("link_bytes_per_second", int(self._context.link.rate))
        counters.set("background_width", self._context.link.width)
