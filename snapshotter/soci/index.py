"""The SOCI index: which zTOC belongs to which layer of an image.

An index is an OCI image manifest of a fixed shape. Its bytes are its identity: other tools parse an index, write
it again and compare digests, so `build` emits exactly what Go's encoder would, and a `SociIndex` keeps the bytes
it was made from. Whoever stores or pushes an index uses those, never a second encoding.

Pure: bytes in, values out. Finding an index in a registry is not done here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final

from snapshotter.errors import InvalidIndex
from snapshotter.oci.descriptor import Descriptor
from snapshotter.oci.manifest import ImageManifest, go_json
from snapshotter.oci.manifest import parse as parse_manifest
from snapshotter.oci.media_types import (
    EMPTY_JSON,
    EMPTY_JSON_DIGEST,
    OCI_MANIFEST,
    OCTET_STREAM,
    SOCI_INDEX_V1,
    SOCI_INDEX_V2,
    SOCI_PREFETCH,
)
from snapshotter.units import Digest, parse_digest, sha256_digest

LAYER_DIGEST: Final = "com.amazon.soci.image-layer-digest"
LAYER_MEDIA_TYPE: Final = "com.amazon.soci.image-layer-mediaType"
SPAN_SIZE: Final = "com.amazon.soci.span-size"
DISABLE_XATTRS: Final = "com.amazon.soci.disable-xattrs"
BUILD_TOOL: Final = "com.amazon.soci.build-tool-identifier"
INDEX_DIGEST: Final = "com.amazon.soci.index-digest"
"""On an image manifest: the digest of its v2 index."""
IMAGE_MANIFEST_DIGEST: Final = "com.amazon.soci.image-manifest-digest"
"""On a v2 index in a list of manifests: the digest of the image manifest that points to it."""

CONFIG_BLOB: Final = EMPTY_JSON
"""The config of every SOCI index; a registry refuses the index as long as it does not have this blob."""


class IndexVersion(IntEnum):
    """v1 points to its image with `subject`; a v2 index is pointed to by the image."""

    V1 = 1
    V2 = 2

    @property
    def media_type(self) -> str:
        """The media type of the index's config, the only place that tells the version."""
        return _CONFIG_TYPES[self]


_CONFIG_TYPES: Final = {IndexVersion.V1: SOCI_INDEX_V1, IndexVersion.V2: SOCI_INDEX_V2}
_VERSIONS: Final = {media_type: version for version, media_type in _CONFIG_TYPES.items()}


@dataclass(frozen=True, slots=True)
class LayerZtoc:
    """A zTOC and the layer it describes, as an index lists them."""

    layer: Digest
    layer_media_type: str
    ztoc: Digest
    ztoc_size: int
    span_size: int | None
    """Bytes of tar per span; None where the builder did not say (indices before 0.5 do not)."""
    disable_xattrs: bool = False

    def descriptor(self) -> Descriptor:
        """Return the descriptor that stands in the index."""
        annotations = {LAYER_DIGEST: str(self.layer), LAYER_MEDIA_TYPE: self.layer_media_type}
        if self.span_size is not None:
            annotations[SPAN_SIZE] = str(self.span_size)
        if self.disable_xattrs:
            annotations[DISABLE_XATTRS] = "true"
        return Descriptor(OCTET_STREAM, self.ztoc, self.ztoc_size, annotations)


@dataclass(frozen=True, slots=True)
class SociIndex:
    """One SOCI index, parsed, together with the bytes it is known by."""

    version: IndexVersion
    ztocs: tuple[LayerZtoc, ...]
    """In the order of the image's layers; a layer that is not indexed is absent."""
    prefetch: tuple[tuple[Digest, Descriptor], ...]
    """Prefetch artifacts by layer digest, in the order of the index."""
    subject: Descriptor | None
    annotations: Mapping[str, str] = field(hash=False)
    data: bytes = field(repr=False)
    digest: Digest

    @property
    def descriptor(self) -> Descriptor:
        """The index as registries list it among the referrers of an image."""
        return Descriptor(
            OCI_MANIFEST,
            self.digest,
            len(self.data),
            self.annotations,
            artifact_type=self.version.media_type,
        )

    @property
    def build_tool(self) -> str:
        """What made the index; empty when it does not say."""
        return self.annotations.get(BUILD_TOOL, "")

    def ztoc_for(self, layer: Digest) -> Descriptor | None:
        """Return the descriptor of the layer's zTOC, or None when the layer is not indexed."""
        for entry in self.ztocs:
            if entry.layer == layer:
                return entry.descriptor()
        return None

    def prefetch_for(self, layer: Digest) -> Descriptor | None:
        """Return the descriptor of the layer's prefetch artifact, or None when it has none."""
        return dict(self.prefetch).get(layer)


