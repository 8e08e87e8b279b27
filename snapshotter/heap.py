"""The C library's heap: what processes with many threads and large buffers ask of it.

Stateless. `use_one_heap` is for the start of a process; `trim_heap` is slow and belongs into a thread.
"""

from __future__ import annotations

import ctypes

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
