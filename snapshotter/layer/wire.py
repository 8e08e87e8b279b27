"""What a layer server and the fetcher say to each other: one message is one SOCK_SEQPACKET packet.

A server says `Want` when a reader is blocked and `Touch` when a span is first used; the fetcher answers
every `Want` with `Ready` for the spans that are inflated now, `Lent` for those that the disk could not take, and
`Failed` for those that could not be had. What a server says it cannot read (`Doubt`) is hashed first. A server that gets a new socket simply asks again: no message refers to an earlier one.

Concurrency: pure functions; bytes in, values out. It deliberately knows no socket and no layer: a socket
belongs to exactly one layer, so no message has to name it.
"""

from __future__ import annotations

import struct
from typing import NamedTuple, TypeAlias


class Want(NamedTuple):
    """Server to fetcher: a reader is blocked on the spans `[first, end)`; its file goes on to `ahead_end`."""

    first: int
    end: int
    ahead_end: int


class Touch(NamedTuple):
    """Server to fetcher: `span` was used for the first time (the learned order of a later start)."""

    span: int


class Doubt(NamedTuple):
    """Server to fetcher: `span` is said to be inflated, and what was read is short or wrong; a reader is blocked."""

    span: int


class Ready(NamedTuple):
    """Fetcher to server: the spans `[first, end)` are inflated; read them."""

    first: int
    end: int


class Lent(NamedTuple):
    """Fetcher to server: the bytes of `span` are in the file that comes along, because the disk has no room."""

    span: int


class Failed(NamedTuple):
    """Fetcher to server: `span` cannot be had now; its readers get `errno`, and the next read asks again."""

    span: int
    errno: int


Message: TypeAlias = Want | Touch | Doubt | Ready | Lent | Failed

_PACKET = struct.Struct("<4I")  # kind, then up to three numbers; the unused ones are 0
PACKET_SIZE = _PACKET.size
"""Every message has this size, so that a receive buffer is never too small."""

_MAX_ERRNO = 4095  # the kernel's own limit: anything above would not be read as an error


def encode(message: Message) -> bytes:
    """Return the packet of `message`. Raises ValueError when it breaks a rule that `decode` checks."""
    kind, numbers = _KIND_OF[type(message)], tuple(message)
    try:
        packet = _PACKET.pack(kind, *numbers, *(0,) * (3 - len(numbers)))
    except struct.error as error:
        raise ValueError(f"message does not fit its packet: {message}") from error
    _validate(message)
    return packet


def decode(data: bytes) -> Message:
    """Return the message in `data`. Raises ValueError: wrong length, kind, range or padding."""
    if len(data) != PACKET_SIZE:
        raise ValueError(f"message of {len(data)} bytes instead of {PACKET_SIZE}")
    kind, *numbers = _PACKET.unpack(data)
    message: Message
    match kind:
        case 1:
            message = Want(*numbers)
        case 2:
            message = Touch(numbers[0])
        case 3:
            message = Ready(numbers[0], numbers[1])
        case 4:
            message = Failed(numbers[0], numbers[1])
        case 5:
            message = Lent(numbers[0])
        case 6:
            message = Doubt(numbers[0])
        case _:
            raise ValueError(f"unknown message kind {kind}")
    if any(numbers[len(message) :]):
        raise ValueError(f"padding of {message} is not zero")
    _validate(message)
    return message


_KIND_OF: dict[type, int] = {Want: 1, Touch: 2, Ready: 3, Failed: 4, Lent: 5, Doubt: 6}


def _validate(message: Message) -> None:
    match message:
        case Want(first, end, ahead_end) if not first < end <= ahead_end:
            raise ValueError(f"want is not first < end <= ahead_end: {message}")
        case Ready(first, end) if not first < end:
            raise ValueError(f"ready is an empty range: {message}")
        case Failed(_, errno) if not 0 < errno <= _MAX_ERRNO:
            raise ValueError(f"failed carries no errno: {message}")
        case _:
            pass
