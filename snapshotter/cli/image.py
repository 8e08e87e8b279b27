"""`soci image rpull REF`: pull an image so that its layers can be lazy; the group has `materialize` too."""

from __future__ import annotations

import argparse

from snapshotter.cli import materialize
from snapshotter.cli.context import Context, digest_argument
from snapshotter.cli.options import Commands, add_registry
from snapshotter.oci.platform import host_platform, parse_platform
from snapshotter.oci.reference import Reference


def add_parser(commands: Commands, shared: argparse.ArgumentParser) -> None:
    """Add the command group."""
    group = commands.add_parser("image", help="manage images").add_subparsers(
        title="commands", metavar="COMMAND", required=True
    )
    parser = group.add_parser(
        "rpull", parents=[shared], help="pull an image through a remote snapshotter, its layers lazily"
    )
    parser.add_argument("reference", metavar="REF")
    parser.add_argument("--snapshotter", default="soci", metavar="NAME", help="(%(default)s)")
    parser.add_argument(
        "--soci-index-digest", metavar="DIGEST", help="the SOCI index to use (found in the registry)"
    )
    parser.add_argument("--platform", "-p", metavar="OS/ARCH", help="(this host's)")
    add_registry(parser)
    parser.set_defaults(command=run)
    materialize.add_parser(group, shared)


def run(context: Context) -> None:
    """Pull, printing a line per step."""
    from snapshotter.cli.pull import PullOptions, pull

    arguments = context.arguments
    reference = Reference.parse(arguments.reference)
    options = PullOptions(
        snapshotter=arguments.snapshotter,
        platform=parse_platform(arguments.platform) if arguments.platform else host_platform(),
        index_digest=digest_argument(arguments.soci_index_digest) if arguments.soci_index_digest else None,
    )

    async def pull_one() -> None:
        async with context.registry(reference) as registry:
            await pull(
                reference,
                containerd=context.containerd,
                registry=registry,
                options=options,
                report=lambda line: print(line, flush=True),
            )

    context.run(pull_one)
