"""Finding the manifest of a platform, and reading layouts that other tools made."""

from __future__ import annotations

import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from snapshotter.errors import CorruptData, DigestMismatch, InvalidIndex, NotFound, UsageError
from snapshotter.oci.descriptor import Descriptor, Platform
from snapshotter.oci.manifest import ImageIndex, parse
from snapshotter.soci.content import CHUNK_SIZE, read_verified
from snapshotter.soci.layout import OciLayout
from snapshotter.soci.platforms import choose, find_images
from snapshotter.units import Digest, sha256_digest
from tests.soci.images import MANIFEST, Blobs, multi_platform, noise
from tests.support.images import layer

AMD64 = Platform("amd64", "linux")
ARM64 = Platform("arm64", "linux")
RISCV = Platform("riscv64", "linux")


def open_layout(path: Path) -> OciLayout:
    return OciLayout(path)


def root_of(layout: OciLayout) -> Descriptor:
    return layout.image("any/name:latest")


@pytest.fixture
def two(tmp_path: Path) -> OciLayout:
    """An image for two platforms, and an attestation."""
    path = tmp_path / "two"
    multi_platform(path, {"amd64": [layer({"a": b"1"})], "arm64": [layer({"a": b"2"}), layer({"b": b"3"})]})
    return open_layout(path)


def test_platforms_come_in_the_order_they_were_asked_for_and_once(two: OciLayout) -> None:
    found = find_images(two, root_of(two), [ARM64, AMD64, ARM64], "image")
    assert [str(image.platform) for image in found] == ["linux/arm64", "linux/amd64"]
    assert [len(image.manifest.layers) for image in found] == [2, 1]
    assert [len(image.config.diff_ids) for image in found] == [2, 1]


def test_all_platforms_are_all_images_but_no_attestation(two: OciLayout) -> None:
    found = find_images(two, root_of(two), None, "image")
    assert [str(image.platform) for image in found] == ["linux/amd64", "linux/arm64"]


def test_a_missing_platform_is_named_with_what_there_is(two: OciLayout) -> None:
    with pytest.raises(
        UsageError, match="image x/y: no manifest for platform linux/riscv64; it has linux/amd64, linux/arm64"
    ):
        find_images(two, root_of(two), [AMD64, RISCV], "x/y")


def test_only_what_is_asked_for_must_be_there(two: OciLayout, tmp_path: Path) -> None:
    arm64 = find_images(two, root_of(two), [ARM64], "image")[0]
    (tmp_path / "two/blobs/sha256" / arm64.descriptor.digest.removeprefix("sha256:")).unlink()
    assert len(find_images(two, root_of(two), [AMD64], "image")) == 1
    with pytest.raises(NotFound, match=str(arm64.descriptor.digest)):
        find_images(two, root_of(two), None, "image")


