"""Starting a zygote as a program of its own. By itself, because that is the first thing a daemon does: a zygote takes
as long to import what it needs as the daemon does, and readers wait for both.

Whoever starts a zygote owns it: its process and its socket, at whose end it ends.

Concurrency: plain functions; none waits for what the zygote does.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

from snapshotter import messages
from snapshotter.environment import child_environment


class Zygote(NamedTuple):
    """A running zygote and the near end of its socket, which does not block (messages: see fuse/zygote.py)."""

    process: subprocess.Popen[bytes]
    socket: socket.socket

    def end(self) -> None:
        """End it and wait for that; may be called again. It has no time for last words: its root is empty by now."""
        self.process.kill()
        self.socket.close()
        self.process.wait()


def spawn(empty_root: str, inherited_fds: Sequence[int], log_level: str) -> Zygote:
    """Start a zygote that will live in `empty_root`, which is made where it is not there. Raises OSError."""
    os.makedirs(empty_root, mode=0o555, exist_ok=True)
    near, far = messages.pair()
    command = [sys.executable, "-m", "snapshotter.fuse.zygote", str(far.fileno()), empty_root, log_level]
    with far:
        try:
            process = subprocess.Popen(
                command,
                pass_fds=[far.fileno(), *inherited_fds],
                stdin=subprocess.DEVNULL,
                env=child_environment(),
            )
        except OSError:
            near.close()
            raise
    near.setblocking(False)
    return Zygote(process, near)
