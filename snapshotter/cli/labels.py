"""The labels on a snapshot that tell a remote snapshotter which layer of which image it stands for.

Pure. The first five are containerd's convention, known to every remote snapshotter; the rest are SOCI's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from snapshotter.oci.descriptor import Descriptor
from snapshotter.units import Digest

SNAPSHOT_REF: Final = "containerd.io/snapshot.ref"
"""The chain ID that the snapshot will be known by: its presence says "this is an image layer"."""
IMAGE_REF: Final = "containerd.io/snapshot/cri.image-ref"
MANIFEST_DIGEST: Final = "containerd.io/snapshot/cri.manifest-digest"
LAYER_DIGEST: Final = "containerd.io/snapshot/cri.layer-digest"
IMAGE_LAYERS: Final = "containerd.io/snapshot/cri.image-layers"
LAYER_SIZE: Final = "containerd.io/snapshot/remote/soci.size"
LAYERS_SIZE: Final = "containerd.io/snapshot/remote/image.layers.size"
INDEX_DIGEST: Final = "containerd.io/snapshot/remote/soci.index.digest"

MAX_LABEL_SIZE: Final = 4096
"""Bytes of a label's key and value together; containerd refuses more."""


def remote_labels(
    image: str, manifest: Digest, layers: Sequence[Descriptor], index: Digest | None
) -> dict[str, str]:
    """Return the labels for `layers[0]`; the others are the layers above it, `image` the reference they come from.

    `index` is the SOCI index to use, where the user named one. Lists are cut where they would become too long.
    """
    labels = {
        IMAGE_REF: image,
        MANIFEST_DIGEST: str(manifest),
        LAYER_DIGEST: str(layers[0].digest),
        IMAGE_LAYERS: _joined(IMAGE_LAYERS, (layer.digest for layer in layers)),
        LAYER_SIZE: str(layers[0].size),
        LAYERS_SIZE: _joined(LAYERS_SIZE, (str(layer.size) for layer in layers)),
    }
    if index is not None:
        labels[INDEX_DIGEST] = str(index)
    return labels


def _joined(key: str, values: Iterable[str]) -> str:
    """Return as many of `values`, from the first, as fit into a label `key`."""
    text = ""
    for value in values:
        longer = f"{text},{value}" if text else value
        if len(key) + len(longer) > MAX_LABEL_SIZE:
            break
        text = longer
    return text
