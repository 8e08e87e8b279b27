"""The order in which a layer's spans were first used, kept for the next cold start.

The file is a magic and then one 32-bit span number per first use, only ever appended to. A span is in it at
most once, so it is never longer than the layer has spans. A crash loses the last moments or leaves half a
number; both are read over. Numbers that are no span of the layer are skipped: the file is a hint, and the
worst a wrong hint does is to fetch in a worse order.

Concurrency: `add` and `take_unsaved` on the main loop; `append` and `load` in a worker, one at a time.
"""

from __future__ import annotations

import array
import os
import sys
from pathlib import Path

MAGIC = b"SPANTRC1"
"""The last digit is the version. History: 1 = little-endian 32-bit span numbers."""


def load(path: Path, span_count: int) -> list[int]:
    """Return the recorded order; empty when there is no file, or one of another version. Raises OSError."""
    try:
        with open(path, "rb") as file:
            content = file.read(len(MAGIC) + 4 * span_count)
    except FileNotFoundError:
        return []
    if content[: len(MAGIC)] != MAGIC:
        return []
    numbers = array.array("I", content[len(MAGIC) : len(content) - len(content) % 4])
    if sys.byteorder == "big":
        numbers.byteswap()
    return [span for span in dict.fromkeys(numbers) if span < span_count]


def append(path: Path, spans: list[int]) -> None:
    """Add `spans` at the end of the file, making it if need be; without any, nothing is done. Raises OSError."""
    if not spans:
        return
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        whole = os.fstat(fd).st_size
        if whole < len(MAGIC) or os.pread(fd, len(MAGIC), 0) != MAGIC:
            os.ftruncate(fd, 0)
            os.write(fd, MAGIC)
        else:
            os.ftruncate(fd, whole - whole % 4)
        numbers = array.array("I", spans)
        if sys.byteorder == "big":
            numbers.byteswap()
        os.write(fd, numbers.tobytes())
    finally:
        os.close(fd)


class Trace:
    """The first uses of one layer's spans, those of former runs included."""

    def __init__(self, recorded: list[int]) -> None:
        self._seen = dict.fromkeys(recorded)
        self._unsaved: list[int] = []

    def order(self, span_count: int) -> list[int]:
        """Return all spans: first those that were used, in that order, then the rest in tar order."""
        rest = (span for span in range(span_count) if span not in self._seen)
        return [*self._seen, *rest]

    def add(self, span: int) -> bool:
        """Record a use of `span`; return whether it was the first."""
        if span in self._seen:
            return False
        self._seen[span] = None
        self._unsaved.append(span)
        return True

    def take_unsaved(self) -> list[int]:
        """Return what the file does not have yet; the caller appends it."""
        unsaved, self._unsaved = self._unsaved, []
        return unsaved
