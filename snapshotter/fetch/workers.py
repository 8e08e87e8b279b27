"""Threads for what may not happen on the main loop: requests, hashing, inflating, writing.

A pool has a fixed number of threads and a queue by priority. A task's result (or the exception it raised)
comes back as a call on the main loop, never in the thread. Threads start when first needed and stay: an
idle one costs a few KiB and no CPU. They are daemons: the process exits without asking them.

trio's own threads are not used because they know no priorities, and because here a task is never cancelled:
the process ends, or the task does.

Concurrency: `submit` from any thread; everything else belongs to the threads of the pool.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import count
from queue import PriorityQueue
from typing import Any, TypeAlias, TypeVar

import trio

T = TypeVar("T")
Done: TypeAlias = Callable[[T | Exception], None]
"""Receives a task's result on the main loop, or the exception that it raised."""

_Entry: TypeAlias = tuple[int, int, Callable[[], Any], Callable[[Any], None]]


class WorkerPool:
    """`size` threads that work off what is submitted."""

    def __init__(self, name: str, size: int, token: trio.lowlevel.TrioToken) -> None:
        self.size = size
        self._name = name
        self._token = token
        self._entries: PriorityQueue[_Entry] = PriorityQueue()
        self._order = count()
        self._lock = threading.Lock()
        self._threads = 0
        self._unfinished = 0

    def submit(self, priority: int, task: Callable[[], T], done: Done[T]) -> None:
        """Run `task` in a thread, smaller `priority` first, then `done` with its outcome on the main loop."""
        with self._lock:
            self._unfinished += 1
            start = self._unfinished > self._threads < self.size
            self._threads += start
        self._entries.put((priority, next(self._order), task, done))
        if start:
            threading.Thread(target=self._run, name=self._name, daemon=True).start()

    def _run(self) -> None:
        while True:
            _, _, task, done = self._entries.get()
            outcome: Any
            try:
                outcome = task()
            except Exception as error:  # noqa: BLE001  the main loop decides what each kind means
                outcome = error
            with self._lock:
                self._unfinished -= 1
            try:
                self._token.run_sync_soon(done, outcome)
            except trio.RunFinishedError:
                return
            del task, done, outcome  # they may hold a large buffer until the next task comes
