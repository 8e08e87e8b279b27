"""`soci image materialize REF`: bring the blobs of a lazily pulled image into containerd's content store.

Afterwards whatever reads an image's blobs (push, export, convert) works on it as on any other. A layer that is whole in
the daemon's cache is taken from there, any other from the registry; containerd checks every digest before it
keeps a blob. Snapshots and running containers are left as they are.

Concurrency: one trio task and what it starts.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import trio

from snapshotter.cli.context import Context
from snapshotter.cli.options import Commands, add_json, add_platforms, add_registry
from snapshotter.cli.output import print_json
from snapshotter.cli.progress import TerminalProgress, size_text
from snapshotter.containerd.labels import layer_references, source_label
from snapshotter.errors import AlreadyExists, FailedPrecondition
from snapshotter.layer.store import LayerStore
from snapshotter.nursery import open_nursery
from snapshotter.oci.descriptor import Descriptor
from snapshotter.oci.reference import Reference
from snapshotter.soci.platforms import PlatformImage
from snapshotter.units import Digest

if TYPE_CHECKING:
    from snapshotter.containerd.client import Containerd
    from snapshotter.registry.client import RegistryClient

_PIECE: Final = 1 << 20

Origin = Literal["present", "cache", "registry"]
Progress = Callable[[Descriptor, int], None]


@dataclass(frozen=True, slots=True)
class Materialized:
    """One layer that is in the content store now, and where it came from."""

    layer: Descriptor
    origin: Origin


def add_parser(commands: Commands, shared: argparse.ArgumentParser) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "materialize",
        parents=[shared],
        help="bring all layers of a lazily pulled image into containerd, for push and export",
    )
    parser.add_argument("reference", metavar="REF")
    add_platforms(parser)
    add_json(parser)
    add_registry(parser)
    parser.set_defaults(command=run)


def run(context: Context) -> None:
    """Materialize, printing a line per layer."""
    image = context.locate(context.arguments.reference)
    reference = Reference.parse(image.name)
    wanted = image.platforms(context.platforms())
    progress = TerminalProgress()

    async def work() -> list[Materialized]:
        async with context.registry(reference) as registry:
            return await materialize(
                reference,
                wanted,
                containerd=context.containerd,
                registry=registry,
                root=context.arguments.root,
                progress=progress.advance,
            )

    try:
        done = context.run(work)
    finally:
        progress.close()
    if context.arguments.json:
        layers = [{"digest": one.layer.digest, "size": one.layer.size, "from": one.origin} for one in done]
        manifests = [one.descriptor.digest for one in wanted]
        print_json({"image": image.name, "manifests": manifests, "layers": layers})
        return
    for one in done:
        print(f"layer {one.layer.digest} {size_text(one.layer.size)}: {_WORDS[one.origin]}")
    print(f"{image.name}: all {len(done)} layers are in containerd")


_WORDS: Final = {
    "present": "in containerd before",
    "cache": "from the cache of this host",
    "registry": "from the registry",
}


async def materialize(
    reference: Reference,
    images: list[PlatformImage],
    *,
    containerd: Containerd,
    registry: RegistryClient,
    root: Path,
    progress: Progress = lambda _layer, _size: None,
) -> list[Materialized]:
    """Bring every layer of `images` into the content store; return them in order, each once.

    `root` is the daemon's directory, which need not exist. Raises RegistryError, CorruptData and others.
    """
    from snapshotter.download.downloads import Downloads

    layers = list({layer.digest: layer for image in images for layer in image.manifest.layers}.values())
    labels = source_label(reference)
    origins: dict[Digest, Origin] = {}
    with containerd.lease() as leased:
        missing = []
        here = _Here(leased, labels, root, progress)
        for layer in layers:
            found = await trio.to_thread.run_sync(here.find, layer)
            origins[layer.digest] = found or "registry"
            if found is None:
                missing.append(layer)
        downloads = Downloads(reference, registry, leased.content, labels=labels, on_progress=progress)
        with closing(downloads):
            async with open_nursery() as nursery:
                downloads.start(missing, nursery)
                for layer in missing:
                    await downloads.wait(layer.digest)
        for image in images:
            await trio.to_thread.run_sync(_tie, leased, image)
    return [Materialized(layer, origins[layer.digest]) for layer in layers]


class _Here:
    """What is on this host already."""

    def __init__(
        self, containerd: Containerd, labels: dict[str, str], root: Path, progress: Progress
    ) -> None:
        self._containerd = containerd
        self._labels = labels
        self._root = root
        self._progress = progress

    def find(self, layer: Descriptor) -> Origin | None:
        """Return where a layer was found and stored from; None when it has to be fetched."""
        if self._containerd.content.exists(layer.digest):
            return "present"
        if not (self._root / "layers").is_dir():  # opening a store would make it
            return None
        try:
            with LayerStore(self._root).paths(layer.digest).blob.open("rb", buffering=0) as blob:
                whole = _is_whole(blob.fileno(), layer.size)
                return "cache" if whole and self._copy(blob, layer) else None
        except OSError:  # the layer is not lazy, or not ours to read
            return None

    def _copy(self, blob: FileIO, layer: Descriptor) -> bool:
        """Copy a cached blob to the content store; say whether it was the blob that it should be."""
        try:
            with self._containerd.content.ingest(layer.digest, layer.size) as ingest:
                while not ingest.complete and (piece := blob.read(_PIECE)):
                    ingest.write(piece)
                    self._progress(layer, len(piece))
                ingest.commit(self._labels)
        except AlreadyExists:
            return True
        except FailedPrecondition:  # a part of it was evicted meanwhile
            return False
        return True


def _is_whole(blob: int, size: int) -> bool:
    """Say whether a file of the cache may be a whole blob: its length is right and nothing is missing in it."""
    whole = os.fstat(blob).st_size == size and (not size or os.lseek(blob, 0, os.SEEK_HOLE) == size)
    os.lseek(blob, 0, os.SEEK_SET)
    return whole


def _tie(containerd: Containerd, image: PlatformImage) -> None:
    """Have the garbage collector keep the layers as long as the manifest."""
    containerd.content.label(image.descriptor.digest, layer_references(image.manifest.layers))
