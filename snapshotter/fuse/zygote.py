"""The zygote: a preloaded interpreter in an empty world that forks every process which handles foreign bytes.

A layer server forked from here answers its first request after some 10 ms instead of 120, and shares the
pages of the interpreter and of every module with all others. The zygote owns nothing but its socket to the
daemon. Before the first fork it has left the network (an empty network namespace) and the file system (an
empty root); a child then changes to its own uid, which drops every capability, and may not gain one again.

Two kinds of children ("jobs"): `serve`, a layer server (snapshotter/fuse/server.py), and `compile`, which
turns a zTOC into a tree (snapshotter/layer/compile.py) under limits on memory and time, so that a hostile
zTOC costs nothing but its own child.

Message: {"id": n, "job": J, "uid": U, "names": [names of the descriptors], "arguments": {…}} + descriptors
Answer:  {"id": n, "pid": P} + [pidfd], or {"id": n, "error": text}

Never imports grpc (which does not survive a fork). Everything a child needs is imported before the root is
empty; a test forks each job to prove it.

Concurrency: one thread, one message at a time.
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any

from snapshotter import logs, messages
from snapshotter.fuse import compiling, server
from snapshotter.heap import settle

_CLONE_NEWNET = 0x40000000
_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None, use_errno=True)
_log = logging.getLogger(__name__)

Job = Callable[[Mapping[str, Any], Mapping[str, int]], None]
"""A child's main function: (arguments, descriptors by name); the child ends when it returns."""

JOBS: dict[str, Job] = {"serve": server.serve, "compile": compiling.compile_job}


def leave_the_world(empty_root: str) -> None:
    """Move into an empty network namespace and an empty root. Raises OSError."""
    if _libc.unshare(_CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"unshare(CLONE_NEWNET): {os.strerror(number)}")
    os.chroot(empty_root)
    os.chdir("/")


def drop_privileges(uid: int) -> None:
    """Become `uid` with no group, no capability and no way back. Raises OSError."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    for option, value in ((_PR_SET_NO_NEW_PRIVS, 1), (_PR_SET_DUMPABLE, 0)):
        if _libc.prctl(option, value, 0, 0, 0) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"prctl({option}): {os.strerror(number)}")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(argv: list[str]) -> None:
    """Run the zygote: `zygote SOCKET_FD EMPTY_ROOT LOG_LEVEL`."""
    control = socket.socket(fileno=int(argv[1]))
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(ignored, signal.SIG_IGN)
    logs.setup(level=argv[3])
    server.preload()
    settle()  # which needs /proc
    leave_the_world(argv[2])
    while (received := messages.receive(control)) is not None:
        message, fds = received
        try:
            _fork(control, message, fds)
        except OSError as error:
            messages.send(control, {"id": message["id"], "error": str(error)})
        finally:
            for fd in fds:
                os.close(fd)


def _fork(control: socket.socket, message: messages.Message, fds: list[int]) -> None:
    """Fork one child. It begins when its pidfd is on its way to the daemon: one that had ended before could not be
    opened any more, and nobody sees what it does before the daemon can know of it.
    """
    job = JOBS[message["job"]]
    gate, opener = os.pipe()
    try:
        pid = os.fork()
        if pid == 0:
            os.close(opener)
            os.read(gate, 1)
            os.close(gate)
            _run_child(control, job, message, fds)
        pidfd = os.pidfd_open(pid)
        try:
            messages.send(control, {"id": message["id"], "pid": pid}, [pidfd])
        finally:
            os.close(pidfd)
    finally:
        os.close(gate)
        os.close(opener)


def _run_child(control: socket.socket, job: Job, message: messages.Message, fds: list[int]) -> None:
    """Be the child: never returns."""
    status = 1
    try:
        control.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        drop_privileges(message["uid"])
        job(message["arguments"], dict(zip(message["names"], fds, strict=True)))
        status = 0
    except BaseException:  # noqa: BLE001 - the child must end here, whatever happened
        _log.exception("child failed", extra={"job": message["job"]})
    finally:
        os._exit(status)


if __name__ == "__main__":
    main(sys.argv)
