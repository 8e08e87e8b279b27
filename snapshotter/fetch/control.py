"""What the daemon and the fetcher say to each other.

One message is one packet of `snapshotter/messages.py`; `attach` carries one descriptor. Ops of the daemon:

    open     the layer is mounted and its zTOC and tree are there; `background` says whether to complete it, `image`
             for which image that counts
    attach   a layer server's socket (`layer/wire.py`), as the descriptor
    close    the layer is not mounted any more
    source   where the blob is; or why that could not be found out, and whether that may pass

and of the fetcher:

    opened   the answer to `open`: `blob`, `data` and `spans` exist now; or `error` says why not
    source   tell me where the blob is; `renew` when the last answer was refused by its host. `mirror` and `complaint`
             when a mirror gave it and did not do: "lied", or "failed"
    complete every byte of the layer is stored; `verified` says whether the whole has the layer's digest; `diff_id` is
             what its tar stream has, when that has just been found out

Concurrency: plain functions on a socket. Sources are secrets: they are in these packets and nowhere else.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from snapshotter import messages
from snapshotter.registry.source import BlobSource
from snapshotter.units import Digest, parse_digest

LIED: Final = "lied"
"""A span from it has another digest."""
FAILED: Final = "failed"
"""It did not give a range, for whatever reason."""


@dataclass(frozen=True, slots=True)
class Open:
    """Daemon: the layer is mounted."""

    layer: Digest
    background: bool
    image: str = ""
    """The image with which the layer came, by any name: what is fetched in the background counts for that one."""


@dataclass(frozen=True, slots=True)
class Attach:
    """Daemon: here is the socket of a server of this layer."""

    layer: Digest


@dataclass(frozen=True, slots=True)
class Close:
    """Daemon: the layer is not mounted any more."""

    layer: Digest


@dataclass(frozen=True, slots=True)
class Source:
    """Daemon: the blob is there."""

    layer: Digest
    source: BlobSource


@dataclass(frozen=True, slots=True)
class NoSource:
    """Daemon: it could not be found out where the blob is."""

    layer: Digest
    error: str
    temporary: bool


@dataclass(frozen=True, slots=True)
class Opened:
    """Fetcher: the layer's files exist, or `error` says why not."""

    layer: Digest
    error: str = ""


@dataclass(frozen=True, slots=True)
class NeedSource:
    """Fetcher: where is the blob?"""

    layer: Digest
    renew: bool
    mirror: str = ""
    """The mirror of the last answer, when there is a complaint."""
    complaint: str = ""
    """What it did: `LIED` or `FAILED`."""


@dataclass(frozen=True, slots=True)
class Complete:
    """Fetcher: every byte is stored."""

    layer: Digest
    verified: bool
    diff_id: str = field(default="", compare=False)
    """The digest of the tar stream, when it has just been found out."""


FromDaemon: TypeAlias = Open | Attach | Close | Source | NoSource
FromFetcher: TypeAlias = Opened | NeedSource | Complete
Message: TypeAlias = FromDaemon | FromFetcher


def send(sock: socket.socket, message: Message, fds: Sequence[int] = ()) -> None:
    """Send `message`, and copies of `fds` with it. Raises OSError as the socket does."""
    messages.send(sock, {"op": _op(message), "layer": message.layer, **_fields(message)}, fds)


def receive(sock: socket.socket) -> tuple[Message, list[int]] | None:
    """Return the next message and its descriptors, which are the caller's; None at the end.

    Raises OSError as the socket does, and ValueError for a packet that is no message of ours; then its
    descriptors are closed, and the error does not show the packet, which may hold a secret.
    """
    try:
        received = messages.receive(sock)
    except ValueError:
        raise ValueError("control packet is not a JSON object") from None
    if received is None:
        return None
    fields, fds = received
    try:
        message = _message(fields)
        if len(fds) != isinstance(message, Attach):
            raise ValueError(f"control message {_op(message)!r} came with {len(fds)} descriptors")
    except ValueError:
        for fd in fds:
            os.close(fd)
        raise
    return message, fds


def _op(message: Message) -> str:
    return "source" if isinstance(message, NeedSource | NoSource) else type(message).__name__.lower()


def _fields(message: Message) -> Mapping[str, Any]:
    match message:
        case Open(_, background, image):
            return {"background": background} | ({"image": image} if image else {})
        case Source(_, source):
            return {"source": source.to_json()}
        case NoSource(_, error, temporary):
            return {"error": error, "temporary": temporary}
        case Opened(_, error):
            return {"error": error} if error else {}
        case NeedSource(_, renew, mirror, complaint):
            return {"renew": renew} | ({"mirror": mirror, "complaint": complaint} if mirror else {})
        case Complete(_, verified, diff_id):
            return {"verified": verified, "diff_id": diff_id}
    return {}


def _message(fields: Mapping[str, Any]) -> Message:
    """Return the message that `fields` are. Raises ValueError."""
    layer = parse_digest(str(fields.get("layer")))
    match fields:
        case {"op": "open", "background": bool(background)}:
            return Open(layer, background, str(fields.get("image", "")))
        case {"op": "attach"}:
            return Attach(layer)
        case {"op": "close"}:
            return Close(layer)
        case {"op": "source", "source": dict(source)}:
            return Source(layer, BlobSource.from_json(source))
        case {"op": "source", "error": str(error), "temporary": bool(temporary)}:
            return NoSource(layer, error, temporary)
        case {"op": "source", "renew": bool(renew)}:
            return NeedSource(layer, renew, str(fields.get("mirror", "")), str(fields.get("complaint", "")))
        case {"op": "opened"}:
            return Opened(layer, str(fields.get("error", "")))
        case {"op": "complete", "verified": bool(verified), "diff_id": str(diff_id)}:
            return Complete(layer, verified, diff_id)
    raise ValueError(f"unknown control message {str(fields.get('op'))[:32]!r}")
