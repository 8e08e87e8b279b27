"""`--address fd://`: the socket that systemd made and keeps open while the daemon is away.

What containerd asks meanwhile waits in the socket's queue instead of failing; its client backs off only when it is not
greeted within a second. gRPC cannot serve a listener that somebody else has made, so connections are accepted here and their bytes
passed on to a socket of gRPC's own below the root. containerd keeps one connection for everything, so this costs a
copy of small messages and nothing else.

Concurrency: trio; two tasks for each connection.
"""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

import trio

from snapshotter.errors import ConfigError
from snapshotter.sdnotify import listen_fds

_log = logging.getLogger(__name__)

_CHUNK = 64 * 1024


def take_listener() -> socket.socket:
    """Return the socket that systemd handed to this process. Raises ConfigError when there is not exactly one."""
    found = []
    for fd, name in listen_fds():
        sock = _listener(fd)
        if sock is None:
            _log.warning("a descriptor of the service manager is of no use here", extra={"descriptor": name})
            os.close(fd)
        else:
            found.append(sock)
    if len(found) == 1:
        return found[0]
    for sock in found:
        sock.close()
    raise ConfigError(
        f"--address fd://: systemd must hand over one unix stream socket, got {len(found)}: "
        "start the daemon by soci-snapshotter-grpc.socket, or give a path"
    )


def _listener(fd: int) -> socket.socket | None:
    """Return the unix stream socket that listens at `fd`; None when it is something else, which stays open."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        return None
    listens = sock.family == socket.AF_UNIX and sock.type == socket.SOCK_STREAM
    if listens and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return sock
    sock.detach()
    return None


async def forward(
    listener: socket.socket, path: Path, connections: trio.Nursery, accepting: trio.CancelScope
) -> None:
    """Pass every connection of `listener` on to the socket at `path`, until cancelled.

    `accepting`, cancelled alone, leaves new connections in the queue, for the next daemon; those that are open go
    on in `connections`.
    """

    async def pass_on(near: trio.SocketStream) -> None:
        try:
            far = await trio.open_unix_socket(str(path))
        except OSError as error:
            _log.error("a connection could not be passed on", extra={"error": str(error)})
            return
        async with far, trio.open_nursery() as nursery:
            nursery.start_soon(_copy, near, far, nursery.cancel_scope)
            nursery.start_soon(_copy, far, near, nursery.cancel_scope)

    with trio.socket.from_stdlib_socket(listener) as sock, accepting:
        await trio.serve_listeners(pass_on, [trio.SocketListener(sock)], handler_nursery=connections)


async def _copy(source: trio.SocketStream, sink: trio.SocketStream, scope: trio.CancelScope) -> None:
    """Copy until either end closes; then the connection is over in both directions, as gRPC means it."""
    try:
        while data := await source.receive_some(_CHUNK):
            await sink.send_all(data)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass
    scope.cancel()
