"""A page of counters that outlives the process that counts.

The daemon makes one page (a memfd) per layer mount and one for the fetcher, hands it to each process
that serves there, and reads it whenever somebody asks. A killed process loses no counts, and counting
needs no message.

Concurrency: one process writes a page at a time (a layer server, or the fetcher); within it only one
thread does, or the caller holds a lock. Readers may see a count a moment late, never a torn one: each is
one aligned 64-bit word.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Sequence


class CounterPage:
    """Named 64-bit counters in shared memory, in the order of `names`."""

    def __init__(self, fd: int, names: Sequence[str], *, writable: bool) -> None:
        self._names = tuple(names)
        self._index = {name: i for i, name in enumerate(self._names)}
        size = max(8 * len(self._names), 8)
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._map = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=protection)
        self._words = memoryview(self._map).cast("Q")

    @staticmethod
    def create(label: str, names: Sequence[str]) -> int:
        """Return the descriptor of a new page, all zero, of a size that nobody can change. The caller owns it."""
        fd = os.memfd_create(label, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, max(8 * len(names), 8))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return fd

    def index(self, name: str) -> int:
        """Return the position of `name`, for `add_at` on hot paths. Raises KeyError."""
        return self._index[name]

    def add(self, name: str, amount: int = 1) -> None:
        """Add to the counter called `name`. Raises KeyError."""
        self._words[self._index[name]] += amount

    def add_at(self, index: int, amount: int = 1) -> None:
        """Add to the counter at `index`: one word, no lookup."""
        self._words[index] += amount

    def set(self, name: str, value: int) -> None:
        """Set a gauge."""
        self._words[self._index[name]] = value

    @property
    def words(self) -> memoryview:
        """The counters themselves, by index, for whoever looks at many of them often."""
        return self._words

    def snapshot(self) -> dict[str, int]:
        """Return every counter by name."""
        return dict(zip(self._names, self._words, strict=False))

    def close(self) -> None:
        """Unmap the page."""
        self._words.release()
        self._map.close()
