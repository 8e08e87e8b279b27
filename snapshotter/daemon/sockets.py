"""Paths of unix sockets: what a former process has left there makes way, anything else does not.

Stateless.
"""

from __future__ import annotations

import os
import socket
import stat

from snapshotter.errors import ConfigError

PATH_MAX = 107
"""Bytes of a path that fit into sockaddr_un, its final zero apart."""


def make_way(path: str, key: str) -> None:
    """Remove a socket at `path` on which nobody listens any more, so that it can be bound.

    Raises ConfigError, which names `key`, when somebody listens, when it is no socket, or when its path is too long.
    """
    if len(os.fsencode(path)) > PATH_MAX:
        raise ConfigError(f"{key}: a socket's path has at most {PATH_MAX} bytes, got {path!r}")
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{key}: there is something at {path} that is not a socket; it stays")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        if probe.connect_ex(path) == 0:
            raise ConfigError(f"{key}: another process listens on {path}: stop it, or choose another path")
    os.unlink(path)
