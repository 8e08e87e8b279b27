"""What containerd's labels on a Prepare say: which layer of which image. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from snapshotter.errors import UsageError
from snapshotter.oci.reference import Reference
from snapshotter.units import Digest, parse_digest

IMAGE_REF = "containerd.io/snapshot/cri.image-ref"
LAYER_DIGEST = "containerd.io/snapshot/cri.layer-digest"
LAYER_SIZE = "containerd.io/snapshot/remote/soci.size"
_MANIFEST_DIGEST = "containerd.io/snapshot/cri.manifest-digest"
_INDEX_DIGEST = "containerd.io/snapshot/remote/soci.index.digest"


@dataclass(frozen=True, slots=True)
class Asked:
    """What the labels of a Prepare say."""

    image: Reference
    """With the digest of its manifest."""
    manifest: Digest
    layer: Digest
    index: Digest | None

    @classmethod
    def from_labels(cls, labels: Mapping[str, str]) -> Asked | None:
        """Return what is asked, None when the labels of a remote snapshotter are missing or not well formed."""
        try:
            index = labels.get(_INDEX_DIGEST, "")
            manifest = parse_digest(labels[_MANIFEST_DIGEST])
            return cls(
                Reference.parse(labels[IMAGE_REF]).with_digest(manifest),
                manifest,
                parse_digest(labels[LAYER_DIGEST]),
                parse_digest(index) if index else None,
            )
        except (KeyError, ValueError, UsageError):
            return None
