"""Local layers: downloaded whole, checked, unpacked by a process of its own, and nothing left of it all."""

from __future__ import annotations

import gzip
import os
import stat
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import zstandard

from snapshotter.daemon.unpacking import Unpacker
from snapshotter.errors import (
    BlobNotFound,
    DigestMismatch,
    InvalidIndex,
    InvalidTar,
    ProcessFailed,
    RegistryUnavailable,
    SnapshotterError,
    UnsupportedLayer,
)
from snapshotter.layer.inherit import Parent
from snapshotter.oci.manifest import ImageManifest, parse
from snapshotter.oci.media_types import DOCKER_LAYER, OCI_LAYER, OCI_LAYER_GZIP, OCI_LAYER_ZSTD
from snapshotter.oci.reference import Reference
from snapshotter.snapshot.model import Usage
from snapshotter.units import Digest, sha256_digest
from tests.support.images import directory, tar
from tests.support.registry import FlipByte, Image, Registry, Stall, Status, Truncate
from tests.support.registry_clients import client_for

TAR = tar({"d/": directory(0o750), "d/file": b"content" * 10_000})
pytestmark = pytest.mark.usefixtures("root")


def manifest_of(image: Image) -> ImageManifest:
    manifest = parse(image.manifest)
    assert isinstance(manifest, ImageManifest)
    return manifest


def reference_to(image: Image) -> Reference:
    return Reference.parse(image.name).with_digest(image.digest)


