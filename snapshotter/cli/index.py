"""`soci index ls|info|verify|rm`: the SOCI indices that were made here."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from typing import Any

from snapshotter.cli import verify
from snapshotter.cli.context import Context, digest_argument
from snapshotter.cli.options import Commands, Several, add_always_json, add_json
from snapshotter.cli.output import age, print_json, print_table
from snapshotter.errors import NotFound, SnapshotterError, UsageError
from snapshotter.oci.platform import matches, parse_platform
from snapshotter.soci.artifacts import IndexRow
from snapshotter.soci.content import read_verified
from snapshotter.units import Digest

_HEADER = ("DIGEST", "SIZE", "IMAGE REF", "PLATFORM", "MEDIA TYPE", "MANIFEST VERSION", "CREATED")


def add_parser(commands: Commands, shared: argparse.ArgumentParser) -> None:
    """Add the command group."""
    group = commands.add_parser("index", help="manage SOCI indices").add_subparsers(
        title="commands", metavar="COMMAND", required=True
    )
    listing = group.add_parser("list", aliases=["ls"], parents=[shared], help="list indices")
    listing.add_argument("--ref", metavar="IMAGE", help="only indices of this image")
    listing.add_argument("--quiet", "-q", action="store_true", help="print only digests")
    listing.add_argument(
        "--platform",
        "-p",
        action=Several,
        default=[],
        metavar="OS/ARCH",
        help="only indices of this platform",
    )
    add_json(listing)
    listing.set_defaults(command=run_list)
    info = group.add_parser("info", parents=[shared], help="print an index")
    info.add_argument("digest", metavar="DIGEST")
    add_always_json(info)
    info.set_defaults(command=run_info)
    verify.add_command(group, shared)
    remove = group.add_parser("remove", aliases=["rm"], parents=[shared], help="remove indices")
    remove.add_argument("digests", nargs="*", metavar="DIGEST")
    remove.add_argument("--ref", metavar="IMAGE", help="remove all indices of this image")
    remove.set_defaults(command=run_remove)


def run_list(context: Context) -> None:
    """Print a line per index and image, the newest first."""
    arguments = context.arguments
    image_digest = context.locate(arguments.ref).root.digest if arguments.ref else None
    rows = context.database.indices(image_digest=image_digest)
    wanted = [parse_platform(text) for text in arguments.platform]
    if wanted:
        rows = [row for row in rows if any(matches(one, parse_platform(row.platform)) for one in wanted)]
    if arguments.quiet:
        for row in rows:
            print(row.digest)
        return
    if arguments.json:
        print_json([_describe(context, row) for row in rows])
        return
    lines = [
        (row.digest, row.size, name, row.platform, row.media_type, f"v{row.version}", age(row.created_at))
        for row in rows
        for name in _image_names(context, row)
    ]
    print_table(_HEADER, lines)


def _describe(context: Context, row: IndexRow) -> dict[str, Any]:
    return dataclasses.asdict(row) | {"image_refs": [name for name in _image_names(context, row) if name]}


def run_info(context: Context) -> None:
    """Print the index manifest for people."""
    digest = digest_argument(context.arguments.digest)
    if context.database.ztocs(digest=digest):
        raise UsageError(f"{digest} is a zTOC and not a SOCI index: see `soci ztoc info`")
    _known(context, digest)
    print_json(json.loads(read_verified(context.artifacts, digest)))


def run_remove(context: Context) -> None:
    """Remove indices from the database and from the content store."""
    arguments = context.arguments
    if bool(arguments.digests) == bool(arguments.ref):
        raise UsageError("soci index rm: give either digests of indices or --ref IMAGE")
    if arguments.ref:
        rows = context.database.indices(image_digest=context.locate(arguments.ref).root.digest)
        digests = list(dict.fromkeys(row.digest for row in rows))
    else:
        digests = [digest_argument(text) for text in arguments.digests]
    for digest in digests:
        _known(context, digest)
    for digest in digests:
        # Collected already, or removed by an earlier run that was stopped: gone is what was asked for.
        with contextlib.suppress(NotFound):
            context.artifacts.remove(digest)
        context.database.remove_index(digest)


def _known(context: Context, digest: Digest) -> IndexRow:
    rows = context.database.indices(digest=digest)
    if not rows:
        raise UsageError(f"SOCI index {digest}: not known here; `soci index ls` lists those that are")
    return rows[0]


def _image_names(context: Context, row: IndexRow) -> list[str]:
    """Return the names of the image in containerd; an empty one when nothing, or no containerd, knows it."""
    try:
        return [image.name for image in context.containerd.images.list(row.image_digest)] or [""]
    except SnapshotterError:
        return [""]
