"""Pulling an image into containerd so that a remote snapshotter can do its work: what containerd's own client leaves out.

Order: manifests and config into the content store, with the labels by which containerd's garbage collector finds
what belongs to them; a snapshot per layer; the image record last. Everything happens under a lease, so a pull that
ends early, however it ends, leaves nothing that is not collected.

Also a full pull, with an ordinary snapshotter: the same steps without the remote labels.

Concurrency: `pull` is one trio task and what it starts; several pulls may run beside each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Final

import trio

from snapshotter.cli.labels import remote_labels
from snapshotter.cli.unpack import Outcome, UnpackedLayer, Unpacker, chain_ids
from snapshotter.containerd.client import Containerd
from snapshotter.containerd.labels import GC_CONTENT, layer_references, source_label
from snapshotter.download.downloads import DEFAULT_CONCURRENCY, Downloads, Limits
from snapshotter.errors import InvalidIndex
from snapshotter.oci.descriptor import Descriptor, Platform
from snapshotter.oci.manifest import (
    MAX_CONFIG_SIZE,
    ImageConfig,
    ImageIndex,
    ImageManifest,
    parse,
    parse_config,
)
from snapshotter.oci.platform import host_platform, matches
from snapshotter.oci.reference import Reference
from snapshotter.registry.client import RegistryClient
from snapshotter.soci.platforms import check_layer_count, choose, image_platform, no_such_platform
from snapshotter.units import Digest

LOCAL_SNAPSHOTTERS: Final = frozenset(
    {"overlayfs", "native", "btrfs", "zfs", "aufs", "devmapper", "blockfile", "erofs"}
)
"""Those built into containerd, to which a remote snapshotter's labels mean nothing."""
_GC_SNAPSHOT: Final = "containerd.io/gc.ref.snapshot"


@dataclass(frozen=True, slots=True)
class PullOptions:
    """How to pull."""

    snapshotter: str = "soci"
    platform: Platform = field(default_factory=host_platform)
    index_digest: Digest | None = None
    """The SOCI index to use; None leaves finding one to the snapshotter."""
    concurrency: int = DEFAULT_CONCURRENCY
    """Ranges of layers that are downloaded at once, where any are."""


@dataclass(frozen=True, slots=True)
class PulledImage:
    """An image that containerd has now."""

    name: str
    target: Descriptor
    """What the name points to."""
    manifest: Descriptor
    """Of the platform."""
    layers: tuple[UnpackedLayer, ...]

    def count(self, outcome: Outcome) -> int:
        """Return how many layers came to be in this way."""
        return sum(layer.outcome is outcome for layer in self.layers)


@dataclass(frozen=True, slots=True)
class _Documents:
    """The image as the registry describes it, bytes included: they are stored as they are."""

    root: Descriptor
    root_data: bytes
    index: ImageIndex | None
    """The root, where it is a list of manifests."""
    descriptor: Descriptor
    data: bytes
    manifest: ImageManifest
    config_data: bytes
    config: ImageConfig


async def pull(
    reference: Reference,
    *,
    containerd: Containerd,
    registry: RegistryClient,
    options: PullOptions = PullOptions(),
    report: Callable[[str], None] = lambda _: None,
) -> PulledImage:
    """Pull one platform of an image and return what became of each layer; `report` is given lines for a human.

    Raises UsageError (no such platform, snapshotter not configured), RegistryError, CorruptData and others.
    """
    documents = await _fetch_documents(reference, registry, options.platform)
    count, size = len(documents.manifest.layers), sum(layer.size for layer in documents.manifest.layers)
    report(f"{reference}: manifest {documents.descriptor.digest}, {count} layers, {_human(size)}")
    with containerd.lease() as leased:
        await trio.to_thread.run_sync(_store_documents, reference, leased, documents)
        layers = await _unpack(reference, documents, leased, registry, options, report)
        await trio.to_thread.run_sync(_finish, reference, leased, documents, options)
    image = PulledImage(str(reference), documents.root, documents.descriptor, tuple(layers))
    counts = (f"{image.count(outcome)} {outcome.value}" for outcome in Outcome)
    report(f"{reference}: done by {options.snapshotter}: {', '.join(counts)}")
    return image


async def _fetch_documents(reference: Reference, registry: RegistryClient, wanted: Platform) -> _Documents:
    root, root_data = await registry.manifest(reference)
    document = parse(root_data, root.media_type or None)
    descriptor, data, index = root, root_data, None
    if isinstance(document, ImageIndex):
        index = document
        chosen = choose(index, wanted, str(reference))
        _, data = await registry.manifest(reference.with_digest(chosen.digest))
        descriptor = Descriptor(chosen.media_type, chosen.digest, len(data))
        document = parse(data, chosen.media_type or None)
    if not isinstance(document, ImageManifest):
        raise InvalidIndex(f"image {reference}: {descriptor.digest} is a list inside a list of manifests")
    config_data = await registry.blob(reference, document.config, max_size=MAX_CONFIG_SIZE)
    config = parse_config(config_data)
    check_layer_count(descriptor.digest, document, config)
    if index is None and not matches(wanted, image_platform(config)):
        raise no_such_platform(str(reference), wanted, [image_platform(config)])
    return _Documents(root, root_data, index, descriptor, data, document, config_data, config)


def _store_documents(reference: Reference, containerd: Containerd, documents: _Documents) -> None:
    """Put config, manifest and list into the content store, what is referred to before what refers."""
    source = source_label(reference)
    manifest = documents.manifest
    references = {f"{GC_CONTENT}.config": str(manifest.config.digest)}
    references |= layer_references(manifest.layers)
    containerd.content.write(documents.config_data, labels=source)
    containerd.content.write(documents.data, labels=source | references)
    if documents.index is not None:
        children = {
            f"{GC_CONTENT}.m.{i}": str(child.digest) for i, child in enumerate(documents.index.manifests)
        }
        containerd.content.write(documents.root_data, labels=source | children)


async def _unpack(
    reference: Reference,
    documents: _Documents,
    containerd: Containerd,
    registry: RegistryClient,
    options: PullOptions,
    report: Callable[[str], None],
) -> list[UnpackedLayer]:
    layers = documents.manifest.layers

    def labels(position: int) -> Mapping[str, str]:
        if options.snapshotter in LOCAL_SNAPSHOTTERS:
            return {}
        return remote_labels(
            str(reference), documents.descriptor.digest, layers[position:], options.index_digest
        )

    def report_layer(position: int, layer: UnpackedLayer) -> None:
        report(
            f"layer {position + 1}/{len(layers)} {layer.layer.digest} {_human(layer.layer.size)}:"
            f" {layer.outcome.value} ({layer.seconds:.2f} s)"
        )

    downloads = Downloads(
        reference,
        registry,
        containerd.content,
        limits=Limits(connections=options.concurrency),
        labels=source_label(reference),
    )
    with closing(downloads):
        unpacker = Unpacker(containerd, options.snapshotter, downloads, labels=labels, report=report_layer)
        return await unpacker.unpack(layers, documents.config.diff_ids)


def _finish(
    reference: Reference, containerd: Containerd, documents: _Documents, options: PullOptions
) -> None:
    """Tie the snapshots to the config, so that they live as long as the image, and name the image."""
    chain = chain_ids(documents.config.diff_ids)
    if chain:
        label = {f"{_GC_SNAPSHOT}.{options.snapshotter}": str(chain[-1])}
        containerd.content.label(documents.manifest.config.digest, label)
    containerd.images.put(str(reference), documents.root)


def _human(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
