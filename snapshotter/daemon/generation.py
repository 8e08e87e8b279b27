"""One generation of processes at a time: daemon, zygote, layer servers and fetcher live and end together.

Two readers on one FUSE descriptor lose requests, and two fetchers on one file lose bytes; so a new daemon must not
start anything before the last process of the old one is gone. All of them inherit one open file with an
flock on it: the lock is free exactly when the last of them has ended, however it ended.

Processes end on the end of their sockets. One that cannot (stuck in a system call) is found by the file that it
has open, and killed.

A daemon that is stopped ends last. With cgroup v1 a service manager may not be told when a service's group becomes
empty (in a container it never is), and waits for its whole stop timeout over a process that outlived the main one by
a millisecond, while readers wait for the next daemon.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from snapshotter.errors import ProcessFailed

_log = logging.getLogger(__name__)

_PATIENCE_S = 1.0
"""How long processes of the former generation may take to end by themselves; they need milliseconds."""

_LAST_WAIT_S = 10.0

_END_PATIENCE_S = 5.0
"""The same for a daemon that is stopped: with what the last calls are given, less than the unit's TimeoutStopSec."""

_PR_SET_CHILD_SUBREAPER = 36


def begin(path: Path) -> int:
    """Wait for the former generation to end; return the descriptor that this one's processes inherit.

    Raises ProcessFailed when a process of the former one cannot be killed.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    started = time.monotonic()
    killed = False
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        waited = time.monotonic() - started
        if waited > _PATIENCE_S and not killed:
            killed = True
            _kill_holders(fd)
        if waited > _LAST_WAIT_S:
            os.close(fd)
            raise ProcessFailed(f"processes of a former daemon do not end; they have {path} open")
        time.sleep(0.005)


def become_the_last() -> None:
    """From now on, children whose parent ends are ours. Before the zygote ends: layer servers are its children."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end(fd: int) -> None:
    """Wait for all that is left of this generation; `fd` is what `begin` returned, and closed. For the end only.

    A child that does not end is left to the next generation, or to the service manager. Takes every child's exit
    status: no `Popen` may be waited for after this.
    """
    os.close(fd)
    deadline = time.monotonic() + _END_PATIENCE_S
    with suppress(ChildProcessError):
        while time.monotonic() < deadline:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            if not pid:
                time.sleep(0.002)


def _kill_holders(fd: int) -> None:
    """Kill every process but this one that has the file behind `fd` open."""
    path, inode = os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd).st_ino
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid() and _has_open(entry, path, inode):
            _log.warning("a process of the former daemon is killed", extra={"pid": int(entry)})
            with suppress(ProcessLookupError):
                os.kill(int(entry), signal.SIGKILL)


def _has_open(pid: str, path: str, inode: int) -> bool:
    """Look for the file by path and inode in /proc: following the links there could touch a lazy mount."""
    with suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError), open(f"/proc/{pid}/fdinfo/{fd}", encoding="ascii") as lines:
                if f"ino:\t{inode}\n" in lines.read() and os.readlink(f"/proc/{pid}/fd/{fd}") == path:
                    return True
    return False
