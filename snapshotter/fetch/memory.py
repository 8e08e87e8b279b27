"""Memory for ranges, used again and again while there is work, and given back when there is none.

Fresh memory is dear: the kernel clears every page on its first use, which in a virtual machine costs about
1 CPU second per GB, a third of what fetching costs altogether. So buffers go back to a list instead of the
system. The list never holds more than it was told to, and an idle fetcher empties it, and the heap with it.

Concurrency: the main loop only.
"""

from __future__ import annotations

import mmap
from bisect import insort
from dataclasses import dataclass, field

ROUND = 1 << 20
"""Buffers are a multiple of this, so that ranges of about the same size can use the same ones."""


@dataclass(slots=True, order=True)
class Buffer:
    """Some memory, at least as large as what was asked for."""

    size: int
    view: memoryview = field(compare=False, repr=False)


class Buffers:
    """Free buffers, at most `limit` bytes of them."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._free: list[Buffer] = []
        self.free_bytes = 0

    def take(self, size: int) -> Buffer:
        """Return a buffer of at least `size` bytes, whose content is anything. Raises MemoryError or OSError."""
        for index, buffer in enumerate(self._free):
            if buffer.size >= size:
                del self._free[index]
                self.free_bytes -= buffer.size
                return buffer
        rounded = -(-size // ROUND) * ROUND
        return Buffer(rounded, memoryview(mmap.mmap(-1, rounded)))

    def give(self, buffer: Buffer) -> None:
        """Take back a buffer that nobody uses any more."""
        if self.free_bytes + buffer.size <= self._limit:
            insort(self._free, buffer)
            self.free_bytes += buffer.size

    def clear(self) -> None:
        """Give all free memory back to the system."""
        self._free.clear()
        self.free_bytes = 0
