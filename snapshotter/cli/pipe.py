"""A pipe of bytes between two threads: who reads a layer puts its pieces in, who uploads it takes them out.

It holds a few pieces, so that neither waits for the other's pauses, and no more, so that memory stays bounded.

Concurrency: one thread puts, one takes; any thread or task may fail it, which wakes both.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Final

from snapshotter.registry.sending import Piece

LIMIT: Final = 2
"""Pieces that wait in the pipe."""


class Pipe:
    """The pipe. An error that ends it is raised at both ends."""

    def __init__(self) -> None:
        self._pieces: deque[Piece] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._error: BaseException | None = None

    def put(self, piece: Piece) -> None:
        """Append a piece, which must not be empty, as soon as there is room. Raises the error of `fail`."""
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or len(self._pieces) < LIMIT)
            if self._error is not None:
                raise self._error
            self._pieces.append(piece)
            self._changed.notify_all()

    def end(self) -> None:
        """Say that this was all."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def take(self) -> Piece | None:
        """Return the next piece, None behind the last one. Raises the error of `fail`."""
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or self._ended or bool(self._pieces))
            if self._error is not None:
                raise self._error
            if not self._pieces:
                return None
            self._changed.notify_all()
            return self._pieces.popleft()

    def fail(self, error: BaseException) -> None:
        """Drop what is in the pipe and end it by `error`; the first one counts."""
        with self._changed:
            if self._error is None:
                self._error = error
            self._pieces.clear()
            self._changed.notify_all()
