"""What a daemon does before it imports the rest of itself: it takes the root, sees the former generation end, and
starts a zygote, which then imports what it needs beside the daemon. Whoever reads from a layer waits for both.

The caller owns what `begin` gives; all of it ends with `cleanup`.

Concurrency: one thread, before there is a loop. Imports nothing that takes long: no trio, no gRPC.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from snapshotter.daemon import generation
from snapshotter.fuse.spawning import Zygote, spawn
from snapshotter.snapshot.lock import RootLock

HOLDER_SOCKET = "holder.sock"
"""In the root."""

EMPTY_ROOT = "empty"
"""In the root: what processes that handle foreign bytes have as theirs."""


class Beginning(NamedTuple):
    """What a generation of processes starts with."""

    generation: int
    """The descriptor that each of its processes inherits (daemon/generation.py)."""
    zygote: Zygote | None
    """None when none could be started; the forker says why when it tries again."""


def begin(root: Path, log_level: str, cleanup: ExitStack) -> Beginning:
    """Begin a generation on `root`. Raises ConfigError for a root that is not ours to use, ProcessFailed, OSError."""
    cleanup.enter_context(RootLock(root))
    root.chmod(0o700)
    lock = generation.begin(root / "generation")
    cleanup.callback(generation.end, lock)
    try:
        zygote = spawn(str(root / EMPTY_ROOT), [lock], log_level)
    except OSError:
        return Beginning(lock, None)
    cleanup.callback(zygote.end)
    return Beginning(lock, zygote)
