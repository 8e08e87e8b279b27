"""The media types of images and SOCI artifacts, and what a layer's media type says about its compression."""

from __future__ import annotations

from typing import Final, Literal

from snapshotter.errors import UnsupportedLayer
from snapshotter.units import Digest

OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG: Final = "application/vnd.oci.image.config.v1+json"
OCI_LAYER: Final = "application/vnd.oci.image.layer.v1.tar"
OCI_LAYER_GZIP: Final = OCI_LAYER + "+gzip"
OCI_LAYER_ZSTD: Final = OCI_LAYER + "+zstd"
OCI_NONDISTRIBUTABLE: Final = "application/vnd.oci.image.layer.nondistributable.v1.tar"
DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG: Final = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER: Final = "application/vnd.docker.image.rootfs.diff.tar"
DOCKER_LAYER_GZIP: Final = DOCKER_LAYER + ".gzip"
DOCKER_LAYER_ZSTD: Final = DOCKER_LAYER + ".zstd"
DOCKER_FOREIGN: Final = "application/vnd.docker.image.rootfs.foreign.diff.tar"
OCTET_STREAM: Final = "application/octet-stream"
SOCI_INDEX_V1: Final = "application/vnd.amazon.soci.index.v1+json"
SOCI_INDEX_V2: Final = "application/vnd.amazon.soci.index.v2+json"
SOCI_PREFETCH: Final = "application/vnd.amazon.soci.prefetch.v1+json"

EMPTY_JSON: Final = b"{}"
"""The config blob of every SOCI index; it must exist in the registry."""
EMPTY_JSON_DIGEST: Final = Digest("sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a")

MANIFEST_TYPES: Final = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
INDEX_TYPES: Final = frozenset({OCI_INDEX, DOCKER_LIST})
MANIFEST_ACCEPT: Final = ", ".join((OCI_INDEX, DOCKER_LIST, OCI_MANIFEST, DOCKER_MANIFEST))
"""The `Accept` header of a request for any manifest or index."""

Compression = Literal["gzip", "zstd", "uncompressed", "unknown"]

_COMPRESSION: Final[dict[str, Compression]] = {
    OCI_LAYER: "uncompressed",
    OCI_LAYER_GZIP: "gzip",
    OCI_LAYER_ZSTD: "zstd",
    OCI_NONDISTRIBUTABLE + "+gzip": "gzip",
    OCI_NONDISTRIBUTABLE + "+zstd": "zstd",
    # Docker clients have pushed compressed layers under the plain type: only the bytes can tell.
    DOCKER_LAYER: "unknown",
    DOCKER_FOREIGN: "unknown",
    DOCKER_LAYER_GZIP: "gzip",
    DOCKER_FOREIGN + ".gzip": "gzip",
    DOCKER_LAYER_ZSTD: "zstd",
}


def layer_compression(media_type: str) -> Compression:
    """Return how a layer of this media type is compressed; "unknown" means: look at the bytes.

    Raises UnsupportedLayer for encrypted layers, for other kinds of layer (EROFS), for what is no layer
    at all, and for uncompressed non-distributable layers, which the field skips too.
    """
    compression = _COMPRESSION.get(media_type)
    if compression is not None:
        return compression
    if media_type.endswith("+encrypted"):
        raise UnsupportedLayer(f"layer media type {media_type!r}: encrypted layers cannot be lazy")
    raise UnsupportedLayer(f"layer media type {media_type!r} is not one that can be lazy")
