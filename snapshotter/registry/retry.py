"""When to try again, and how long one request may take. Pure values; the caller does the waiting."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from snapshotter.errors import RegistryError, RegistryUnavailable


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Limits of one request, in seconds. None of them covers the waits between two attempts."""

    connect: float = 3.0
    """Name lookup, TCP and TLS together."""
    read: float = 10.0
    """The longest silence: until the reply's header comes, between two pieces of a body, or of an upload."""
    total: float = 300.0
    """One attempt from its first byte to its last."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential backoff with jitter. `attempts` counts the first one too."""

    attempts: int = 9
    first_wait: float = 0.03
    """Doubles with each attempt: nine attempts wait 7.7 s in all, as the reference does."""
    max_wait: float = 30.0
    """Cap of one wait, also of one that the server asks for: a reader may be blocked meanwhile."""
    jitter: float = 0.125
    """Up to this fraction is added to each wait, so that many hosts do not return in step."""
    random: Callable[[], float] = random.random
    """Source of numbers in [0, 1); tests pass their own."""

    def delay(self, attempt: int, error: RegistryError) -> float | None:
        """Return the seconds to wait after attempt number `attempt` (from 1) failed, or None to give up."""
        if not error.temporary or attempt >= self.attempts:
            return None
        # 2.0 ** 1023 is the largest power a float holds; long before that the cap decides.
        wait = min(self.first_wait * 2.0 ** min(attempt - 1, 1000), self.max_wait)
        asked = error.retry_after if isinstance(error, RegistryUnavailable) else None
        if asked is not None:
            wait = max(wait, min(asked, self.max_wait))
        return wait * (1 + self.jitter * self.random())


DEFAULT_TIMEOUTS: Final = Timeouts()
DEFAULT_RETRY: Final = RetryPolicy()
