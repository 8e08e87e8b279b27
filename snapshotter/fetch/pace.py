"""Caps on bytes per second: when the next transfer of each kind may start.

A cap is kept by waiting after a transfer, for as long as its bytes should have taken. So what was started until any
moment is never more than the cap allows until then, and one transfer; and a time without transfers earns nothing.

Pure: the caller has the clock. Concurrency: one thread.
"""

from __future__ import annotations


class Pace:
    """One cap for each of any number of names. A cap of 0 is none."""

    def __init__(self, bytes_per_s: int) -> None:
        self._rate = bytes_per_s
        self._free_at: dict[str, float] = {}

    def allows(self, name: str, now: float) -> bool:
        """Whether a transfer for `name` may start."""
        return now >= self._free_at.get(name, now)

    def spend(self, name: str, size: int, now: float) -> float | None:
        """Note the start of a transfer of `size` bytes; return when the next one may start, None for at once."""
        if not self._rate:
            return None
        for other in [other for other, free_at in self._free_at.items() if free_at <= now]:
            del self._free_at[other]
        self._free_at[name] = free_at = max(self._free_at.get(name, now), now) + size / self._rate
        return free_at
