"""Reads of a FUSE descriptor in worker threads that come back even when nothing is there to read.

A descriptor of /dev/fuse must be blocking (its flags are shared by all copies), so a request that is withdrawn between
poll and read would keep a thread, and the layer's only reader with it, until the next request. A signal ends
such a read.

Concurrency: `run` may be called by any task; each call has a thread of its own out of few.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import trio

_THREADS = 8
"""At once; a call takes microseconds, or, when there was nothing to read, `_PATIENCE_S`."""

_PATIENCE_S = 0.25

_SIGNAL = signal.SIGURG
"""Nobody else uses it, and it is harmless where nobody expects it."""

_T = TypeVar("_T")


class Blocking:
    """Runs what may block in read(2); what is interrupted must use a read that says so (see Journal.read)."""

    def __init__(self) -> None:
        self._limiter = trio.CapacityLimiter(_THREADS)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Have the signal interrupt system calls, and do nothing else. In the main thread only."""
        former = signal.signal(_SIGNAL, lambda *_ignored: None)
        try:
            yield
        finally:
            signal.signal(_SIGNAL, former)

    async def run(self, work: Callable[[], _T]) -> _T:
        """Return what `work` returns, called in a thread. Raises what it raises: InterruptedError after a signal."""
        call = _Call()
        ended = trio.Event()
        trio.lowlevel.spawn_system_task(_interrupt_until, call, ended)
        try:
            return await trio.to_thread.run_sync(call.run, work, limiter=self._limiter)
        finally:
            ended.set()


class _Call:
    """One call, and the thread in which it is running."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None

    def run(self, work: Callable[[], _T]) -> _T:
        with self._lock:
            self._thread = threading.get_ident()
        try:
            return work()
        finally:
            with self._lock:
                self._thread = None

    def interrupt(self) -> None:
        """Interrupt the call; under the lock its thread cannot end meanwhile."""
        with self._lock:
            if self._thread is not None:
                signal.pthread_kill(self._thread, _SIGNAL)


async def _interrupt_until(call: _Call, ended: trio.Event) -> None:
    while not ended.is_set():
        with trio.move_on_after(_PATIENCE_S):
            await ended.wait()
        if not ended.is_set():
            call.interrupt()
