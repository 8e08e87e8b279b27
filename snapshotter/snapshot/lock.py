"""One daemon per root: an flock that is taken before anything else is touched.

Without it two daemons could write to one database, and the second would silently take over the first
one's socket path.

The lock belongs to the open file, which is closed on exec: children that were started as programs do not
keep it, and it ends with the daemon however that dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import Self

from snapshotter.errors import ConfigError


class RootLock:
    """The lock on `root`, held from construction to `close`; also a context manager.

    Makes the directory where it does not exist. Raises ConfigError when another process has the lock, or
    when the directory cannot be used.
    """

    def __init__(self, root: Path) -> None:
        path = root / "lock"
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ConfigError(f"root directory {root} cannot be used: {error.strerror}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(self._fd)
            os.close(self._fd)
            raise ConfigError(
                f"root directory {root} is in use by another snapshotter{holder}: stop that one, "
                "or give each its own root"
            ) from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        """Release the lock. May be called again."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def _holder(fd: int) -> str:
    """Return who wrote the file last, as part of a sentence; nothing when it does not say."""
    with contextlib.suppress(ValueError):
        return f" (pid {int(os.pread(fd, 20, 0))})"
    return ""
