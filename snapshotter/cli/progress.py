"""The progress of a build on a terminal: a line per layer that is being read, and one for all. Nothing when piped.

Concurrency: workers call `advance` and `end`, the command's thread the rest; a lock orders what is drawn.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Sequence
from typing import Final, TextIO

from snapshotter.oci.descriptor import Descriptor
from snapshotter.units import Digest

_INTERVAL: Final = 0.1
"""Seconds between two drawings."""
_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")


class TerminalProgress:
    """Draws on `stream`, if that is a terminal."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._is_shown = self._stream.isatty()
        self._lock = threading.Lock()
        self._start = time.monotonic()
        self._total = 0
        self._done = 0
        self._active: dict[Digest, tuple[Descriptor, int]] = {}
        self._drawn = 0
        """Lines on the screen that the next drawing replaces."""
        self._next = 0.0

    def begin(self, layers: Sequence[Descriptor]) -> None:
        """These layers will be read, or found not to need it."""
        with self._lock:
            self._total += sum(layer.size for layer in layers)

    def advance(self, layer: Descriptor, size: int) -> None:
        """`size` more bytes of a layer were read."""
        with self._lock:
            self._active[layer.digest] = (layer, self._active.get(layer.digest, (layer, 0))[1] + size)
            self._done += size
            if self._is_shown and time.monotonic() >= self._next:
                self._draw()

    def end(self, layer: Descriptor) -> None:
        """A layer is finished, however much of it was read."""
        with self._lock:
            self._done += layer.size - self._active.pop(layer.digest, (layer, 0))[1]

    def print(self, line: str) -> None:
        """Print a line to stdout, above what is drawn."""
        with self._lock:
            self._erase()
            print(line, flush=True)

    def close(self) -> None:
        """Remove what is drawn."""
        with self._lock:
            self._erase()
            self._is_shown = False

    def _draw(self) -> None:
        width = shutil.get_terminal_size().columns - 1
        lines = [
            f"{digest[7:19]} {bar(done, layer.size, 20)} {size_text(done)} of {size_text(layer.size)}"
            for digest, (layer, done) in self._active.items()
        ]
        lines.append(summary(self._done, self._total, time.monotonic() - self._start))
        self._erase()
        self._stream.write("".join(f"{line[:width]}\n" for line in lines))
        self._stream.flush()
        self._drawn = len(lines)
        self._next = time.monotonic() + _INTERVAL

    def _erase(self) -> None:
        if self._drawn:
            # Up to the first of our lines, then away with all below.
            self._stream.write(f"\x1b[{self._drawn}A\x1b[J")
            self._stream.flush()
            self._drawn = 0


def bar(done: int, total: int, width: int) -> str:
    """Return `[####    ]`."""
    filled = width if total <= 0 else min(width * done // total, width)
    return f"[{'#' * filled}{' ' * (width - filled)}]"


def summary(done: int, total: int, seconds: float) -> str:
    """Return the line for all layers: bar, bytes, rate, time left."""
    rate = done / seconds if seconds > 0 else 0.0
    left = f"{(total - done) / rate:.0f} s left" if rate else "? s left"
    return f"total        {bar(done, total, 20)} {size_text(done)} of {size_text(total)}, {size_text(rate)}/s, {left}"


def size_text(size: float) -> str:
    """Return a size for people: `17.2 MiB`."""
    for unit in _UNITS:
        if size < 1024 or unit == _UNITS[-1]:
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
