"""Image manifests, image indices and image configs: parsed once, every field checked, and written as Go does.

Deliberately not kept: unknown fields. Whoever must store or push a manifest unchanged keeps its bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from snapshotter.errors import InvalidIndex
from snapshotter.oci.descriptor import Descriptor, expect, optional, string_map
from snapshotter.oci.gojson import go_json, load_object
from snapshotter.oci.media_types import INDEX_TYPES, MANIFEST_TYPES, OCI_INDEX, OCI_MANIFEST
from snapshotter.units import Digest, parse_digest

__all__ = ["ImageConfig", "ImageIndex", "ImageManifest", "go_json", "parse", "parse_config"]

MAX_MANIFEST_SIZE = 4 << 20
"""What registries accept at most, and the OCI distribution specification's advice."""
MAX_CONFIG_SIZE = 8 << 20
"""Out of the air: configs with long histories reach some 100 KiB."""


@dataclass(frozen=True, slots=True)
class ImageManifest:
    """One platform's image, or an artifact of the same shape (a SOCI index)."""

    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    subject: Descriptor | None = None
    annotations: Mapping[str, str] = field(default_factory=dict, hash=False)
    artifact_type: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object in Go's field order, for `go_json`."""
        obj = _head(self.media_type, self.artifact_type)
        obj["config"] = self.config.to_json()
        obj["layers"] = [layer.to_json() for layer in self.layers]
        return obj | _tail(self.subject, self.annotations)


@dataclass(frozen=True, slots=True)
class ImageIndex:
    """A list of manifests: one per platform, or the referrers of one digest."""

    media_type: str
    manifests: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = field(default_factory=dict, hash=False)
    artifact_type: str = ""
    subject: Descriptor | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object in Go's field order, for `go_json`."""
        obj = _head(self.media_type, self.artifact_type)
        obj["manifests"] = [manifest.to_json() for manifest in self.manifests]
        return obj | _tail(self.subject, self.annotations)


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """What we need of an image's config."""

    architecture: str
    os: str
    variant: str
    diff_ids: tuple[Digest, ...]
    """Digests of the uncompressed layers, lowest layer first."""


def parse(data: bytes, media_type: str | None = None) -> ImageManifest | ImageIndex:
    """Return the manifest or index in `data`; `media_type` is what the sender calls it, if anybody did.

    Raises InvalidIndex, naming the field, for more than 4 MiB, broken JSON, an unknown or contradicting
    media type, and content that could be read as both a manifest and an index.
    """
    obj = load_object(data, limit=MAX_MANIFEST_SIZE, what="manifest")
    if optional(obj, "schemaVersion", int, 2, "manifest") != 2:
        raise InvalidIndex("manifest.schemaVersion: only version 2 is known")
    kind = _media_type(obj, media_type)
    common: dict[str, Any] = {
        "media_type": kind,
        "annotations": string_map(obj, "annotations", "manifest"),
        "artifact_type": optional(obj, "artifactType", str, "", "manifest"),
        "subject": _subject(obj),
    }
    if kind in INDEX_TYPES:
        return ImageIndex(manifests=_descriptors(obj, "manifests"), **common)
    config = Descriptor.from_json(obj.get("config"), "config")
    return ImageManifest(config=config, layers=_descriptors(obj, "layers"), **common)


def parse_config(data: bytes) -> ImageConfig:
    """Return the image config in `data`. Raises InvalidIndex naming the field."""
    obj = load_object(data, limit=MAX_CONFIG_SIZE, what="config")
    rootfs: dict[str, object] = optional(obj, "rootfs", dict, {}, "config")
    texts: list[object] = optional(rootfs, "diff_ids", list, [], "config.rootfs")
    return ImageConfig(
        architecture=optional(obj, "architecture", str, "", "config"),
        os=optional(obj, "os", str, "", "config"),
        variant=optional(obj, "variant", str, "", "config"),
        diff_ids=tuple(_digest(text, f"config.rootfs.diff_ids[{i}]") for i, text in enumerate(texts)),
    )


def _media_type(obj: Mapping[str, object], claimed: str | None) -> str:
    """Return the one media type that content, sender and shape agree on."""
    own = optional(obj, "mediaType", str, "", "manifest")
    if own and claimed and own != claimed:
        raise InvalidIndex(f"manifest.mediaType: {own!r}, but it was announced as {claimed!r}")
    kind = own or claimed or (OCI_INDEX if "manifests" in obj else OCI_MANIFEST)
    # A document that is both could be hashed as one and run as the other.
    foreign = {"layers", "config"} if kind in INDEX_TYPES else {"manifests"}
    if kind not in INDEX_TYPES | MANIFEST_TYPES:
        raise InvalidIndex(f"manifest.mediaType: {kind!r} is neither an image manifest nor an index")
    if foreign & obj.keys():
        raise InvalidIndex(f"manifest: {kind!r} with member {min(foreign & obj.keys())!r}")
    return kind


def _descriptors(obj: Mapping[str, object], key: str) -> tuple[Descriptor, ...]:
    values: list[object] = optional(obj, key, list, [], "manifest")
    return tuple(Descriptor.from_json(value, f"{key}[{i}]") for i, value in enumerate(values))


def _subject(obj: Mapping[str, object]) -> Descriptor | None:
    subject = obj.get("subject")
    return None if subject is None else Descriptor.from_json(subject, "subject")


def _digest(value: object, where: str) -> Digest:
    try:
        return parse_digest(expect(value, str, where))
    except ValueError as error:
        raise InvalidIndex(f"{where}: {error}") from None


def _head(media_type: str, artifact_type: str) -> dict[str, Any]:
    obj: dict[str, Any] = {"schemaVersion": 2}
    if media_type:
        obj["mediaType"] = media_type
    if artifact_type:
        obj["artifactType"] = artifact_type
    return obj


def _tail(subject: Descriptor | None, annotations: Mapping[str, str]) -> dict[str, Any]:
    obj: dict[str, Any] = {}
    if subject is not None:
        obj["subject"] = subject.to_json()
    if annotations:
        obj["annotations"] = dict(sorted(annotations.items()))
    return obj
