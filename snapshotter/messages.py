"""JSON messages with descriptors over SOCK_SEQPACKET sockets: how our processes talk to one another.

One packet is one message: a JSON object, at most MAX_MESSAGE bytes, and up to MAX_FDS descriptors
(SCM_RIGHTS). A packet boundary is a message boundary, so there is no framing and no partial state; an
empty packet is the end of the connection. Both ends are ours, so a packet that is not an object is a bug
and raises ValueError.

Concurrency: stateless functions; a packet is sent and received whole, so several threads may share a
socket.
"""

from __future__ import annotations

import array
import json
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

MAX_MESSAGE = 128 << 10
"""Bytes of one packet; below the default socket buffer (208 KiB), so that a send never fails for its size."""

MAX_FDS = 16
"""Descriptors in one packet; the largest message (one adoption) carries eight."""

Message = dict[str, Any]


def pair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a new connection."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(sock: socket.socket, message: Mapping[str, Any], fds: Sequence[int] = ()) -> None:
    """Send one message; the caller keeps its descriptors. Raises OSError (EPIPE, EAGAIN, …) as the socket does."""
    data = json.dumps(message, separators=(",", ":")).encode()
    if len(data) > MAX_MESSAGE:
        raise ValueError(f"message of {len(data)} bytes is over {MAX_MESSAGE}: {data[:80]!r}…")
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], rights)


def receive(sock: socket.socket) -> tuple[Message, list[int]] | None:
    """Return the next message and its descriptors (the caller owns them), or None at the end.

    Raises OSError as the socket does and ValueError for a packet that is not a message.
    """
    data, control, flags, _address = sock.recvmsg(
        MAX_MESSAGE, socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize), socket.MSG_CMSG_CLOEXEC
    )
    fds = array.array("i")
    for level, kind, payload in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    if not data:
        _close(fds)
        return None
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ValueError("message was truncated")
        message = json.loads(data)
        if not isinstance(message, dict):
            raise ValueError(f"message is not an object: {data[:80]!r}")  # noqa: TRY004 - the bytes are wrong
    except (ValueError, RecursionError) as error:
        _close(fds)
        raise ValueError(str(error)) from None
    return message, list(fds)


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
