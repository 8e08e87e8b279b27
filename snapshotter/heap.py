"""The heap, the C library's and Python's: what processes with many threads and large values ask of it.

Owns how many blocks at the moment want no garbage collection. `use_one_heap` is for the start of a process;
`trim_heap` is slow and belongs into a thread; `without_collector` is for any thread.
"""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_M_ARENA_MAX = -8  # of glibc's malloc.h


def use_one_heap() -> None:
    """Let all threads of the process allocate from one heap: glibc can trim no other. For the start of a process."""
    choose = getattr(ctypes.CDLL(None), "mallopt", None)
    if choose is not None:
        choose(_M_ARENA_MAX, 1)


def trim_heap() -> None:
    """Let the C library give back what it keeps for later; nothing happens where it has no such call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


_lock = threading.Lock()
_blocks = 0


@contextmanager
def without_collector() -> Iterator[None]:
    """Let no thread collect garbage while the block makes many small values that all stay.

    Each collection would look at all of them again: a third of the time that it takes to parse a large zTOC. Not for
    blocks that wait, or that may last longer than a second or so.
    """
    global _blocks  # noqa: PLW0603 - there is one collector
    with _lock:
        _blocks += 1
        if _blocks == 1:
            gc.disable()
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if not _blocks:
                gc.enable()
