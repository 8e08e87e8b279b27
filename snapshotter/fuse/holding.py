"""The daemon's handle on the holder (snapshotter/fuse/holder.py): put descriptors there, get them back.

It connects to the holder's socket and, where nobody listens, starts a holder of its own: a detached child
that outlives the daemon (under systemd the holder has its own unit, and is there already). It owns the
connection and no descriptor.

Concurrency: blocking calls with a time limit, one at a time under a lock; call them from a worker thread.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time

from snapshotter import messages
from snapshotter.errors import ProcessFailed

_CALL_TIMEOUT_S = 5.0
"""For one answer; the holder needs microseconds, so a longer silence means it is stopped or stuck."""

_START_TIMEOUT_S = 10.0
_RETRY_S = 0.01

_UNIT_PATIENCE_S = 5.0
"""How long a daemon that runs under a service manager waits for the holder's own unit before it starts a holder
itself. The unit restarts after 100 ms, but with the descriptors from its store, which a holder of ours would not have."""


class HolderClient:
    """Puts, drops and lists descriptors; connects again when the holder was restarted."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self.pid = 0
        """Of the holder at the other end of the connection."""

    def connect(self) -> None:
        """Connect, starting a holder if there is none. Raises ProcessFailed."""
        with self._lock:
            self._connect()

    def is_running(self) -> bool:
        """Tell whether there is a holder; none is started."""
        sock = _try_connect(self._path)
        if sock is not None:
            sock.close()
        return sock is not None

    def put(self, name: str, fd: int) -> None:
        """Have a copy of `fd` kept under `name`. Raises ProcessFailed."""
        self._call({"op": "put", "name": name}, [fd])

    def drop(self, name: str) -> None:
        """Have `name` forgotten. Raises ProcessFailed."""
        self._call({"op": "drop", "name": name}, [])

    def kept(self) -> dict[str, int]:
        """Return copies of all descriptors by name; the caller owns them. Raises ProcessFailed."""
        return self._call({"op": "list"}, [])

    def close(self) -> None:
        """Close the connection; the holder lives on."""
        with self._lock:
            self._disconnect()

    def _call(self, message: messages.Message, fds: list[int]) -> dict[str, int]:
        """Ask the holder, again when it has died since the last call: every call can be repeated.

        One that is just being killed may take a connection yet and reset it; so one repetition is not enough.
        """
        deadline = time.monotonic() + _START_TIMEOUT_S
        with self._lock:
            try:
                while True:
                    try:
                        return self._ask(message, fds)
                    except ConnectionError:
                        self._disconnect()
                        if time.monotonic() > deadline:
                            raise
                        time.sleep(_RETRY_S)
            except OSError as error:
                self._disconnect()
                raise ProcessFailed(f"the holder at {self._path} does not answer: {error}") from error

    def _ask(self, message: messages.Message, fds: list[int]) -> dict[str, int]:
        self._connect()
        assert self._socket is not None
        messages.send(self._socket, message, fds)
        return _collect(self._socket)

    def _connect(self) -> None:
        if self._socket is not None:
            return
        sock = self._wait_for_unit()
        deadline = time.monotonic() + _START_TIMEOUT_S
        if sock is None:
            _start_detached(self._path)
        while sock is None:
            if time.monotonic() > deadline:
                raise ProcessFailed(
                    f"the holder at {self._path} did not start within {_START_TIMEOUT_S:.0f} s"
                )
            time.sleep(_RETRY_S)
            sock = _try_connect(self._path)
        sock.settimeout(_CALL_TIMEOUT_S)
        peer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        self.pid = int.from_bytes(peer[:4], sys.byteorder)
        self._socket = sock

    def _wait_for_unit(self) -> socket.socket | None:
        """Return a connection to a holder that runs or is just being started by its unit, None if there is none."""
        patience = _UNIT_PATIENCE_S if os.environ.get("NOTIFY_SOCKET") else 0.0
        deadline = time.monotonic() + patience
        while (sock := _try_connect(self._path)) is None and time.monotonic() < deadline:
            time.sleep(_RETRY_S)
        return sock

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _collect(sock: socket.socket) -> dict[str, int]:
    found: dict[str, int] = {}
    while True:
        received = messages.receive(sock)
        if received is None:
            raise ConnectionResetError("connection closed")
        message, fds = received
        if message.get("ok"):
            return found
        found[message["name"]] = fds[0]


def _try_connect(path: str) -> socket.socket | None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.connect(path)
    except (FileNotFoundError, ConnectionError):  # there is none, or one that just ends
        sock.close()
        return None
    return sock


def _start_detached(path: str) -> None:
    """Start a holder that is nobody's child: a short-lived middle process hands it to init. Raises ProcessFailed."""
    code = (
        "import os, sys\n"
        "if os.fork(): os._exit(0)\n"
        "os.setsid(); os.chdir('/')\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'snapshotter.fuse.holder', sys.argv[1]])\n"
    )
    environ = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}
    command = [sys.executable, "-c", code, path]
    try:
        with open(os.devnull, "r+b") as null:
            subprocess.run(command, check=True, stdin=null, stdout=null, env=environ)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ProcessFailed(f"the holder at {path} cannot be started: {error}") from error
