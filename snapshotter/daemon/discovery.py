"""Finding the SOCI index of an image: on this host, or in the registry that has the image.

In order: the index that the client names (a label); the one that the image manifest names (v2, an annotation);
the one that names the image (v1, by the referrers API or its fallback tag). A v2 annotation that leads nowhere
falls back to v1: a copy tool that lost the index is no reason to pull an image in full. Of several v1 indices
the newest whose layers are the image's is taken, and the log says which and why.

Owns nothing. What it returns has been verified by digest; what it could not find is NoIndex, what it could
not ask is a RegistryError.

Concurrency: trio; each call stands alone.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import trio

from snapshotter.daemon.localcontent import Artifacts
from snapshotter.errors import BlobNotFound, CorruptData, InvalidIndex, NoIndex, RegistryError
from snapshotter.oci.descriptor import Descriptor
from snapshotter.oci.manifest import ImageManifest
from snapshotter.oci.manifest import parse as parse_manifest
from snapshotter.oci.media_types import SOCI_INDEX_V1
from snapshotter.oci.reference import Reference
from snapshotter.soci.index import INDEX_DIGEST, SociIndex
from snapshotter.soci.index import parse as parse_index
from snapshotter.units import Digest, parse_digest

_log = logging.getLogger(__name__)

_CREATED = "org.opencontainers.image.created"

_MAX_CANDIDATES = 8
"""Indices of one image that are looked at; whoever pushed more meant the newest."""


@dataclass(frozen=True, slots=True)
class Modes:
    """Which of the two ways of linking are looked for; an index named by the client is always used."""

    v1: bool
    v2: bool


@dataclass(frozen=True, slots=True)
class Found:
    """An image with its SOCI index, both with their verified bytes."""

    manifest: ImageManifest
    manifest_data: bytes
    index: SociIndex
    how: str
    """`explicit`, `v2` or `v1`."""


async def image_manifest(artifacts: Artifacts, image: Reference) -> tuple[ImageManifest, bytes]:
    """Return the manifest at `image.digest`. Raises RegistryError, InvalidIndex (also for a list of images)."""
    descriptor, data = await artifacts.manifest(image)
    manifest = parse_manifest(data, descriptor.media_type)
    if not isinstance(manifest, ImageManifest):
        raise InvalidIndex(f"{image} is a list of images, not the image of one platform")
    return manifest, data


async def find_index(
    artifacts: Artifacts, image: Reference, *, explicit: Digest | None, modes: Modes
) -> Found:
    """Return the index of `image` (a reference with a digest). Raises NoIndex, RegistryError, InvalidIndex."""
    if explicit is None and not (modes.v1 or modes.v2):
        raise NoIndex(f"{image}: all lazy pull modes are disabled")
    manifest, data = await image_manifest(artifacts, image)
    if explicit is not None:
        return Found(manifest, data, await _index_at(artifacts, image, explicit), "explicit")
    if modes.v2:
        index = await _by_annotation(artifacts, image, manifest)
        if index is not None:
            return Found(manifest, data, index, "v2")
    if modes.v1:
        return Found(manifest, data, await _by_referrers(artifacts, image, manifest), "v1")
    raise NoIndex(f"{image} has no SOCI index (v2), and v1 is disabled")


async def _index_at(artifacts: Artifacts, image: Reference, digest: Digest) -> SociIndex:
    try:
        _descriptor, data = await artifacts.manifest(image.with_digest(digest))
    except BlobNotFound as error:
        raise NoIndex(f"{image}: its SOCI index {digest} is not in the registry") from error
    return parse_index(data)


async def _by_annotation(artifacts: Artifacts, image: Reference, manifest: ImageManifest) -> SociIndex | None:
    named = manifest.annotations.get(INDEX_DIGEST)
    if named is None:
        return None
    try:
        return await _index_at(artifacts, image, parse_digest(named))
    except (NoIndex, CorruptData, ValueError) as error:
        _log.warning(
            "the image names a SOCI index that cannot be used; looking for a v1 index",
            extra={"image": str(image), "index": named, "error": str(error)},
        )
        return None


async def _by_referrers(artifacts: Artifacts, image: Reference, manifest: ImageManifest) -> SociIndex:
    candidates = _newest_first(await artifacts.referrers(image, SOCI_INDEX_V1))[:_MAX_CANDIDATES]
    found: list[SociIndex | RegistryError | None] = [None] * len(candidates)

    async def load(position: int, descriptor: Descriptor) -> None:
        try:
            found[position] = await _index_at(artifacts, image, descriptor.digest)
        except (NoIndex, CorruptData) as error:
            _log.warning("a v1 SOCI index cannot be used", extra={"image": str(image), "error": str(error)})
        except RegistryError as error:
            found[position] = error

    async with trio.open_nursery() as nursery:
        for position, descriptor in enumerate(candidates):
            nursery.start_soon(load, position, descriptor)
    for index in found:
        if isinstance(index, RegistryError):
            raise index  # it may be the right one: an older one must not be taken for good in its place
        if index is not None and _fits(index, manifest):
            if len(candidates) > 1:
                _log.info(
                    "several v1 SOCI indices; the newest whose layers match is used",
                    extra={"image": str(image), "index": index.digest, "candidates": len(candidates)},
                )
            return index
    raise NoIndex(f"{image} has no SOCI index: {len(candidates)} v1 referrers, none of them of its layers")


def _newest_first(descriptors: tuple[Descriptor, ...]) -> list[Descriptor]:
    """Order by creation time where it is told; else what was pushed last stands last in the list."""
    ranked = sorted(enumerate(descriptors), key=lambda item: (item[1].annotations.get(_CREATED, ""), item[0]))
    return [descriptor for _position, descriptor in reversed(ranked)]


def _fits(index: SociIndex, manifest: ImageManifest) -> bool:
    layers = {layer.digest for layer in manifest.layers}
    return bool(index.ztocs) and all(each.layer in layers for each in index.ztocs)
