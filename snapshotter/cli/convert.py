"""`soci convert SOURCE DESTINATION`: make an image that carries its SOCI indices (v2) with it."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import tempfile
from pathlib import Path

from snapshotter.cli.build_options import add_build, create_options
from snapshotter.cli.buildreport import BuildReport
from snapshotter.cli.context import Context
from snapshotter.cli.options import Commands, add_registry, add_remote
from snapshotter.errors import NotFound, UsageError
from snapshotter.oci.descriptor import Descriptor, Platform
from snapshotter.oci.media_types import MANIFEST_TYPES
from snapshotter.oci.platform import parse_platform
from snapshotter.oci.reference import Reference
from snapshotter.soci.artifacts import ArtifactDatabase
from snapshotter.soci.content import ArtifactStore
from snapshotter.soci.content_overlay import Overlay, Tee
from snapshotter.soci.convert import ConvertedImage, convert
from snapshotter.soci.create import IndexBuilder
from snapshotter.soci.layout import CONTAINERD_NAME, REF_NAME, OciLayout
from snapshotter.soci.standalone import ARCHIVE, DIRECTORY, check_target, layout_image, write_layout
from snapshotter.soci.store import LayoutStore


def add_parser(commands: Commands, shared: argparse.ArgumentParser) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "convert", parents=[shared], help="make an image that carries its SOCI indices with it"
    )
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("destination", metavar="DESTINATION")
    add_build(parser)
    parser.add_argument(
        "--standalone",
        action="store_true",
        help="SOURCE and DESTINATION are OCI layouts, directories or archives; no containerd is needed",
    )
    parser.add_argument(
        "--format",
        choices=(ARCHIVE, DIRECTORY),
        default=ARCHIVE,
        help="what to write with --standalone (%(default)s)",
    )
    add_remote(parser)
    add_registry(parser)
    parser.set_defaults(command=run)


def run(context: Context) -> None:
    """Convert an image where it is."""
    with BuildReport(context.arguments) as report:
        if context.is_remote:
            from snapshotter.cli.remote import convert_in_registry

            target = destination(context.arguments.destination)
            wanted = functools.partial(wanted_platforms, context)
            _say(report, convert_in_registry(context, target, wanted, report))
            return
        with context.time_limit():
            if context.arguments.standalone:
                _convert_layout(context, report)
            else:
                _convert_in_containerd(context, report)


def destination(text: str) -> Reference:
    """Return the name of the new image. Raises UsageError unless it is one with a tag and no digest."""
    reference = Reference.parse(text)
    if "@" in text:
        raise UsageError(f"destination {text}: must not name a digest, which is known only afterwards")
    if ":" not in text.rpartition("/")[2]:
        raise UsageError(f"destination {text}: needs a tag, as in {text}:latest")
    return reference


def wanted_platforms(context: Context, root: Descriptor) -> list[Platform] | None:
    """Return what to convert; an image of one platform needs no --platform, whatever this host is."""
    if root.media_type in MANIFEST_TYPES and not context.arguments.platform:
        return None
    return context.platforms()


def _say(report: BuildReport, converted: ConvertedImage) -> None:
    """Say what became of the image."""
    for one in converted.platforms:
        report.index(one.platform, one.created)
    for platform in converted.skipped:
        report.line(f"platform {platform} has no layer that can be indexed: left as it is")
    skipped = [str(platform) for platform in converted.skipped]
    report.line(f"converted image {converted.root.digest}", image=converted.root.digest, skipped=skipped)


def _convert_in_containerd(context: Context, report: BuildReport) -> None:
    arguments = context.arguments
    options = create_options(arguments)
    target = str(destination(arguments.destination))
    image = context.locate(arguments.source)
    with context.containerd.lease() as leased:
        store: ArtifactStore = leased.content
        # The image needs its indices beside it wherever else artifacts are kept.
        if not context.keeps_in_containerd:
            store = Tee(leased.content, context.layout_store)
        builder = IndexBuilder(
            image.source, store, context.database, options, report=report.layer, progress=report.progress
        )
        try:
            converted = convert(
                image.source, store, builder, image.root, wanted_platforms(context, image.root), image.name
            )
        except NotFound as error:
            raise image.incomplete(error) from error
        leased.images.put(target, converted.root)
    _say(report, converted)


def _convert_layout(context: Context, report: BuildReport) -> None:
    arguments = context.arguments
    options = create_options(arguments)
    source_path, target = Path(arguments.source), Path(os.path.abspath(arguments.destination))
    for text in arguments.platform:
        parse_platform(text)
    check_target(arguments.format, target)
    with contextlib.ExitStack() as stack:
        layout = stack.enter_context(OciLayout(source_path))
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soci-convert-")))
        store = LayoutStore(work / "content")
        source = Overlay(store, layout)
        try:
            root = layout_image(layout, store, source_path)
            database = ArtifactDatabase(work)
            builder = IndexBuilder(
                source, store, database, options, report=report.layer, progress=report.progress
            )
            converted = convert(
                source, store, builder, root, wanted_platforms(context, root), str(source_path)
            )
            write_layout(arguments.format, target, source, _named(converted.root, layout))
        except NotFound as error:
            raise UsageError(f"OCI layout {source_path}: {error}") from error
    _say(report, converted)


def _named(root: Descriptor, layout: OciLayout) -> Descriptor:
    """Return the new image under the name that the layout gave to the old one."""
    entries = layout.index.manifests
    names = {REF_NAME, CONTAINERD_NAME}
    kept = {key: value for key, value in entries[0].annotations.items() if key in names}
    return Descriptor(root.media_type, root.digest, root.size, kept if len(entries) == 1 else {})
