"""`soci trace`: the last cold start of this host, as a picture and in a paragraph.

It asks the snapshotter, which remembers the last starts in memory; nothing has to be switched on before.
"""

from __future__ import annotations

import argparse
import json
import socket
from pathlib import Path
from typing import Any

from snapshotter.cli.context import Context
from snapshotter.cli.options import Commands, add_json
from snapshotter.cli.timeline import find_start, verdict
from snapshotter.cli.waterfall import render
from snapshotter.errors import UsageError

SOCKET_NAME = "trace.sock"
_TIMEOUT_S = 10.0


def add_parser(commands: Commands, shared: argparse.ArgumentParser) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "trace", parents=[shared], help="show where the time of the last cold start went"
    )
    parser.add_argument(
        "image", nargs="?", default="", metavar="REF", help="of this image (whatever came last)"
    )
    parser.add_argument(
        "--output",
        "-o",
        type=Path,
        metavar="FILE",
        help="write the picture there, one HTML file without a script",
    )
    add_json(parser)
    parser.set_defaults(command=_trace)


def _trace(context: Context) -> None:
    options = context.arguments
    report = ask(options.root / SOCKET_NAME)
    if options.json:
        print(json.dumps(report))
        return
    start = find_start(report, image=options.image)
    said = verdict(start)
    if options.output is not None:
        options.output.write_text(render(start, said), encoding="utf-8")
    print(said)


def ask(path: Path) -> dict[str, Any]:
    """Return what the snapshotter behind the socket at `path` remembers. Raises UsageError when none answers."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(_TIMEOUT_S)
        try:
            sock.connect(str(path))
            report: dict[str, Any] = json.loads(b"".join(iter(lambda: sock.recv(1 << 16), b"")))
        except (OSError, ValueError) as error:
            raise UsageError(
                f"no snapshotter answers on {path} ({error}): is it running, and is --root its root directory?"
            ) from error
    return report
