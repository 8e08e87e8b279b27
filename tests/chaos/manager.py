"""A stand-in for systemd and the holder's unit: it starts the holder again, and keeps its descriptors meanwhile.

What the unit says is done here: `Restart=always`, `RestartSec=100ms`, and the store of FDSTORE=1, which gives
descriptors back to the next holder (LISTEN_FDS). As systemd does, it drops a stored descriptor that reports an error,
which a FUSE connection does when it has ended, and takes none twice.

Concurrency: a thread of its own; `kill` and `pid` may be called from another.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Self

from tests.support.process import _TAG

_RESTART_S = 0.1
_MOST_FDS = 64
_SYS_KCMP = {"x86_64": 312, "aarch64": 272}[platform.machine()]

_EXEC = (
    "import os, sys\n"
    "fds = [int(fd) for fd in sys.argv[2].split(',') if fd]\n"
    # Out of the way first: a target number may be in use as a source.
    "high = [os.dup2(fd, 1000 + at) for at, fd in enumerate(fds)]\n"
    "for at, fd in enumerate(high): os.dup2(fd, 3 + at)\n"
    "for fd in high: os.close(fd)\n"
    "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)), LISTEN_FDNAMES=sys.argv[3])\n"
    "os.closerange(3 + len(fds), 1000)\n"
    "os.execv(sys.executable, [sys.executable, '-m', 'snapshotter.fuse.holder', sys.argv[1]])\n"
)


class HolderUnit:
    """The holder as a unit; a context manager."""

    def __init__(self, socket_path: Path, notify: Path, *, tag: str) -> None:
        self._path = socket_path
        self._notify = notify
        self._tag = tag
        self._store: dict[str, list[int]] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._ending = threading.Event()
        self.restarts = -1
        self.forgotten = 0
        """Descriptors that the holder had dropped."""
        self._ready = threading.Event()

    @property
    def pid(self) -> int:
        """The holder's process."""
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> Self:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self._notify))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._ready.wait(60), "the holder did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._socket.close()
        for fds in self._store.values():
            for fd in fds:
                os.close(fd)

    def _run(self) -> None:
        while not self._ending.is_set():
            self._start()
            assert self._process is not None
            while self._process.poll() is None and not self._ending.is_set():
                self._listen(0.02)
            while self._listen(0):  # what it still said
                pass
            if not self._ending.is_set():
                time.sleep(_RESTART_S)

    def _start(self) -> None:
        self._drop_dead()
        fds = [(name, fd) for name, stored in self._store.items() for fd in stored]
        command = [sys.executable, "-c", _EXEC, str(self._path), ",".join(str(fd) for _, fd in fds)]
        self._process = subprocess.Popen(
            [*command, ":".join(name for name, _ in fds)],
            pass_fds=[fd for _, fd in fds],
            env={**os.environ, "NOTIFY_SOCKET": str(self._notify), _TAG: self._tag},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.restarts += 1

    def _listen(self, timeout: float) -> bool:
        """Take one message, if one comes in time."""
        readable, _, _ = select.select([self._socket], [], [], timeout)
        if not readable:
            return False
        data, fds, _, _ = socket.recv_fds(self._socket, 4096, _MOST_FDS)
        words = dict(line.partition("=")[::2] for line in data.decode().splitlines())
        name = words.get("FDNAME", "stored")
        if "FDSTORE" in words:
            self._store[name] = _stored(fds, self._store.get(name, []))
        elif "FDSTOREREMOVE" in words:
            for fd in self._store.pop(name, []):
                self.forgotten += 1
                os.close(fd)
        elif "READY" in words:
            self._ready.set()
        return True

    def _drop_dead(self) -> None:
        for name, fds in list(self._store.items()):
            poll = select.poll()
            for fd in fds:
                poll.register(fd, 0)
            for fd, _ in poll.poll(0):
                fds.remove(fd)
                os.close(fd)
            if not fds:
                del self._store[name]

    def stored(self) -> dict[str, int]:
        """Return how many descriptors are stored under each name."""
        return {name: len(fds) for name, fds in dict(self._store).items()}

    def kill(self) -> None:
        """Kill the holder."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


def _stored(new: list[int], old: list[int]) -> list[int]:
    """Return the store with what is new, the newest first as in systemd's; what is there already is not taken twice."""
    kept = list(old)
    for fd in new:
        if any(_is_same(fd, each) for each in old):
            os.close(fd)
        else:
            kept.insert(0, fd)
    return kept


def _is_same(one: int, other: int) -> bool:
    """Return whether two descriptors are of one open file, as systemd does: kcmp(2)."""
    return ctypes.CDLL(None).syscall(_SYS_KCMP, os.getpid(), os.getpid(), 0, one, other) == 0