def build(
    version: IndexVersion,
    ztocs: Sequence[LayerZtoc],
    *,
    build_tool: str,
    subject: Descriptor | None = None,
    prefetch: Sequence[Descriptor] = (),
) -> SociIndex:
    """Return the index that lists `ztocs` and prefetch artifacts, which are in the order of the image's layers.

    `subject` is the image manifest of a v1 index; only its media type, digest and size go in.
    """
    layers = [entry.to_json() for entry in (*(one.descriptor() for one in ztocs), *prefetch)]
    obj: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": Descriptor(version.media_type, EMPTY_JSON_DIGEST, len(EMPTY_JSON)).to_json(),
        "layers": layers,
    }
    if subject is not None:
        obj["subject"] = Descriptor(subject.media_type, subject.digest, subject.size).to_json()
    obj["annotations"] = {BUILD_TOOL: build_tool}
    return parse(go_json(obj))


def parse(data: bytes) -> SociIndex:
    """Return the index in `data`. Raises InvalidIndex, naming field and reason, for anything else."""
    manifest = parse_manifest(data, OCI_MANIFEST)
    if not isinstance(manifest, ImageManifest):  # pragma: no cover - the media type above rules it out
        raise InvalidIndex("manifest: a list of manifests, not a SOCI index")
    version = _VERSIONS.get(manifest.config.media_type)
    if version is None:
        raise InvalidIndex(
            f"config.mediaType: {manifest.config.media_type!r} is not the type of a SOCI index"
            f" ({SOCI_INDEX_V1} or {SOCI_INDEX_V2})"
        )
    ztocs: list[LayerZtoc] = []
    prefetch: list[tuple[Digest, Descriptor]] = []
    for position, descriptor in enumerate(manifest.layers):
        where = f"layers[{position}]"
        layer = _layer_digest(descriptor, where)
        if descriptor.media_type == OCTET_STREAM:
            ztocs.append(_layer_ztoc(layer, descriptor, where))
        elif descriptor.media_type == SOCI_PREFETCH:
            prefetch.append((layer, descriptor))
        else:
            raise InvalidIndex(f"{where}.mediaType: {descriptor.media_type!r} is no SOCI artifact")
    _refuse_contradictions(ztocs)
    return SociIndex(
        version=version,
        ztocs=tuple(ztocs),
        prefetch=tuple(prefetch),
        subject=manifest.subject,
        annotations=manifest.annotations,
        data=data,
        digest=sha256_digest(data),
    )


def _layer_digest(descriptor: Descriptor, where: str) -> Digest:
    text = descriptor.annotations.get(LAYER_DIGEST)
    if text is None:
        raise InvalidIndex(f"{where}: no annotation {LAYER_DIGEST}")
    try:
        return parse_digest(text)
    except ValueError as error:
        raise InvalidIndex(f"{where}.annotations[{LAYER_DIGEST!r}]: {error}") from None


def _layer_ztoc(layer: Digest, descriptor: Descriptor, where: str) -> LayerZtoc:
    text = descriptor.annotations.get(SPAN_SIZE)
    if text is not None and not (text.isascii() and text.isdigit() and len(text) < 20):
        raise InvalidIndex(f"{where}.annotations[{SPAN_SIZE!r}]: {text!r} is not a size")
    return LayerZtoc(
        layer=layer,
        layer_media_type=descriptor.annotations.get(LAYER_MEDIA_TYPE, ""),
        ztoc=descriptor.digest,
        ztoc_size=descriptor.size,
        span_size=None if text is None else int(text),
        disable_xattrs=descriptor.annotations.get(DISABLE_XATTRS) == "true",
    )


def _refuse_contradictions(ztocs: Sequence[LayerZtoc]) -> None:
    """An image may hold one layer twice, but a layer has one zTOC."""
    seen: dict[Digest, Digest] = {}
    for entry in ztocs:
        if seen.setdefault(entry.layer, entry.ztoc) != entry.ztoc:
            raise InvalidIndex(f"layers: two different zTOCs for layer {entry.layer}")
