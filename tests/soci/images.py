"""Images of several platforms, as build tools push them: what `tests.support.images` does not make."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.images import LayerBlob, layer, sha256

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"


def noise(size: int, seed: int) -> bytes:
    """Return bytes that do not compress, always the same."""
    return random.Random(seed).randbytes(size)


class Blobs:
    """A directory in OCI layout that blobs are put into."""

    def __init__(self, layout: Path) -> None:
        self.layout = layout
        self._blobs = layout / "blobs/sha256"
        self._blobs.mkdir(parents=True, exist_ok=True)

    def put(self, data: bytes, media_type: str) -> dict[str, Any]:
        """Write a blob and return its descriptor."""
        (self._blobs / sha256(data).removeprefix("sha256:")).write_bytes(data)
        return {"mediaType": media_type, "digest": sha256(data), "size": len(data)}

    def put_json(self, obj: object, media_type: str) -> dict[str, Any]:
        """Write a document, as compact as Go writes it, and return its descriptor."""
        return self.put(json.dumps(obj, separators=(",", ":")).encode(), media_type)

    def put_manifest(self, layers: Sequence[LayerBlob], architecture: str) -> dict[str, Any]:
        """Write a whole image of one platform and return its manifest's descriptor."""
        for one in layers:
            one.copy_to(self._blobs / one.digest.removeprefix("sha256:"))
        rootfs = {"type": "layers", "diff_ids": [one.diff_id for one in layers]}
        config = {"architecture": architecture, "os": "linux", "rootfs": rootfs}
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": self.put_json(config, CONFIG),
            "layers": [one.descriptor() for one in layers],
        }
        return self.put_json(manifest, MANIFEST)

    def list(self, entry: Mapping[str, Any], *names: str) -> None:
        """Write index.json with `entry` under each of `names`."""
        key = "org.opencontainers.image.ref.name"
        entries = [{**entry, "annotations": {key: name}} for name in names]
        (self.layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
        (self.layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": entries}))


def multi_platform(layout: Path, platforms: Mapping[str, Sequence[LayerBlob]]) -> dict[str, Any]:
    """Write an image with a manifest per architecture and an attestation; return the descriptor of the list."""
    blobs = Blobs(layout)
    manifests = []
    for architecture, layers in platforms.items():
        manifest = blobs.put_manifest(layers, architecture)
        manifests.append({**manifest, "platform": {"architecture": architecture, "os": "linux"}})
    attestation = blobs.put_manifest([layer({"attestation": b"signed"})], "unknown")
    manifests.append({**attestation, "platform": {"architecture": "unknown", "os": "unknown"}})
    root = blobs.put_json({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}, INDEX)
    blobs.list(root, "latest")
    return root
