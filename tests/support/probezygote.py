"""The real zygote with jobs that try things: `python -m tests.support.probezygote`, arguments as the zygote's.

probe    tries what a child may not do, says how each try ended, and stays until its socket ends
return   ends at once
raise    ends by an exception
crash    ends by a signal
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any

from snapshotter import messages
from snapshotter.fuse import zygote

_CLONE_NEWUSER = 0x10000000
_libc = ctypes.CDLL(None, use_errno=True)


def _connect() -> object:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.settimeout(1)
        sock.connect(("127.0.0.1", 80))
        return sock.getpeername()


def _call(number: int) -> int:
    if number != 0:
        raise OSError(ctypes.get_errno(), "refused")
    return 0


TRIES: dict[str, Callable[[], object]] = {
    "open /etc/passwd": lambda: os.open("/etc/passwd", os.O_RDONLY),
    "open /proc/self/status": lambda: os.open("/proc/self/status", os.O_RDONLY),
    "make a file": lambda: os.open("/file", os.O_CREAT | os.O_WRONLY),
    "list the root": lambda: os.listdir("/"),
    "leave the root": lambda: os.listdir("/../../.."),
    "connect": _connect,
    "become root": lambda: os.setuid(0),
    "become root's group": lambda: os.setgid(0),
    "signal root's processes": lambda: os.kill(os.getppid(), 0),
    "make a user namespace": lambda: _call(_libc.unshare(_CLONE_NEWUSER)),
    "make a device": lambda: os.mknod("/null", 0o20666, os.makedev(1, 3)),
    "mount": lambda: _call(_libc.mount(b"none", b"/", b"tmpfs", 0, None)),
    "chroot": lambda: os.chroot("/"),
    "be dumped": lambda: _call(1 if _libc.prctl(3) == 0 else 0),  # PR_GET_DUMPABLE
}


def probe(arguments: Mapping[str, Any], fds: Mapping[str, int]) -> None:
    """Try everything, answer {name of the try: "allowed …" or the error's class}, and wait."""
    answer = socket.socket(fileno=fds["answer"])
    report = {"arguments": dict(arguments), "names": list(fds), "environment": dict(os.environ)}
    for name, attempt in TRIES.items():
        try:
            report[name] = f"allowed {attempt()}"
        except OSError as error:
            report[name] = type(error).__name__
    messages.send(answer, report)
    answer.recv(1)


def _crash(arguments: Mapping[str, Any], fds: Mapping[str, int]) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _raise(arguments: Mapping[str, Any], fds: Mapping[str, int]) -> None:
    raise RuntimeError("on purpose")


def _return(arguments: Mapping[str, Any], fds: Mapping[str, int]) -> None:
    """Do nothing."""


if __name__ == "__main__":
    zygote.JOBS.update({"probe": probe, "return": _return, "raise": _raise, "crash": _crash})
    zygote.main(sys.argv)
