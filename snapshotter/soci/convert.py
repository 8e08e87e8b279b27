"""Converting an image: each platform's manifest gets a link to its v2 SOCI index, and both stand in one image index.

The converted image is a new one; the old one stays as it is. What was not asked for is carried over byte for byte:
other platforms, their SOCI indices, attestations. Of an attestation only the annotation that says which manifest it
is about follows that manifest. Layers and configs, hence image IDs, are those of the source.

Owns nothing. Everything that is written goes to an artifact store, a document after all that it names.
Concurrency: as `IndexBuilder`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from snapshotter.oci.descriptor import Descriptor, Platform
from snapshotter.oci.manifest import ImageIndex, ImageManifest, go_json, parse
from snapshotter.oci.media_types import OCI_CONFIG, OCI_INDEX, OCI_MANIFEST, SOCI_INDEX_V2
from snapshotter.oci.platform import normalise
from snapshotter.soci.content import ArtifactStore, ContentSource, read_verified
from snapshotter.soci.create import GC_CONTENT, CreatedIndex, IndexBuilder
from snapshotter.soci.index import IMAGE_MANIFEST_DIGEST, INDEX_DIGEST, IndexVersion, SociIndex
from snapshotter.soci.platforms import PlatformImage, find_images
from snapshotter.units import Digest, sha256_digest

ATTESTED: Final = "vnd.docker.reference.digest"
"""On an attestation in a list of manifests: the digest of the image manifest that it is about."""


@dataclass(frozen=True, slots=True)
class ConvertedPlatform:
    """One platform of the new image: its SOCI index, and the manifest that points to it."""

    platform: Platform
    created: CreatedIndex
    manifest: ImageManifest
    data: bytes
    """The manifest's bytes."""

    @property
    def digest(self) -> Digest:
        """The manifest's digest."""
        return sha256_digest(self.data)

    @property
    def soci_descriptor(self) -> Descriptor:
        """The SOCI index as the image's list of manifests has it."""
        index = self.created.index
        return Descriptor(
            OCI_MANIFEST,
            index.digest,
            len(index.data),
            {IMAGE_MANIFEST_DIGEST: str(self.digest)},
            platform=self.platform,
            artifact_type=SOCI_INDEX_V2,
        )


@dataclass(frozen=True, slots=True)
class ConvertedImage:
    """The new image: what a name for it must point to, and what was converted."""

    root: Descriptor
    index: ImageIndex
    platforms: tuple[ConvertedPlatform, ...]
    skipped: tuple[Platform, ...]
    """Platforms of which no layer can be indexed; they are as they were."""


def convert(
    source: ContentSource,
    store: ArtifactStore,
    builder: IndexBuilder,
    root: Descriptor,
    wanted: Sequence[Platform] | None,
    image: str,
) -> ConvertedImage:
    """Convert the platforms `wanted` (all for None) of the image `root`, which `image` names in messages.

    Raises UsageError for a platform that is not there and when nothing can be indexed; else as `IndexBuilder.make`.
    """
    document = parse(read_verified(source, root.digest), root.media_type or None)
    images = find_images(source, root, wanted, image)
    converted: dict[Digest, ConvertedPlatform] = {}
    skipped: list[Platform] = []
    for one in images:
        created = builder.make(one, IndexVersion.V2)
        if created is None:
            skipped.append(one.platform)
        else:
            converted[one.descriptor.digest] = _link(one, created)
    if not converted:
        raise builder.nothing_indexed()
    for done in converted.values():
        store.write(done.data, labels=manifest_labels(done.manifest))
    if isinstance(document, ImageManifest):
        listing = ImageIndex(OCI_INDEX, (replace(root, platform=images[0].platform),))
    else:
        listing = replace(document, media_type=OCI_INDEX)
    new = replace(listing, manifests=_entries(listing.manifests, converted))
    data = go_json(new.to_json())
    target = Descriptor(OCI_INDEX, store.write(data, labels=index_labels(new)), len(data))
    for done in converted.values():
        builder.remember(done.created.index, done.platform, target.digest, done.digest)
    return ConvertedImage(target, new, tuple(converted.values()), tuple(skipped))


def manifest_labels(manifest: ImageManifest) -> dict[str, str]:
    """Return what tells containerd's garbage collector which content an image manifest needs."""
    labels = {f"{GC_CONTENT}.config": str(manifest.config.digest)}
    return labels | {f"{GC_CONTENT}.l.{n}": str(layer.digest) for n, layer in enumerate(manifest.layers)}


def index_labels(index: ImageIndex) -> dict[str, str]:
    """Return what tells containerd's garbage collector which content an image index needs."""
    return {f"{GC_CONTENT}.m.{n}": str(entry.digest) for n, entry in enumerate(index.manifests)}


def _link(image: PlatformImage, created: CreatedIndex) -> ConvertedPlatform:
    """Return the image's manifest in OCI form, pointing to its index."""
    index: SociIndex = created.index
    manifest = replace(
        image.manifest,
        media_type=OCI_MANIFEST,
        config=replace(image.manifest.config, media_type=OCI_CONFIG),
        annotations={**image.manifest.annotations, INDEX_DIGEST: str(index.digest)},
    )
    return ConvertedPlatform(image.platform, created, manifest, go_json(manifest.to_json()))


def _entries(
    entries: Sequence[Descriptor], converted: Mapping[Digest, ConvertedPlatform]
) -> tuple[Descriptor, ...]:
    """Return the list of the new image: every entry in its place, new SOCI indices behind them.

    Runtimes take the first entry of their platform, so an index must never stand before its image.
    """
    new: list[Descriptor] = []
    indices = {normalise(one.platform): one.soci_descriptor for one in converted.values()}
    for entry in entries:
        done = converted.get(entry.digest)
        if done is not None:
            new.append(_image_entry(entry, done))
        elif entry.artifact_type == SOCI_INDEX_V2 and entry.platform is not None:
            new.append(indices.pop(normalise(entry.platform), entry))
        else:
            new.append(_follow(entry, converted))
    return (*new, *indices.values())


def _image_entry(entry: Descriptor, done: ConvertedPlatform) -> Descriptor:
    return replace(
        entry,
        media_type=OCI_MANIFEST,
        digest=done.digest,
        size=len(done.data),
        annotations=done.manifest.annotations,
        platform=entry.platform or done.platform,
        data="",
    )


def _follow(entry: Descriptor, converted: Mapping[Digest, ConvertedPlatform]) -> Descriptor:
    """Return an entry that was not asked for, its word on which manifest it is about brought up to date."""
    about = entry.annotations.get(ATTESTED)
    done = None if about is None else converted.get(Digest(about))
    if done is None:
        return entry
    return replace(entry, annotations={**entry.annotations, ATTESTED: str(done.digest)})
