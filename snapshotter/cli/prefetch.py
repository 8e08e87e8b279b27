"""`soci prefetch ls|info`: the prefetch artifacts that were made here."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from datetime import UTC, datetime

from snapshotter.cli.context import Context, digest_argument
from snapshotter.cli.options import Commands, add_json
from snapshotter.cli.output import age, print_json, print_table
from snapshotter.errors import NotFound, UsageError
from snapshotter.soci.artifacts import PrefetchRow
from snapshotter.soci.content import read_verified
from snapshotter.soci.prefetch import MAX_SIZE, VERSION, SpanRange, parse

_HEADER = ("DIGEST", "LAYER DIGEST", "SPANS", "CREATED")


def add_parser(commands: Commands, shared: argparse.ArgumentParser) -> None:
    """Add the command group."""
    group = commands.add_parser("prefetch", help="manage prefetch artifacts").add_subparsers(
        title="commands", metavar="COMMAND", required=True
    )
    listing = group.add_parser("list", aliases=["ls"], parents=[shared], help="list prefetch artifacts")
    add_json(listing)
    listing.set_defaults(command=run_list)
    info = group.add_parser("info", parents=[shared], help="print which spans an artifact names")
    info.add_argument("digest", metavar="DIGEST")
    add_json(info)
    info.set_defaults(command=run_info)


def run_list(context: Context) -> None:
    """Print a line per artifact; one that is gone from the store has no spans."""
    listed = []
    for row in context.database.prefetches():
        try:
            spans = _total(parse(_read(context, row)))
        except NotFound:
            spans = 0
        listed.append((row, spans))
    if context.arguments.json:
        print_json(
            [
                {  # the reference's names
                    "Digest": row.digest,
                    "LayerDigest": row.layer_digest,
                    "TotalSpans": spans,
                    "CreatedAt": _rfc3339(row.created_at),
                    "Size": row.size,
                }
                for row, spans in listed
            ]
        )
        return
    print_table(
        _HEADER, [(row.digest, row.layer_digest, spans, age(row.created_at)) for row, spans in listed]
    )


def run_info(context: Context) -> None:
    """Print the ranges of one artifact."""
    digest = digest_argument(context.arguments.digest)
    rows = context.database.prefetches(digest=digest)
    if not rows:
        raise UsageError(
            f"prefetch artifact {digest}: not known here; `soci prefetch ls` lists those that are"
        )
    data = _read(context, rows[0])
    ranges = parse(data)
    if context.arguments.json:
        print_json(json.loads(data))
        return
    facts = {
        "Digest": digest,
        "Version": VERSION,
        "Span Ranges": len(ranges),
        "Layer Digest": rows[0].layer_digest,
        "Size": f"{rows[0].size} bytes",
        "Created": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(rows[0].created_at)),
    }
    for name, value in facts.items():
        print(f"{name + ':':<15}{value}")
    print("\nPrefetch Spans:")
    for number, one in enumerate(ranges):
        print(f"  [{number}] StartSpan: {one.first}, EndSpan: {one.last} (covers {_total([one])} spans)")
    print(f"\nTotal spans to prefetch: {_total(ranges)}")


def _total(ranges: Iterable[SpanRange]) -> int:
    return sum(one.last - one.first + 1 for one in ranges)


def _rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _read(context: Context, row: PrefetchRow) -> bytes:
    return read_verified(context.artifacts, row.digest, limit=MAX_SIZE)
