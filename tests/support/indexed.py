"""Indexed images in the fake registry: layers, their zTOCs and SOCI indices of every kind.

    with Registry() as registry:
        image = publish(registry, [make_tar({"a": b"A"})])
        found = ...  # the image at image.reference has a v1 index, image.indices[0]

The registry speaks for itself (tests/support/registry.py); what is here only decides what it holds.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from snapshotter.oci.descriptor import Descriptor
from snapshotter.oci.manifest import go_json
from snapshotter.oci.media_types import OCI_LAYER_GZIP, OCI_MANIFEST, OCTET_STREAM
from snapshotter.oci.reference import Reference
from snapshotter.soci.index import CONFIG_BLOB, INDEX_DIGEST, IndexVersion, LayerZtoc, SociIndex, build, parse
from snapshotter.units import Digest, sha256_digest
from snapshotter.ztoc.build import build as build_ztoc
from snapshotter.ztoc.model import Algorithm
from tests.support.registry import Image, Registry

CREATED = "org.opencontainers.image.created"
SPAN_SIZE = 1 << 16


@dataclass(frozen=True)
class Layer:
    """A gzip layer and its zTOC."""

    tar: bytes
    blob: bytes
    ztoc: bytes
    digest: Digest

    @property
    def ztoc_digest(self) -> Digest:
        """Digest of the zTOC itself."""
        return sha256_digest(self.ztoc)

    def descriptor(self) -> Descriptor:
        """Return the zTOC as an index lists it."""
        return self.entry().descriptor()

    def entry(self) -> LayerZtoc:
        """Return the layer's line in an index."""
        return LayerZtoc(self.digest, OCI_LAYER_GZIP, self.ztoc_digest, len(self.ztoc), SPAN_SIZE)


@dataclass
class IndexedImage:
    """An image in the registry, with the layers and indices that belong to it."""

    registry: Registry
    image: Image
    layers: tuple[Layer, ...]
    indices: list[SociIndex] = field(default_factory=list)

    @property
    def reference(self) -> Reference:
        """The image by tag and digest, as labels name it."""
        return Reference.parse(self.image.name).with_digest(self.image.digest)

    def add_v1(
        self, layers: Sequence[Layer] | None = None, *, created: str = "", tool: str = "t"
    ) -> SociIndex:
        """Push a v1 index of `layers` (all of the image's) that refers to the image."""
        subject = Descriptor(OCI_MANIFEST, self.image.digest, len(self.image.manifest))
        annotations = {CREATED: created} if created else {}
        index = make_index(
            self.layers if layers is None else layers, subject=subject, annotations=annotations, tool=tool
        )
        put_index(self.registry, self.image.repository, index, self.layers if layers is None else layers)
        self.indices.append(index)
        return index

    def labels(self, layer: int = 0) -> dict[str, str]:
        """Return what containerd says in the Prepare of a layer."""
        return {
            "containerd.io/snapshot.ref": f"sha256:chain-{layer}",
            "containerd.io/snapshot/cri.image-ref": self.image.name,
            "containerd.io/snapshot/cri.manifest-digest": self.image.digest,
            "containerd.io/snapshot/cri.layer-digest": self.layers[layer].digest,
        }


def make_indexed_layer(tar: bytes, *, tool: str = "t", span_size: int = SPAN_SIZE) -> Layer:
    """Return the gzip layer of `tar` with its zTOC, to which `tool` gives another digest."""
    blob = gzip.compress(tar, 6, mtime=0)
    built = build_ztoc([blob], algorithm=Algorithm.GZIP, span_size=span_size, build_tool=tool)
    return Layer(tar, blob, built.data, built.layer_digest)


def make_index(
    layers: Sequence[Layer],
    *,
    version: IndexVersion = IndexVersion.V1,
    subject: Descriptor | None = None,
    annotations: Mapping[str, str] | None = None,
    tool: str = "t",
) -> SociIndex:
    """Return an index of `layers`; `annotations` are added to its own."""
    index = build(version, [layer.entry() for layer in layers], build_tool=tool, subject=subject)
    if not annotations:
        return index
    obj = json.loads(index.data)
    obj["annotations"] = dict(sorted((obj["annotations"] | dict(annotations)).items()))
    return parse(go_json(obj))


def put_index(registry: Registry, repository: str, index: SociIndex, layers: Sequence[Layer]) -> None:
    """Store an index and the zTOCs of `layers`."""
    registry.add_blob(CONFIG_BLOB, repository=repository)
    for layer in layers:
        registry.add_blob(layer.ztoc, repository=repository)
    registry.add_manifest(index.data, repository=repository)


def publish(
    registry: Registry,
    tars: Sequence[bytes],
    *,
    repository: str = "app",
    version: IndexVersion | None = IndexVersion.V1,
    indexed: Sequence[int] | None = None,
    span_size: int = SPAN_SIZE,
) -> IndexedImage:
    """Store an image of `tars` and an index of its layers at the positions `indexed` (all); None: no index."""
    layers = tuple(make_indexed_layer(tar, span_size=span_size) for tar in tars)
    chosen = layers if indexed is None else [layers[position] for position in indexed]
    annotations: dict[str, str] = {}
    indices = []
    if version is IndexVersion.V2:
        indices.append(make_index(chosen, version=version))
        put_index(registry, repository, indices[0], chosen)
        annotations[INDEX_DIGEST] = indices[0].digest
    image = registry.add_image(
        [layer.blob for layer in layers], repository=repository, annotations=annotations
    )
    found = IndexedImage(registry, image, layers, indices)
    if version is IndexVersion.V1:
        found.add_v1(chosen)
    return found


def octets(data: bytes) -> Descriptor:
    """Return the descriptor of a blob of any bytes."""
    return Descriptor(OCTET_STREAM, sha256_digest(data), len(data))
