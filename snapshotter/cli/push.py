"""`soci push IMAGE`: publish the newest v1 index of each platform, beside the image in its registry."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from snapshotter.cli.context import Context
from snapshotter.cli.options import DEFAULT_UPLOADS, Commands, add_layout, add_platforms, add_registry
from snapshotter.errors import NotFound, UsageError
from snapshotter.oci.reference import Reference
from snapshotter.soci.content import read_verified
from snapshotter.soci.index import IndexVersion, parse
from snapshotter.soci.platforms import PlatformImage

if TYPE_CHECKING:
    from snapshotter.cli.publish import Publication


def add_parser(commands: Commands, shared: argparse.ArgumentParser) -> None:
    """Add the command."""
    parser = commands.add_parser("push", parents=[shared], help="push SOCI artifacts to the image's registry")
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument(
        "--max-concurrent-uploads",
        type=_concurrency,
        default=DEFAULT_UPLOADS,
        metavar="N",
        help="(%(default)s)",
    )
    parser.add_argument("--quiet", "-q", action="store_true", help="print only the digests of the indices")
    parser.add_argument(
        "--existing-index",
        choices=("warn", "skip", "allow"),
        default="warn",
        help="what to do when the registry has an index of the image (%(default)s)",
    )
    add_registry(parser)
    parser.add_argument("--snapshotter", help=argparse.SUPPRESS)
    add_platforms(parser)
    add_layout(parser)
    parser.set_defaults(command=run)


def run(context: Context) -> None:
    """Collect what is to be pushed, all of it, and only then begin."""
    from snapshotter.cli.publish import Push

    arguments = context.arguments
    reference = Reference.parse(arguments.image)
    image = context.locate(arguments.image)
    publications = [
        _newest(context, arguments.image, platform_image)
        for platform_image in image.platforms(context.platforms())
    ]
    store = context.artifacts

    async def publish_all() -> None:
        async with context.registry(reference) as registry:
            push = Push(
                registry,
                store,
                reference,
                concurrency=arguments.max_concurrent_uploads,
                existing=arguments.existing_index,
                quiet=arguments.quiet,
            )
            for publication in publications:
                await push.publish(publication)

    context.run(publish_all)


def _concurrency(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of uploads")
    return int(text) or DEFAULT_UPLOADS


def _newest(context: Context, name: str, image: PlatformImage) -> Publication:
    """Return the newest v1 index of `image` that is complete. Raises UsageError when there is none."""
    from snapshotter.cli.publish import Publication

    missing: NotFound | None = None
    for row in context.database.indices(manifest_digest=image.descriptor.digest):
        if row.version != IndexVersion.V1:
            continue
        try:
            index = parse(read_verified(context.artifacts, row.digest))
            for entry in index.ztocs:
                context.artifacts.size(entry.ztoc)
        except NotFound as error:
            missing = missing or error
            continue
        return Publication(image, index)
    reason = f" ({missing})" if missing is not None else ""
    raise UsageError(
        f"could not find any soci index manifest v1 to push for platform {image.platform} of image {name}{reason}; "
        "`soci create` makes one"
    )