def test_a_single_manifest_has_the_platform_of_its_config(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    blobs.list(blobs.put_manifest([layer({"a": b"1"})], "arm64"), "latest")
    layout = open_layout(tmp_path)
    assert [str(image.platform) for image in find_images(layout, root_of(layout), None, "image")] == [
        "linux/arm64"
    ]
    with pytest.raises(UsageError, match="no manifest for platform linux/amd64; it has linux/arm64"):
        find_images(layout, root_of(layout), [AMD64], "image")


def test_a_list_that_names_no_platforms_is_read_deeper(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    manifests = [blobs.put_manifest([layer({"a": name.encode()})], name) for name in ("arm64", "amd64")]
    media_type = "application/vnd.oci.image.index.v1+json"
    root = blobs.put_json({"schemaVersion": 2, "mediaType": media_type, "manifests": manifests}, media_type)
    blobs.list(root, "latest")
    layout = open_layout(tmp_path)
    found = find_images(layout, root_of(layout), [AMD64], "image")
    assert [image.descriptor.digest for image in found] == [manifests[1]["digest"]]


def test_an_image_without_any_manifest(tmp_path: Path) -> None:
    multi_platform(tmp_path, {})
    layout = open_layout(tmp_path)
    with pytest.raises(UsageError, match="image x: holds no image manifest"):
        find_images(layout, root_of(layout), None, "x")
    with pytest.raises(UsageError, match="no manifest for platform linux/amd64; it has no platform"):
        find_images(layout, root_of(layout), [AMD64], "x")


def test_layers_and_diff_ids_must_be_as_many(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    manifest = blobs.put_manifest([layer({"a": b"1"})], "amd64")
    obj = json.loads((tmp_path / "blobs/sha256" / manifest["digest"][7:]).read_bytes())
    obj["layers"] *= 2
    blobs.list(blobs.put_json(obj, MANIFEST), "latest")
    layout = open_layout(tmp_path)
    with pytest.raises(InvalidIndex, match="2 layers, but its config names 1 diffIDs"):
        find_images(layout, root_of(layout), None, "image")


def test_a_damaged_config_is_found(two: OciLayout, tmp_path: Path) -> None:
    config = find_images(two, root_of(two), [AMD64], "image")[0].manifest.config
    path = tmp_path / "two/blobs/sha256" / config.digest.removeprefix("sha256:")
    path.write_bytes(path.read_bytes().replace(b"amd64", b"arm64"))
    with pytest.raises(DigestMismatch, match=str(config.digest)):
        find_images(two, root_of(two), [AMD64], "image")


def test_choosing_from_a_registry_s_list_skips_soci_indices(two: OciLayout) -> None:
    index = parse(read_verified(two, root_of(two).digest))
    assert isinstance(index, ImageIndex)
    soci = Descriptor(
        MANIFEST,
        sha256_digest(b"x"),
        1,
        platform=RISCV,
        artifact_type="application/vnd.amazon.soci.index.v2+json",
    )
    more = ImageIndex(index.media_type, (soci, *index.manifests))
    assert choose(more, ARM64, "image").platform == ARM64
    with pytest.raises(UsageError, match="it has linux/amd64, linux/arm64"):
        choose(more, RISCV, "image")


def archive(layout: Path, target: Path, prefix: str) -> Path:
    with tarfile.open(target, "w") as tar:
        tar.add(layout, prefix)
    return target


@pytest.mark.parametrize("prefix", [".", ""])
def test_an_archive_reads_as_the_directory_does(two: OciLayout, tmp_path: Path, prefix: str) -> None:
    path = archive(tmp_path / "two", tmp_path / "two.tar", prefix)
    with open_layout(path) as packed:
        assert root_of(packed) == root_of(two)
        found = find_images(packed, root_of(packed), None, "image")
        assert found == find_images(two, root_of(two), None, "image")
        blob = found[0].manifest.layers[0].digest
        assert list(packed.chunks(blob)) == list(two.chunks(blob))
        assert packed.size(blob) == two.size(blob)
        with pytest.raises(NotFound, match=r"two\.tar"):
            packed.size(sha256_digest(b"absent"))


def test_large_blobs_come_in_pieces(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    data = noise(2 * CHUNK_SIZE + 5, seed=2)
    digest = Digest(blobs.put(data, "x")["digest"])
    blobs.list({"mediaType": MANIFEST, "digest": digest, "size": 1}, "latest")
    layout = open_layout(tmp_path)
    pieces = list(layout.chunks(digest))
    assert [len(piece) for piece in pieces] == [CHUNK_SIZE, CHUNK_SIZE, 5]
    assert b"".join(pieces) == data
    assert layout.read_range(digest, 10, 20) == data[10:20]


def entry(blobs: Blobs, text: str) -> dict[str, Any]:
    return blobs.put(text.encode(), MANIFEST)


@pytest.mark.parametrize(
    "name", ["two", "registry.example/app:two", "registry.example/app:two@" + "sha256:" + "0" * 64]
)
def test_names_in_a_layout(tmp_path: Path, name: str) -> None:
    blobs = Blobs(tmp_path)
    one, other = entry(blobs, "one"), entry(blobs, "two")
    blobs.list(one, "one")
    index = json.loads((tmp_path / "index.json").read_bytes())
    index["manifests"].append({**other, "annotations": {"org.opencontainers.image.ref.name": "two"}})
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert open_layout(tmp_path).image(name).digest == other["digest"]
    with pytest.raises(UsageError, match=r"image three: not in OCI layout .* which holds one, two"):
        open_layout(tmp_path).image("three")


def test_a_layout_of_one_image_has_it_under_every_name(two: OciLayout) -> None:
    assert two.image("Not a reference!") == two.image("latest") == two.image("registry.example/other:tag")


def test_a_file_that_shrinks_is_noticed(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    digest = Digest(blobs.put(b"content", "x")["digest"])
    blobs.list({"mediaType": MANIFEST, "digest": digest, "size": 7}, "latest")
    with pytest.raises(CorruptData, match=f"content {digest} in {tmp_path}: shorter than 9 bytes"):
        open_layout(tmp_path).read_range(digest, 3, 9)


def test_skopeo_archives_are_layouts(two: OciLayout, tmp_path: Path) -> None:
    target = tmp_path / "skopeo.tar"
    copy = ["skopeo", "copy", "--quiet", "--insecure-policy", "--override-arch", "arm64"]
    subprocess.run([*copy, f"oci:{tmp_path / 'two'}:latest", f"oci-archive:{target}:v1"], check=True)
    with open_layout(target) as packed:
        found = find_images(packed, packed.image("app:v1"), [ARM64], "image")
        assert found[0].config == find_images(two, root_of(two), [ARM64], "image")[0].config


def test_what_is_no_layout_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing: no such file"):
        open_layout(tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"it has no index\.json"):
        open_layout(tmp_path)
    (tmp_path / "text").write_text("not a tar" * 100)
    with pytest.raises(UsageError, match="text: neither a directory nor a plain tar"):
        open_layout(tmp_path / "text")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/manifest.json").write_text("[]")
    with pytest.raises(UsageError, match=r"a docker-save archive\? it has no index.json"):
        open_layout(archive(tmp_path / "saved", tmp_path / "saved.tar", "."))
    (tmp_path / "index.json").write_text('{"schemaVersion":2,"manifests":[{"digest":"x"}]}')
    with pytest.raises(InvalidIndex, match=r"index\.json: manifests\[0\]"):
        open_layout(tmp_path)
