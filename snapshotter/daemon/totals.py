"""Sums of counters over mounts that come and go, which never go backwards.

Concurrency: `retire` and `sum` may be called from different threads.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from snapshotter.daemon.metrics import SERVER_GAUGES


class Totals:
    """Counters of mounts: those that are, plus those that were.

    Concurrency: `retire` and `sum` may be called from different threads. Between the end of a mount and its `retire`
    its counts are nowhere; what was told once is therefore never taken back.
    """

    def __init__(self, current: Callable[[], Iterator[Mapping[str, int]]]) -> None:
        self._current = current
        self._past: Counter[str] = Counter()
        self._told: dict[str, int] = {}
        self._lock = threading.Lock()

    def retire(self, counters: Mapping[str, int]) -> None:
        """Keep the counts of a mount that has ended."""
        with self._lock:
            self._past.update({name: n for name, n in counters.items() if name not in SERVER_GAUGES})

    def sum(self) -> dict[str, int]:
        """Return the sums by name."""
        with self._lock:
            total = Counter(self._past)
            for counters in self._current():
                total.update(counters)
            counted = {name: n for name, n in total.items() if name not in SERVER_GAUGES}
            self._told = {name: max(n, self._told.get(name, 0)) for name, n in counted.items()} | {
                name: n for name, n in self._told.items() if name not in counted
            }
            return dict(total) | self._told
