"""Making room: which spans are given up, and how.

    first `data`       least recently used first; it can always be inflated again from `blob`
    then `blob`        least recently used first, and only of layers whose blob can be fetched again now

Never what was used in the last moments (its reader may not have looked yet), is in doubt, or has a flight.

A span that is evicted changes its state first and has a flight of its own until its bytes are gone, so that
whoever wants it meanwhile waits, and no late hole destroys what was stored anew. What counts as a use is what a
server tells: its first use of a span, and every wait for one; reads that the kernel answers are not seen.

Concurrency: the main loop only; holes are made by workers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby

import trio

from snapshotter.fetch import pipeline
from snapshotter.fetch.context import Context
from snapshotter.fetch.flight import Flight, Stage
from snapshotter.fetch.landing import Landing
from snapshotter.fetch.layerstate import ActiveLayer
from snapshotter.fetch.readers import Reader
from snapshotter.fetch.schedule import Priority
from snapshotter.fetch.space import Space
from snapshotter.layer.spans import SpanState

log = logging.getLogger(__name__)

GRACE_SECONDS = 2.0
"""Spans that were used within this time stay: much longer than a server needs from the message to the read."""


class Eviction:
    """Evicts spans of all open layers. `reachable` says whether a layer's blob can be fetched now."""

    def __init__(
        self,
        context: Context,
        landing: Landing,
        space: Space,
        reachable: Callable[[ActiveLayer], bool],
    ) -> None:
        self._context = context
        self._landing = landing
        self._space = space
        self._reachable = reachable

    def make_room(self, size: int) -> None:
        """Give up spans of at least `size` bytes together, as far as there are such."""
        for blob in (False, True):
            victims = []
            for _, number, layer, span in sorted(self._candidates(blob=blob), key=lambda one: one[:2]):
                if size <= 0:
                    break
                size -= self._bytes(layer, span, blob=blob)
                victims.append((number, span, layer))
            victims.sort(key=lambda one: one[:2])
            for _, group in groupby(victims, key=lambda one: one[0]):
                spans = [(layer, span) for _, span, layer in group]
                self._give_up(spans[0][0], [span for _, span in spans], blob=blob)

    def _candidates(self, *, blob: bool) -> Iterator[tuple[float, int, ActiveLayer, int]]:
        """Yield (last use, number of the layer, layer, span) of what may be evicted."""
        spared_since = trio.current_time() - GRACE_SECONDS
        for number, layer in enumerate(self._context.layers.values()):
            if blob and not self._reachable(layer):
                continue
            wanted = {SpanState.INFLATED}
            if blob:
                wanted = (
                    {SpanState.FETCHED, SpanState.INFLATED} if layer.files.shared else {SpanState.FETCHED}
                )
            elif layer.files.shared:
                continue
            for span, state in enumerate(layer.files.states.states()):
                if state in wanted and layer.used[span] < spared_since and layer.flights.get(span) is None:
                    yield layer.used[span], number, layer, span

    def _bytes(self, layer: ActiveLayer, span: int, *, blob: bool) -> int:
        where = layer.files.span(span)
        return layer.files.sizes[span] if blob else where.uncompressed_end - where.uncompressed_start

    def _give_up(self, layer: ActiveLayer, spans: list[int], *, blob: bool) -> None:
        """Change the states of `spans` (ascending) and have their bytes freed."""
        flights = []
        for span in spans:
            flight = layer.flights.begin(span, SpanState.MISSING)
            flight.stage = Stage.LOCAL
            flights.append(flight)
            self._landing.evict(layer, span, blob=blob)
            self._space.freed(self._bytes(layer, span, blob=blob))
        layer.evictions += blob
        self._context.counters.add("evicted_blob_spans" if blob else "evicted_data_spans", len(spans))
        layer.pin()
        self._context.workers.submit(
            Priority.ON_DEMAND,
            partial(pipeline.give_back, layer.files, spans, blob=blob),
            partial(self._given_back, layer, flights),
        )

    def _given_back(
        self, layer: ActiveLayer, flights: list[Flight[Reader]], outcome: Exception | None
    ) -> None:
        if outcome is not None:
            log.error("space cannot be given back", extra={"layer": layer.digest, "reason": str(outcome)})
        if not layer.closed:
            for flight in flights:
                self._landing.resume(layer, flight)
        layer.unpin()
        self._space.changed()
