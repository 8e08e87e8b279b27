"""Memory of a process: what those with many threads and large values ask of it, and what they give back at rest.

Owns how many blocks at the moment want no garbage collection. `use_one_heap` and `settle` are for the start of a
process; `trim_heap` and `give_back` are slow and belong into a thread; `without_collector` is for any thread.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import re
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


def settle() -> None:
    """Say that the start is over: what there is now stays, and the collector need not look at it again."""
    gc.collect()
    gc.freeze()
    give_back()


def give_back() -> None:
    """Give back what a process at rest does not need: garbage in cycles, free heap, and code that ran once."""
    gc.collect()
    trim_heap()
    _unmap_code()


def _unmap_code() -> None:
    """Let go of the pages of libraries' code and constants: what is used is mapped again, some microseconds each.

    A start runs through megabytes of code that is never needed again, and the kernel takes what is mapped last. Only
    mappings that nobody can write, and in which nothing is changed, can be left to the page cache so.
    """
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    if advise is None:
        return
    for start, end in _code():
        advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _code() -> list[tuple[int, int]]:
    """Return the addresses `[start, end)` of unchanged code and constants from files."""
    found = []
    here = None
    with open("/proc/self/smaps", encoding="ascii", errors="replace") as file:
        for line in file:
            if (mapping := _MAPPING.match(line)) is not None:
                code = mapping["mode"] in {"r-xp", "r--p"} and mapping["path"].startswith("/")
                here = (int(mapping["start"], 16), int(mapping["end"], 16)) if code else None
            elif here is not None and line.split() == ["Anonymous:", "0", "kB"]:
                found.append(here)
    return found


_MAPPING = re.compile(r"(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) (?P<mode>\S+) \S+ \S+ \S+\s*(?P<path>.*)")
"""The first line about a mapping in smaps(5)."""

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
