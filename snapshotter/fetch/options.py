"""What the daemon tells the fetcher at its start: sizes, times and limits, each with its one default."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields

from snapshotter.errors import ConfigError

MIB = 1 << 20

_MAY_BE_ZERO = frozenset(
    {
        "workers",
        "source_renewals",
        "background_bytes_per_s",
        "background_bytes_per_s_per_image",
        "cache_max_bytes",
        "cache_min_free_bytes",
    }
)


WAIT, EIO = "wait", "eio"
"""A read waits for its budget, or fails at once."""


@dataclass(frozen=True, slots=True)
class Options:
    """Limits of one fetcher. Sizes are bytes, times seconds."""

    read_budget_s: float = 60.0
    """The longest that one read waits for a span; then it fails and the next one tries afresh."""
    on_demand_connections: int = 8
    """Requests for readers and read-ahead at once, over all layers."""
    background_connections: int = 4
    """The most background requests at once; how many there really are depends on what the link gives."""
    background_bytes_per_s: int = 0
    """Cap on what is fetched in the background; 0: what the link gives."""
    background_bytes_per_s_per_image: int = 0
    """The same for each image by itself."""
    range_max_bytes: int = 8 * MIB
    """The most that one range request asks for, unless a single span is larger."""
    memory_bytes: int = 64 * MIB
    """Compressed bytes that may be on their way or waiting for a worker."""
    span_max_bytes: int = 512 * MIB
    """A span larger than this, compressed or not, is refused: it has to be held in memory whole."""
    workers: int = 0
    """Threads that hash, inflate and write; 0 means one per CPU, but at most eight: each may hold a span."""
    span_tries: int = 3
    """How often a span is fetched when its bytes have a wrong digest."""
    source_renewals: int = 3
    """How often one flight asks for a new source when the old one is refused."""
    connect_timeout_s: float = 3.0
    read_timeout_s: float = 10.0
    unreachable: str = WAIT
    """What becomes of reads while no source of their layer can be reached: `wait` or `eio`."""
    range_timeout_s: float = 300.0
    """The longest that one request for a range may take."""
    background_quiet_s: float = 3.0
    """Readers count as active so long after a message or a transfer of theirs, and after a layer was opened: a program
    that starts computes for seconds between two spans that it needs (docs/performance.md has the sweep)."""
    background_pause_s: float = 30.0
    """How long a layer's background rests after a failure that a retry cannot help, or a full disk."""
    cache_max_bytes: int = 0
    """The most that the files of all layers may occupy on disk; 0: no cap."""
    cache_min_free_bytes: int = 0
    """Free space on the disk that is left to others; 0: none."""
    ca_file: str = ""
    """PEM file with certificates to trust instead of the system's; empty: the system's."""
    log_level: str = "INFO"
    boot_id: str = ""
    """Stands in for the kernel's boot id; empty: the kernel's."""

    def __post_init__(self) -> None:
        if self.unreachable not in {WAIT, EIO}:
            raise ConfigError(
                f"fetcher option unreachable is {self.unreachable!r}; it can be {WAIT} or {EIO}"
            )
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < (0 if field.name in _MAY_BE_ZERO else 1):
                raise ConfigError(f"fetcher option {field.name} is too small: {value}")
            if isinstance(value, float) and not value > 0:
                raise ConfigError(f"fetcher option {field.name} must be above 0, not {value}")

    @classmethod
    def from_json(cls, text: str) -> Options:
        """Return the options in a JSON object. Raises ConfigError: no object, an unknown key, a wrong type."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"fetcher options are not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError("fetcher options are not a JSON object")
        defaults = {field.name: field.default for field in fields(cls)}
        for key, value in values.items():
            if key not in defaults:
                raise ConfigError(f"unknown fetcher option {key!r}; there are {', '.join(sorted(defaults))}")
            if not _fits(value, defaults[key]):
                wanted = type(defaults[key]).__name__
                raise ConfigError(f"fetcher option {key} must be of type {wanted}, not {value!r}")
        return cls(**values)

    def worker_count(self) -> int:
        """Return how many worker threads there are to be."""
        return self.workers or min(len(os.sched_getaffinity(0)), 8)


def _fits(value: object, default: object) -> bool:
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(default)
