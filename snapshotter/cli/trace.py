"""`soci trace`: the last cold start of this host, as a picture and in a paragraph.

It asks the snapshotter, which remembers the last starts in memory; nothing has to be switched on before.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from snapshotter import reports
from snapshotter.cli.context import Context
from snapshotter.cli.options import Commands, add_json
from snapshotter.cli.timeline import find_start, verdict
from snapshotter.cli.waterfall import render


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
    report = reports.ask(options.root, reports.TRACE)
    if options.json:
        print(json.dumps(report))
        return
    start = find_start(report, image=options.image)
    said = verdict(start)
    if options.output is not None:
        options.output.write_text(render(start, said), encoding="utf-8")
    print(said)
