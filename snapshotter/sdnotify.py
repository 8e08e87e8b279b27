"""What a service tells systemd, and the descriptors it gets from it: sd_notify(3) and sd_listen_fds(3).

A `Notifier` sends one datagram for each call and owns nothing but the address. Where there is no service
manager every call does nothing and says so by returning False; a service manager that does not listen is
logged and also False. Both are for the caller to ignore, except when descriptors were to be stored.

Concurrency: any thread. A call may block for as long as the manager's queue is full, at most `_TIMEOUT`.
Deliberately absent: watchdog timers (the caller knows when it is well) and any dependency.
"""

from __future__ import annotations

import array
import os
import socket
import time
from collections.abc import Mapping, Sequence

_FIRST_FD = 3
"""Descriptors handed over start after stdin, stdout and stderr."""

_FDS_PER_MESSAGE = 253
"""SCM_MAX_FD of Linux."""

_NAME_MAX = 255

_TIMEOUT = 5.0
"""Seconds; not measured. PID 1 answers in microseconds unless the host is beyond help."""


class Notifier:
    """Speaks to the service manager that started this process."""

    def __init__(self, address: str) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> Notifier:
        """Return a notifier for the manager named in the environment; without one, all calls do nothing."""
        return cls(environ.get("NOTIFY_SOCKET", ""))

    @property
    def is_active(self) -> bool:
        """Whether there is a manager to speak to."""
        return bool(self._address)

    def ready(self, status: str = "", *, main_pid: int | None = None) -> bool:
        """Say that start-up is finished; `main_pid` when another process than the first is the service."""
        return self._send(
            "READY=1",
            f"STATUS={_one_line(status)}" if status else "",
            f"MAINPID={main_pid}" if main_pid is not None else "",
        )

    def reloading(self) -> bool:
        """Say that the configuration is being read again; `ready` ends that."""
        return self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, status: str = "") -> bool:
        """Say that the service is going down on purpose."""
        return self._send("STOPPING=1", f"STATUS={_one_line(status)}" if status else "")

    def status(self, text: str) -> bool:
        """Show one line of text in `systemctl status`."""
        return self._send(f"STATUS={_one_line(text)}")

    def watchdog(self) -> bool:
        """Say that the service is alive; see `watchdog_interval`."""
        return self._send("WATCHDOG=1")

    def extend_timeout(self, seconds: float) -> bool:
        """Ask for `seconds` more before a start or stop counts as failed."""
        return self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1_000_000)}")

    def store(self, name: str, fds: Sequence[int]) -> bool:
        """Have the manager keep copies of `fds` under `name` until they are forgotten or die.

        Returns whether all were handed over. The manager silently keeps no more than the unit's
        FileDescriptorStoreMax=. Raises ValueError for a name that it would not take.
        """
        _check_name(name)
        parts = [fds[i : i + _FDS_PER_MESSAGE] for i in range(0, len(fds), _FDS_PER_MESSAGE)]
        return all(self._send("FDSTORE=1", f"FDNAME={name}", fds=part) for part in parts)

    def forget(self, name: str) -> bool:
        """Have the manager drop every descriptor stored under `name`. Raises ValueError as `store` does."""
        _check_name(name)
        return self._send("FDSTOREREMOVE=1", f"FDNAME={name}")

    def _send(self, *lines: str, fds: Sequence[int] = ()) -> bool:
        if not self._address:
            return False
        message = "\n".join(line for line in lines if line).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.settimeout(_TIMEOUT)
                sender.sendmsg([message], rights, 0, self._address)
        except OSError as error:
            _warn("service manager not reached", about=lines[0], reason=str(error))
            return False
        return True


def watchdog_interval(environ: Mapping[str, str] = os.environ) -> float | None:
    """Return how often (seconds) this process must call `Notifier.watchdog`, None when it need not.

    Half of what the unit allows, as systemd recommends.
    """
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    allowed = _number(environ.get("WATCHDOG_USEC", ""))
    return allowed / 2_000_000 if allowed else None


def listen_fds(environ: Mapping[str, str] = os.environ) -> list[tuple[int, str]]:
    """Return the descriptors that the manager handed to this process, with their names.

    Sockets to listen on and stored descriptors come alike; the name tells them apart ("unknown" when the
    manager gave none). They are closed on exec from here on. Ask once: whoever takes a descriptor owns it.
    """
    if environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = _number(environ.get("LISTEN_FDS", ""))
    names = environ["LISTEN_FDNAMES"].split(":") if environ.get("LISTEN_FDNAMES") else []
    found = []
    for i, fd in enumerate(range(_FIRST_FD, _FIRST_FD + count)):
        try:
            os.set_inheritable(fd, False)
        except OSError as error:  # a lie of the environment, or closed before we were asked
            _warn("descriptor of the service manager is not open", fd=fd, reason=str(error))
            break
        found.append((fd, names[i] if i < len(names) else "unknown"))
    return found


def _warn(message: str, **about: object) -> None:
    import logging  # noqa: PLC0415  1 MB, a seventh of the holder, which next to never has anything to say

    logging.getLogger(__name__).warning(message, extra=about)


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else 0


def _one_line(text: str) -> str:
    return " ".join(text.split())


def is_name(name: str) -> bool:
    """Return whether the manager would store descriptors under `name`."""
    return 0 < len(name) <= _NAME_MAX and ":" not in name and name.isascii() and name.isprintable()


def _check_name(name: str) -> None:
    if not is_name(name):
        raise ValueError(f"not a name for stored descriptors: {name!r}")
