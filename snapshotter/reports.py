"""What the daemon tells of itself: the sockets in its root, and how one of them is asked.

Each answers whoever connects with one JSON object and closes.

Concurrency: a call blocks for as long as the daemon takes, at most `_TIMEOUT_S`.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any, Final

from snapshotter.errors import UsageError

STATUS: Final = "status.sock"
"""Processes and lazy mounts (`soci-snapshotter-grpc status`)."""

TRACE: Final = "trace.sock"
"""Steps, waits and ranges of the last cold starts (`soci trace`)."""

TRACE_FORMAT: Final = 1
"""Of the object on `TRACE`; a reader refuses another one."""

_TIMEOUT_S = 10.0


def ask(root: Path, name: str) -> dict[str, Any]:
    """Return what the daemon on `root` says on one of its sockets. Raises UsageError when none answers."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(_TIMEOUT_S)
        try:
            sock.connect(str(root / name))
            report: dict[str, Any] = json.loads(b"".join(iter(lambda: sock.recv(1 << 16), b"")))
        except (OSError, ValueError) as error:
            raise UsageError(
                f"no snapshotter answers on {root / name} ({error}): is it running, with this --root?"
            ) from error
    return report
