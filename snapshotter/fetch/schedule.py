"""Which spans are fetched next, and which of them travel in one range. Pure: no clock, no I/O.

A span that somebody wants and that is not on its way is in exactly one of three queues of its layer. What
is taken leaves its queue and becomes one range: the oldest span, and after it every neighbour that is
wanted too, up to a size. Neighbours are only ever added behind the first, because spans are used one by one
as they arrive: what rides along never delays what asked first.

Layers take turns within a priority, in the order in which they came to want something, so that one layer
with a thousand wishes does not starve another with one. In the background nobody starves: there the layer goes first
that a reader came to last, with what lies behind that place; of those that nobody has read, the smallest.

Concurrency: the main loop only. It does not know about flights, connections or memory: the caller takes
when there is room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum


class Priority(IntEnum):
    """Why a span is fetched; smaller goes first."""

    ON_DEMAND = 0
    """A reader is blocked on it."""
    AHEAD = 1
    """A reader is likely to come to it soon."""
    BACKGROUND = 2
    """The layer is to become complete."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Neighbouring spans `[first, end)` of one layer that are to travel in one range."""

    layer: str
    first: int
    end: int
    priority: Priority


class _Wishes:
    """The wanted spans of one layer; dicts because they keep the order and drop from the middle."""

    __slots__ = ("place", "queues", "read", "recorded", "sizes", "total")

    def __init__(self, sizes: Sequence[int], recorded: bool) -> None:
        self.recorded = recorded
        self.sizes = sizes
        self.total = sum(sizes)
        self.read = 0
        """When a reader came last, as a count of such events over all layers; 0: none has come."""
        self.place = 0
        """The span behind the one that it came to."""
        self.queues: tuple[dict[int, None], dict[int, None], dict[int, None]] = ({}, {}, {})


class Schedule:
    """The wanted spans of all open layers."""

    def __init__(self) -> None:
        self._layers: dict[str, _Wishes] = {}
        self._reads = 0
        self._turns: tuple[dict[str, None], dict[str, None], dict[str, None]] = ({}, {}, {})

    def add_layer(self, layer: str, sizes: Sequence[int], *, recorded: bool = False) -> None:
        """Make `layer` known; `sizes` are the compressed bytes of its spans.

        With `recorded` the background keeps to the order in which it is given spans: that of an earlier use.
        """
        self._layers[layer] = _Wishes(sizes, recorded)

    def remove_layer(self, layer: str) -> None:
        """Forget `layer` and all that is wanted of it."""
        self._layers.pop(layer, None)
        for turns in self._turns:
            turns.pop(layer, None)

    def want(self, layer: str, span: int, priority: Priority) -> None:
        """Queue `span`, or move it up; a span already queued with a better priority stays where it is."""
        queues = self._layers[layer].queues
        if any(span in queues[better] for better in range(priority + 1)):
            return
        for worse in range(priority + 1, len(queues)):
            queues[worse].pop(span, None)
        queues[priority][span] = None
        self._turns[priority].setdefault(layer)

    def want_in_background(self, layer: str, spans: Iterable[int]) -> None:
        """Queue `spans` for the background in this order, but for those that are queued already."""
        urgent, ahead, background = self._layers[layer].queues
        background.update((span, None) for span in spans if span not in urgent and span not in ahead)
        self._turns[Priority.BACKGROUND].setdefault(layer)

    def read(self, layer: str, end: int) -> None:
        """A reader of `layer`, if it is still there, has come to the span before `end`: the background goes on from there."""
        self._reads += 1
        wishes = self._layers.get(layer)
        if wishes is not None:
            wishes.read, wishes.place = self._reads, end

    def discard(self, layer: str, span: int) -> None:
        """Nobody wants `span` any more, or it has come."""
        for queue in self._layers[layer].queues:
            queue.pop(span, None)

    def stop_background(self, layer: str) -> None:
        """The layer is not to become complete any more."""
        self._layers[layer].queues[Priority.BACKGROUND].clear()

    def queued(self, priority: Priority) -> int:
        """Return how many spans wait with `priority`, over all layers."""
        return sum(len(self._layers[layer].queues[priority]) for layer in self._turns[priority])

    def queued_bytes(self, priority: Priority) -> int:
        """Return how many compressed bytes wait with `priority`, over all layers."""
        wishes = [self._layers[layer] for layer in self._turns[priority]]
        return sum(one.sizes[span] for one in wishes for span in one.queues[priority])

    def take(self, priority: Priority, limit: int, allowed: Callable[[str], bool]) -> Batch | None:
        """Take the next batch of `priority` from a layer that is `allowed`, or None.

        The batch has at least one span and otherwise at most `limit` bytes. A batch for a blocked reader
        takes along, at its end, neighbours that are read ahead; no reader is put behind those. The other
        priorities only take their own.
        """
        turns = self._turns[priority]
        order = list(turns)
        if priority is Priority.BACKGROUND:
            order.sort(key=lambda layer: (-self._layers[layer].read, self._layers[layer].total))
        for layer in order:
            if not self._layers[layer].queues[priority]:
                del turns[layer]
            elif allowed(layer):
                batch = self._coalesce(layer, priority, limit)
                del turns[layer]
                if self._layers[layer].queues[priority]:
                    turns[layer] = None
                return batch
        return None

    def _coalesce(self, layer: str, priority: Priority, limit: int) -> Batch:
        wishes = self._layers[layer]
        own = wishes.queues[priority]
        riders = wishes.queues[Priority.AHEAD] if priority is Priority.ON_DEMAND else {}
        first = next(iter(own))
        if priority is Priority.BACKGROUND and wishes.read and not wishes.recorded:
            first = min(own, key=lambda span: (span < wishes.place, span))
        del own[first]
        end, size = first + 1, wishes.sizes[first]
        queue = own
        while True:
            if end not in queue and queue is own:
                queue = riders
            if end not in queue:
                return Batch(layer, first, end, priority)
            size += wishes.sizes[end]
            if size > limit:
                return Batch(layer, first, end, priority)
            del queue[end]
            end += 1
