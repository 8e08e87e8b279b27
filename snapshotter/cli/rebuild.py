"""`soci rebuild-db`: make the artifact database agree with the content store."""

from __future__ import annotations

import argparse

from snapshotter.cli.context import Context
from snapshotter.cli.options import Commands, add_json
from snapshotter.cli.output import print_json
from snapshotter.errors import SnapshotterError
from snapshotter.oci.descriptor import Descriptor
from snapshotter.soci.content import ContentSource
from snapshotter.soci.rebuild import ListedStore, rebuild


def add_parser(commands: Commands, shared: argparse.ArgumentParser) -> None:
    """Add the command, by both of the names that are in use."""
    parser = commands.add_parser(
        "rebuild-db",
        aliases=["rebuild_db"],
        parents=[shared],
        help="make the artifact database agree with the content store",
    )
    add_json(parser)
    parser.set_defaults(command=run)


def run(context: Context) -> None:
    """Drop the rows of content that is gone, add those of indices that are there."""
    store: ListedStore = context.layout_store
    images: ContentSource = store
    roots: list[Descriptor] = []
    if context.keeps_in_containerd:
        store = context.containerd.content
    try:
        roots = [image.target for image in context.containerd.images.list()]
        images = context.containerd.content
    except SnapshotterError:
        # Without containerd there are no images here; what the program keeps itself can be listed all the same.
        if context.keeps_in_containerd:
            raise
    done = rebuild(context.database, store, images, roots)
    if context.arguments.json:
        print_json({"dropped": done.dropped, "added": done.added})
        return
    for digest in done.dropped:
        print(f"dropped {digest}")
    for digest in done.added:
        print(f"added {digest}")
