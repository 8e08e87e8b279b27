"""`soci create IMAGE`: build the SOCI index (v1) of an image, a local one or one in a registry."""

from __future__ import annotations

import argparse
import contextlib
import time

from snapshotter.cli.build_options import add_build, create_options
from snapshotter.cli.buildreport import BuildReport
from snapshotter.cli.context import Context, LocatedImage
from snapshotter.cli.options import Commands, add_layout, add_registry, add_remote
from snapshotter.errors import NotFound
from snapshotter.oci.descriptor import Platform
from snapshotter.soci.content import ArtifactStore
from snapshotter.soci.create import CreatedIndex, CreateOptions, IndexBuilder
from snapshotter.soci.platforms import PlatformImage

_IMAGE_LABEL = "containerd.io/gc.ref.content.soci-index"
"""On an image record: keeps the index from the garbage collector as long as the image exists."""


def add_parser(commands: Commands, shared: argparse.ArgumentParser) -> None:
    """Add the command."""
    parser = commands.add_parser("create", parents=[shared], help="build the SOCI index of an image")
    parser.add_argument("image", metavar="IMAGE")
    add_build(parser)
    add_layout(parser)
    add_remote(parser)
    add_registry(parser)
    parser.set_defaults(command=run)


def run(context: Context) -> None:
    """Build an index per platform, each stored before the next is begun."""
    arguments = context.arguments
    options = create_options(arguments)
    with BuildReport(arguments) as report:
        if context.is_remote:
            from snapshotter.cli.remote import create_in_registry

            create_in_registry(context, report)
            return
        with context.time_limit():
            image = context.locate(arguments.image)
            for platform_image in image.platforms(context.platforms()):
                created = create(context, image, platform_image, options, report)
                report.index(platform_image.platform, created)


def create(
    context: Context,
    image: LocatedImage,
    platform_image: PlatformImage,
    options: CreateOptions,
    report: BuildReport,
) -> CreatedIndex:
    """Build and store one index, and tie its life in containerd to the image's."""
    with contextlib.ExitStack() as stack:
        store: ArtifactStore = context.layout_store
        if context.keeps_in_containerd:
            store = stack.enter_context(context.containerd.lease()).content
        builder = IndexBuilder(
            image.source, store, context.database, options, report=report.layer, progress=report.progress
        )
        try:
            created = builder.build(
                platform_image, image.root.digest, gc_root=None if image.in_containerd else _now()
            )
        except NotFound as error:
            raise image.incomplete(error) from error
        if context.keeps_in_containerd and image.in_containerd:
            context.containerd.images.label(image.name, _labels(created, platform_image.platform))
    return created


def _labels(created: CreatedIndex, platform: Platform) -> dict[str, str]:
    """The field's own label holds one index; a second one per platform keeps the others alive as well."""
    digest = str(created.index.digest)
    return {_IMAGE_LABEL: digest, f"{_IMAGE_LABEL}.{str(platform).replace('/', '-')}": digest}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
