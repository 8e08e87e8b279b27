"""`create` and `convert` on images in registries: no containerd, no layer on disk, each layer read once.

What is pushed is named last, when everything is built. `create` sends nothing before; `convert` sends layers that go to
another registry while they are indexed, and zTOCs as soon as they are there.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import trio

from snapshotter.cli.build_options import create_options
from snapshotter.cli.buildreport import BuildReport
from snapshotter.cli.context import Context
from snapshotter.cli.publish import Publication, Push
from snapshotter.cli.remotecontent import LAYERS, RegistryContent
from snapshotter.cli.transfer import Destination
from snapshotter.heap import use_one_heap
from snapshotter.nursery import open_nursery
from snapshotter.oci.descriptor import Descriptor, Platform
from snapshotter.oci.reference import Reference
from snapshotter.registry.client import RegistryClient
from snapshotter.soci.artifacts import ArtifactDatabase
from snapshotter.soci.content_overlay import Overlay
from snapshotter.soci.convert import ConvertedImage, convert
from snapshotter.soci.create import IndexBuilder
from snapshotter.soci.index import CONFIG_BLOB
from snapshotter.soci.platforms import find_images
from snapshotter.soci.standalone import reachable
from snapshotter.soci.store import LayoutStore

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Work:
    """What both commands need: the image, and a place for what is made of it."""

    registry: RegistryClient
    root: Descriptor
    content: RegistryContent
    store: LayoutStore
    builder: IndexBuilder


async def _in_thread(work: Callable[[], T]) -> T:
    """Run `work`. When this task is cancelled it is left alone: the content that it reads is closed, and ends it."""
    return await trio.to_thread.run_sync(work, abandon_on_cancel=True)


def create_in_registry(context: Context, report: BuildReport) -> None:
    """Build the indices of an image and push them beside it."""
    reference = Reference.parse(context.arguments.image)
    platforms = context.platforms()

    async def create() -> None:
        async with _open(context, reference, report) as work:
            # First of all: whoever may not push is told so before an hour of work.
            await work.registry.push_blob(reference, CONFIG_BLOB)
            publications = await _in_thread(lambda: _build(work, platforms, str(reference), report))
            report.progress.close()
            push = Push(work.registry, work.store, reference, existing="allow", silent=report.is_json)
            for publication in publications:
                await push.publish(publication)

    context.run(create)


def convert_in_registry(
    context: Context,
    destination: Reference,
    wanted: Callable[[Descriptor], list[Platform] | None],
    report: BuildReport,
) -> ConvertedImage:
    """Convert an image into another one, of the same registry or not, and push that."""
    reference = Reference.parse(context.arguments.source)

    async def run() -> ConvertedImage:
        async with (
            _open(context, reference, report) as work,
            context.registry(destination) as registry,
            open_nursery() as nursery,
        ):
            await registry.push_blob(destination, CONFIG_BLOB)
            target = Destination(registry, destination, work.content, reference, nursery)
            work.content.sink = target.sink
            work.builder.stored = lambda digest: target.send(digest, work.store)
            source = Overlay(work.store, work.content)

            def make() -> ConvertedImage:
                platforms = wanted(work.root)
                return convert(source, work.store, work.builder, work.root, platforms, str(reference))

            converted = await _in_thread(make)
            blobs = await _in_thread(lambda: reachable(source, converted.root))
            await target.push(blobs.values(), work.store, converted.root)
            return converted

    return context.run(run)


@contextlib.asynccontextmanager
async def _open(context: Context, reference: Reference, report: BuildReport) -> AsyncIterator[_Work]:
    options = create_options(context.arguments)
    options = replace(options, workers=LAYERS)
    # Ranges come and go in many threads; a heap for each would keep some of them for ever.
    use_one_heap()
    async with context.registry(reference) as registry:
        root = await registry.resolve(reference)
        content = RegistryContent(registry, reference, root)
        # Threads that were interrupted may still be ending when the directory goes.
        with (
            contextlib.closing(content),
            tempfile.TemporaryDirectory(prefix="soci-", ignore_cleanup_errors=True) as directory,
        ):
            store = LayoutStore(Path(directory) / "content")
            database = ArtifactDatabase(Path(directory))
            builder = IndexBuilder(
                content, store, database, options, report=report.layer, progress=report.progress
            )
            yield _Work(registry, root, content, store, builder)


def _build(
    work: _Work, platforms: list[Platform] | None, name: str, report: BuildReport
) -> list[Publication]:
    publications = []
    for image in find_images(work.content, work.root, platforms, name):
        created = work.builder.build(image, work.root.digest)
        report.index(image.platform, created)
        publications.append(Publication(image, created.index))
    return publications