def with_unpacker(
    root: Path,
    registry: Registry,
    test: Callable[[Unpacker], Awaitable[None]],
    programs: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Run `test`, and look that nothing is left of the downloads."""

    async def main() -> None:
        async with client_for(registry) as client:
            (root / "target").mkdir()
            unpacker = Unpacker(root, client, programs=programs)
            try:
                await test(unpacker)
            finally:
                assert os.listdir(root / "scratch") == []
                assert not [name for name in open_files() if "scratch" in name]

    trio.run(main)


def open_files() -> list[str]:
    """Return what the descriptors of this process lead to."""
    names = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing
            names.append(os.readlink(f"/proc/self/fd/{fd}"))
    return names


def unpack(
    root: Path,
    registry: Registry,
    image: Image,
    layer: Digest | None = None,
    *,
    manifest: ImageManifest | None = None,
    parents: Sequence[Parent] = (),
    programs: Mapping[str, Sequence[str]] | None = None,
) -> Usage:
    """Unpack a layer of an image (the first), to `root/target`."""
    got = []

    async def test(unpacker: Unpacker) -> None:
        got.append(
            await unpacker.unpack(
                reference_to(image),
                manifest or manifest_of(image),
                layer or image.layers[0].digest,
                root / "target",
                list(parents),
            )
        )

    with_unpacker(root, registry, test, programs)
    return got[0]


@pytest.mark.parametrize(
    ("media_type", "blob"),
    [
        (OCI_LAYER_GZIP, gzip.compress(TAR, mtime=0)),
        (OCI_LAYER_ZSTD, zstandard.ZstdCompressor().compress(TAR)),
        (OCI_LAYER, TAR),
    ],
)
def test_a_layer_is_unpacked(workdir: Path, registry: Registry, media_type: str, blob: bytes) -> None:
    image = registry.add_image([blob], layer_media_type=media_type, diff_ids=[sha256_digest(TAR)])
    usage = unpack(workdir, registry, image)
    assert (workdir / "target/d/file").read_bytes() == b"content" * 10_000
    assert stat.S_IMODE((workdir / "target/d").stat().st_mode) == 0o750
    assert usage.inodes == 3
    assert usage.size >= 70_000


def test_a_program_may_inflate_in_our_place(workdir: Path, registry: Registry) -> None:
    image = registry.add_image([gzip.compress(TAR, mtime=0)])
    ran = workdir / "ran"
    unpack(
        workdir,
        registry,
        image,
        programs={"gzip": ["/bin/sh", "-c", f"touch {ran} && gunzip"], "zstd": ["/no"]},
    )
    assert (workdir / "target/d/file").read_bytes() == b"content" * 10_000
    assert ran.exists()


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("gunzip && false", "/bin/sh ended with status 1"),
        ("yes", "wrong checksum"),
        ("true", "tar stream|unpacks to"),
    ],
)
def test_a_program_that_does_not_do_its_work_fails_the_layer(
    workdir: Path, registry: Registry, command: str, complaint: str
) -> None:
    image = registry.add_image([gzip.compress(TAR, mtime=0)])
    with pytest.raises(SnapshotterError, match=complaint):
        unpack(workdir, registry, image, programs={"gzip": ["/bin/sh", "-c", command]})


def test_each_layer_has_its_own_diff_id(workdir: Path, registry: Registry) -> None:
    layers = [gzip.compress(tar({f"f{number}": b"x"}), mtime=0) for number in range(3)]
    image = registry.add_image(layers)
    unpack(workdir, registry, image, image.layers[1].digest)
    assert os.listdir(workdir / "target") == ["f1"]


def test_parents_are_passed_on(workdir: Path, registry: Registry) -> None:
    (workdir / "parent/d").mkdir(parents=True)
    (workdir / "parent/d").chmod(0o711)
    image = registry.add_image([gzip.compress(tar({"d/file": b"F"}), mtime=0)])
    unpack(workdir, registry, image, parents=[Parent(directory=workdir / "parent")])
    assert stat.S_IMODE((workdir / "target/d").stat().st_mode) == 0o711


def test_a_broken_stream_goes_on(workdir: Path, registry: Registry) -> None:
    image = registry.add_image([gzip.compress(TAR, mtime=0)])
    registry.fault(Truncate(path=image.layers[0].digest, after=100))
    unpack(workdir, registry, image)
    assert (workdir / "target/d/file").exists()


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (FlipByte(at=50, count=-1), DigestMismatch),
        (Status(status=404, count=-1), BlobNotFound),
        (Status(status=503, count=-1), RegistryUnavailable),
    ],
)
def test_what_the_registry_gets_wrong(
    workdir: Path, registry: Registry, fault: FlipByte | Status, kind: type[Exception]
) -> None:
    image = registry.add_image([gzip.compress(TAR, mtime=0)])
    fault.path = image.layers[0].digest
    registry.fault(fault)
    with pytest.raises(kind, match=image.layers[0].digest):
        unpack(workdir, registry, image)
    assert os.listdir(workdir / "target") == []


def test_a_layer_that_is_not_what_the_config_says(workdir: Path, registry: Registry) -> None:
    blob = gzip.compress(TAR, mtime=0)
    image = registry.add_image([blob], diff_ids=[sha256_digest(b"something else")])
    with pytest.raises(DigestMismatch, match=f"layer {image.layers[0].digest}.*config says"):
        unpack(workdir, registry, image)


def test_a_blob_that_is_no_layer(workdir: Path, registry: Registry) -> None:
    image = registry.add_image([b"rubbish" * 100], diff_ids=[sha256_digest(b"")])
    with pytest.raises(InvalidTar, match=image.layers[0].digest):
        unpack(workdir, registry, image)


@pytest.mark.parametrize("media_type", [DOCKER_LAYER, OCI_LAYER_GZIP + "+encrypted", "text/plain"])
def test_media_types_that_are_not_unpacked_cost_no_download(
    workdir: Path, registry: Registry, media_type: str
) -> None:
    image = registry.add_image([b"x"], layer_media_type=media_type, diff_ids=[sha256_digest(b"x")])
    with pytest.raises(UnsupportedLayer, match=media_type.replace("+", r"\+")):
        unpack(workdir, registry, image)
    assert registry.count(path=image.layers[0].digest) == 0


def test_a_layer_that_the_image_does_not_have(workdir: Path, registry: Registry) -> None:
    image = registry.add_image([gzip.compress(TAR, mtime=0)])
    with pytest.raises(InvalidIndex, match="has no layer"):
        unpack(workdir, registry, image, sha256_digest(b"another"))


def test_a_config_that_does_not_fit_the_manifest(workdir: Path, registry: Registry) -> None:
    image = registry.add_image([gzip.compress(TAR, mtime=0)])
    manifest = manifest_of(image)
    longer = replace(manifest, layers=(*manifest.layers, manifest.layers[0]))
    with pytest.raises(InvalidIndex, match="2 layers and 1 diffIDs"):
        unpack(workdir, registry, image, manifest=longer)


def test_a_program_that_dies_is_named(
    workdir: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = registry.add_image([gzip.compress(TAR, mtime=0)])
    monkeypatch.setattr("snapshotter.daemon.unpacking.sys.executable", "/bin/false")
    with pytest.raises(ProcessFailed, match="status 1 and no answer"):
        unpack(workdir, registry, image)


def test_a_cancelled_download_leaves_nothing(workdir: Path, registry: Registry) -> None:
    image = registry.add_image([os.urandom(1 << 20)], diff_ids=[sha256_digest(b"")])
    registry.fault(Stall(path=image.layers[0].digest, after=1000, count=-1))

    async def test(unpacker: Unpacker) -> None:
        with trio.move_on_after(0.3) as scope:
            await unpacker.unpack(
                reference_to(image), manifest_of(image), image.layers[0].digest, workdir / "target", []
            )
        assert scope.cancelled_caught

    with_unpacker(workdir, registry, test)
