"""The holder: a process that keeps a copy of every descriptor that must survive the daemon.

It owns a table name -> descriptor and nothing else. Names are opaque to it; the daemon writes into them
what it needs to know again. When the holder runs under systemd, every descriptor is also in systemd's
store (FDSTORE=1), and comes back from there (LISTEN_FDS) should the holder itself die.

The code is as small as it can be, and uses only the standard library, because it is the one part that a
running container cannot lose: it hardly ever changes, and an upgrade of the daemon does not restart it.
It never touches a path below a mount.

Messages (see snapshotter/messages.py), one connection at a time is usual but not required:
    {"op": "put", "name": N} + fd   -> {"ok": true}     replaces what was there
    {"op": "drop", "name": N}       -> {"ok": true}     no error if absent
    {"op": "list"}                  -> {"name": N} + fd, …, {"ok": true}

Concurrency: one thread, one poll loop; a message is handled whole before the next.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import sys

from snapshotter import messages
from snapshotter.sdnotify import Notifier, is_name, listen_fds

_OTHER_TIMEOUT_S = 5.0


class Table:
    """The descriptors by name, mirrored in systemd's store when there is one."""

    def __init__(self, notifier: Notifier) -> None:
        self._fds: dict[str, int] = {}
        self._notifier = notifier

    def adopt(self, stored: list[tuple[int, str]]) -> None:
        """Take over what systemd kept for a former holder; of several of a name the first, which is the newest."""
        for fd, name in stored:
            if self._fds.setdefault(name, fd) != fd:
                os.close(fd)

    def put(self, name: str, fd: int) -> None:
        """Keep `fd` under `name`; a former one of that name is closed.

        systemd keeps the former one too, until the name is dropped: it could only be told to forget both, and a holder
        that dies between forgetting and storing would lose what a mount depends on. What it has already it does not
        take twice, and a descriptor whose FUSE connection has ended it drops by itself.
        """
        self._notifier.store(name, [fd])
        former = self._fds.get(name)
        self._fds[name] = fd
        if former is not None:
            os.close(former)

    def drop(self, name: str) -> None:
        """Forget `name`, if it is there."""
        fd = self._fds.pop(name, None)
        if fd is not None:
            self._notifier.forget(name)
            os.close(fd)

    def items(self) -> list[tuple[str, int]]:
        """Return (name, descriptor) pairs."""
        return list(self._fds.items())


def handle(table: Table, message: messages.Message, fds: list[int], peer: socket.socket) -> None:
    """Carry out one message and answer it. Raises OSError when the peer is gone, ValueError for nonsense."""
    name = str(message.get("name", ""))
    match message.get("op"):
        case "put" if len(fds) == 1 and is_name(name):
            table.put(name, fds[0])
        case "drop" if is_name(name) and not fds:
            table.drop(name)
        case "list" if not fds:
            for each, fd in table.items():
                messages.send(peer, {"name": each}, [fd])
        case other:
            for fd in fds:
                os.close(fd)
            raise ValueError(f"holder: unknown or incomplete message {other!r}")
    messages.send(peer, {"ok": True})


def serve(listener: socket.socket, table: Table) -> None:
    """Answer connections for ever."""
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    while True:
        for key, _events in selector.select():
            if key.fileobj is listener:
                peer, _address = listener.accept()
                selector.register(peer, selectors.EVENT_READ)
            elif isinstance(key.fileobj, socket.socket) and not _answer(table, key.fileobj):
                selector.unregister(key.fileobj)
                key.fileobj.close()


def _answer(table: Table, peer: socket.socket) -> bool:
    """Handle one message of `peer`; return whether the connection goes on."""
    try:
        received = messages.receive(peer)
        if received is None:
            return False
        handle(table, *received, peer)
    except (OSError, ValueError) as error:
        print(f'{{"level":"error","msg":"holder: bad message","error":{str(error)!r}}}', file=sys.stderr)
        return False
    return True


def listen(path: str) -> socket.socket:
    """Return the listening socket at `path`, mode 0600; a stale one is replaced."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    old = os.umask(0o177)
    try:
        listener.bind(path)
    finally:
        os.umask(old)
    listener.listen(16)
    return listener


def inherit(path: str) -> list[tuple[str, int]]:
    """Return what another holder at `path` keeps, and end it: of two, a daemon would only ever hear one."""
    found: list[tuple[str, int]] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        try:
            other.connect(path)
        except OSError:  # there is none
            return []
        other.settimeout(_OTHER_TIMEOUT_S)
        with contextlib.suppress(OSError, ValueError):
            messages.send(other, {"op": "list"})
            while (received := messages.receive(other)) is not None and not received[0].get("ok"):
                found.append((received[0]["name"], received[1][0]))
        peer = other.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    with contextlib.suppress(ProcessLookupError):
        os.kill(int.from_bytes(peer[:4], sys.byteorder), signal.SIGKILL)
    return found


def main(path: str) -> None:
    """Run the holder at the socket `path` until it is killed."""
    notifier = Notifier.from_environ()
    table = Table(notifier)
    table.adopt(listen_fds())
    for name, fd in inherit(path):
        table.put(name, fd)
    listener = listen(path)
    notifier.ready("keeping descriptors of lazy mounts")
    serve(listener, table)


if __name__ == "__main__":
    main(sys.argv[1])
