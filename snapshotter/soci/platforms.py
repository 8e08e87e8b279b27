"""Which image manifests a command is about: one per platform that was asked for.

Attestations and SOCI indices stand in the same list as images do; they are never chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from snapshotter.errors import InvalidIndex, UsageError
from snapshotter.oci.descriptor import Descriptor, Platform
from snapshotter.oci.manifest import ImageConfig, ImageIndex, ImageManifest, parse, parse_config
from snapshotter.oci.media_types import MANIFEST_TYPES
from snapshotter.oci.platform import matches, normalise
from snapshotter.soci.content import ContentSource, read_verified

_UNKNOWN: Final = "unknown"
"""What build tools write as os and architecture of what is no image, such as an attestation."""


@dataclass(frozen=True, slots=True)
class PlatformImage:
    """One platform's image: its manifest, and the config that names its uncompressed layers."""

    platform: Platform
    descriptor: Descriptor
    """Of the manifest."""
    manifest: ImageManifest
    config: ImageConfig


def choose(index: ImageIndex, wanted: Platform, image: str) -> Descriptor:
    """Return the first manifest in `index` for the platform `wanted`; `image` is the name for messages.

    Entries that do not name a platform are left aside. Raises UsageError saying which platforms there are.
    """
    entries = [(entry, entry.platform) for entry in _images(index) if entry.platform is not None]
    for entry, platform in entries:
        if matches(wanted, platform):
            return entry
    raise no_such_platform(image, wanted, (platform for _, platform in entries))


def find_images(
    source: ContentSource, root: Descriptor, wanted: Sequence[Platform] | None, image: str
) -> list[PlatformImage]:
    """Return the images of the platforms `wanted`, or of every platform when it is None.

    `root` is what the name `image` points to. Raises UsageError for a platform that the image does not have,
    NotFound for a manifest that `source` does not hold, InvalidIndex and DigestMismatch for damaged ones.
    """
    document = parse(read_verified(source, root.digest), root.media_type or None)
    if isinstance(document, ImageManifest):
        found = [load_image(source, root)]
        known = [found[0].platform]
    else:
        entries = _images(document)
        found = [load_image(source, entry) for entry in entries if _concerns(entry, wanted)]
        known = [entry.platform for entry in entries if entry.platform] or [one.platform for one in found]
    if wanted is None:
        if not found:
            raise UsageError(f"image {image}: holds no image manifest")
        return found
    chosen: list[PlatformImage] = []
    for platform in wanted:
        match = next((one for one in found if matches(platform, one.platform)), None)
        if match is None:
            raise no_such_platform(image, platform, known)
        if match not in chosen:
            chosen.append(match)
    return chosen


def load_image(source: ContentSource, descriptor: Descriptor) -> PlatformImage:
    """Return the image whose manifest `descriptor` names.

    Raises NotFound, DigestMismatch, and InvalidIndex, also when manifest and config do not have as many layers.
    """
    manifest = parse(read_verified(source, descriptor.digest), descriptor.media_type or None)
    if not isinstance(manifest, ImageManifest):  # pragma: no cover - callers pass manifests alone
        raise InvalidIndex(f"manifest {descriptor.digest}: a list of manifests where an image was expected")
    config = parse_config(read_verified(source, manifest.config.digest))
    check_layer_count(descriptor.digest, manifest, config)
    return PlatformImage(descriptor.platform or image_platform(config), descriptor, manifest, config)


def check_layer_count(digest: str, manifest: ImageManifest, config: ImageConfig) -> None:
    """Raise InvalidIndex unless every layer of the manifest `digest` has its diffID in the config."""
    layers, diff_ids = len(manifest.layers), len(config.diff_ids)
    if layers != diff_ids:
        raise InvalidIndex(f"manifest {digest}: {layers} layers, but its config names {diff_ids} diffIDs")


def image_platform(config: ImageConfig) -> Platform:
    """Return the platform that an image says, in its config, it was made for."""
    return normalise(Platform(config.architecture, config.os, variant=config.variant))


def no_such_platform(image: str, wanted: Platform, have: Iterable[Platform]) -> UsageError:
    """Return the error that says what the image has instead."""
    names = ", ".join(sorted({str(platform) for platform in have})) or "no platform"
    return UsageError(f"image {image}: no manifest for platform {wanted}; it has {names}")


def _images(index: ImageIndex) -> list[Descriptor]:
    return [
        entry
        for entry in index.manifests
        if entry.media_type in MANIFEST_TYPES
        and not entry.artifact_type
        and not (entry.platform is not None and _UNKNOWN in {entry.platform.os, entry.platform.architecture})
    ]


def _concerns(entry: Descriptor, wanted: Sequence[Platform] | None) -> bool:
    """Say whether an entry must be read: it is asked for, or only its config can tell."""
    have = entry.platform
    return wanted is None or have is None or any(matches(platform, have) for platform in wanted)
