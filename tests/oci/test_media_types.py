"""What a layer's media type says about its compression."""

import pytest

from snapshotter.errors import UnsupportedLayer
from snapshotter.oci.media_types import layer_compression


@pytest.mark.parametrize(
    ("media_type", "compression"),
    [
        ("application/vnd.oci.image.layer.v1.tar", "uncompressed"),
        ("application/vnd.oci.image.layer.v1.tar+gzip", "gzip"),
        ("application/vnd.oci.image.layer.v1.tar+zstd", "zstd"),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", "gzip"),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar+zstd", "zstd"),
        ("application/vnd.docker.image.rootfs.diff.tar", "unknown"),
        ("application/vnd.docker.image.rootfs.diff.tar.gzip", "gzip"),
        ("application/vnd.docker.image.rootfs.diff.tar.zstd", "zstd"),
        ("application/vnd.docker.image.rootfs.foreign.diff.tar", "unknown"),
        ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "gzip"),
    ],
)
def test_compression_of_a_layer(media_type: str, compression: str) -> None:
    assert layer_compression(media_type) == compression


@pytest.mark.parametrize(
    "media_type",
    [
        "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
        "application/vnd.oci.image.layer.v1.tar+encrypted",
        "application/vnd.oci.image.layer.nondistributable.v1.tar",
        "application/vnd.erofs.layer.v1",
        "application/vnd.in-toto+json",
        "application/vnd.oci.image.layer.v1.tar+br",
        "",
    ],
)
def test_what_cannot_be_lazy_is_named(media_type: str) -> None:
    with pytest.raises(UnsupportedLayer, match=repr(media_type).replace("+", r"\+")):
        layer_compression(media_type)


def test_encryption_is_said_to_be_the_reason() -> None:
    with pytest.raises(UnsupportedLayer, match="encrypted layers cannot be lazy"):
        layer_compression("application/vnd.oci.image.layer.v1.tar+gzip+encrypted")
