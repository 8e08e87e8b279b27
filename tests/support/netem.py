"""A link with delay, rate and loss between two interfaces, for kernels that cannot shape one themselves.

Runs as a program in the network namespace that holds both interfaces: `netem.py IF_A IF_B SETTINGS`. SETTINGS is
a file with the JSON of `Link`; it is read again whenever it changes. Frames come with their virtio header, so that
large segments pass whole, and leave by the other interface when their time has come.

Concurrency: one thread, one loop. It ends when its input is closed, so it never outlives who started it.
"""

from __future__ import annotations

import json
import os
import random
import select
import socket
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path

_PACKET_LEVEL = 263
_PACKET_VNET_HDR = 15
_PACKET_IGNORE_OUTGOING = 23
_RECEIVE_BUFFER_FORCE = 33
_ALL_PROTOCOLS = 3
_BUFFER_BYTES = 32 << 20
_FRAME_BYTES = 70_000
_BATCH = 64
_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Link:
    """What the link does to each frame: seconds one way, bytes per second (0: no limit), part that is lost.

    `queue` is how many bytes may wait for the rate; more are dropped, as a router does. A cut link loses all.
    """

    delay: float = 0.0
    rate: float = 0.0
    loss: float = 0.0
    queue: int = 8 << 20
    cut: bool = False

    def to_json(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self))


class Direction:
    """One way through the link: when each frame leaves."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[float, bytes]] = deque()
        self._free_at = 0.0

    def accept(self, frame: bytes, now: float, link: Link) -> bool:
        """Queue `frame`, or lose it and return False."""
        if link.cut or (link.loss and random.random() < link.loss):
            return False
        leaves = now
        if link.rate:
            leaves = max(now, self._free_at)
            if (leaves - now) * link.rate > link.queue:
                return False
            leaves += len(frame) / link.rate
            self._free_at = leaves
        self.waiting.append((leaves + link.delay, frame))
        return True

    def send_due(self, now: float, out: socket.socket) -> None:
        """Send what is due; a frame that the interface does not take is lost."""
        while self.waiting and self.waiting[0][0] <= now:
            _, frame = self.waiting.popleft()
            try:
                out.send(frame)
            except OSError:
                continue


def _open(interface: str) -> socket.socket:
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    port.setsockopt(_PACKET_LEVEL, _PACKET_VNET_HDR, 1)
    port.setsockopt(_PACKET_LEVEL, _PACKET_IGNORE_OUTGOING, 1)
    port.setsockopt(socket.SOL_SOCKET, _RECEIVE_BUFFER_FORCE, _BUFFER_BYTES)
    port.bind((interface, _ALL_PROTOCOLS))
    port.setblocking(False)
    return port


class _Settings:
    """The link's settings, read again when the file is another one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = -1
        self.link = Link()

    def refresh(self) -> None:
        changed = self._path.stat().st_mtime_ns
        if changed != self._seen:
            self.link = Link(**json.loads(self._path.read_text()))
            self._seen = changed


def bridge(first: str, second: str, path: Path) -> None:
    """Carry frames between the interfaces until standard input ends; say "+" once they cannot be lost."""
    ports = [_open(first), _open(second)]
    os.write(sys.stdout.fileno(), b"+")
    directions = [Direction(), Direction()]
    settings = _Settings(path)
    next_look = 0.0
    while True:
        now = time.monotonic()
        if now >= next_look:
            settings.refresh()
            next_look = now + _POLL_SECONDS
        due = [way.waiting[0][0] - now for way in directions if way.waiting]
        readable, _, _ = select.select([*ports, sys.stdin], [], [], max(0.0, min([_POLL_SECONDS, *due])))
        if sys.stdin in readable and not os.read(sys.stdin.fileno(), 1):
            return
        for port, way in zip(ports, directions, strict=True):
            if port in readable:
                _receive(port, way, settings.link)
        now = time.monotonic()
        for way, out in zip(directions, reversed(ports), strict=True):
            way.send_due(now, out)


def _receive(port: socket.socket, way: Direction, link: Link) -> None:
    for _ in range(_BATCH):
        try:
            frame = port.recv(_FRAME_BYTES)
        except BlockingIOError:
            return
        way.accept(frame, time.monotonic(), link)


if __name__ == "__main__":
    bridge(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
