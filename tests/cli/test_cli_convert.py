"""`soci convert` in containerd: what the new image is, and that the old one stays."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from snapshotter.containerd.client import Containerd
from snapshotter.oci.descriptor import Descriptor
from snapshotter.soci.artifacts import ArtifactDatabase
from snapshotter.soci.content import read_verified
from snapshotter.soci.store import LayoutStore
from snapshotter.units import Digest
from tests.cli.conftest import Soci
from tests.soci.images import multi_platform
from tests.support.dockerregistry import DockerRegistry
from tests.support.images import Image, ImageBuilder, layer

ALL = ("--min-layer-size", "0", "--span-size", "65536")
NEW = "registry.example/new:soci"
V2 = "application/vnd.amazon.soci.index.v2+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return ImageBuilder(tmp_path / "image").layer({"a": os.urandom(200_000)}).layer({"b": b"<&>"}).build()


@pytest.fixture
def pulled(soci: Soci, docker_registry: DockerRegistry, image: Image) -> str:
    reference = docker_registry.push(image, "convert/app")
    soci("image", "rpull", "--snapshotter", "overlayfs", reference)
    return reference


def put(containerd: Containerd, layout: Path, name: str, root: dict[str, Any]) -> None:
    """Give containerd a whole image."""
    with containerd.lease() as leased:
        for path in (layout / "blobs/sha256").iterdir():
            leased.content.write(path.read_bytes(), labels={"containerd.io/gc.root": "2024-01-01T00:00:00Z"})
        leased.images.put(name, Descriptor.from_json(root))


def document(containerd: Containerd, digest: str) -> tuple[bytes, Any]:
    data = read_verified(containerd.content, Digest(digest))
    return data, json.loads(data)


def compact(obj: object) -> bytes:
    return json.dumps(obj, separators=(",", ":")).encode()


def test_the_new_image_links_manifest_and_index(
    soci: Soci, containerd: Containerd, pulled: str, image: Image
) -> None:
    out = soci("convert", *ALL, pulled, NEW).out.splitlines()
    target = containerd.images.get(NEW).target
    assert out[-1] == f"converted image {target.digest}"
    assert containerd.images.get(pulled).target.digest == image.digest
    data, listing = document(containerd, target.digest)
    entry, soci_entry = listing["manifests"]
    manifest_data, manifest = document(containerd, entry["digest"])
    index_data, index = document(containerd, soci_entry["digest"])
    platform = {"architecture": "amd64", "os": "linux"}
    assert data == compact(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [
                {
                    "mediaType": MANIFEST,
                    "digest": entry["digest"],
                    "size": len(manifest_data),
                    "annotations": {"com.amazon.soci.index-digest": soci_entry["digest"]},
                    "platform": platform,
                },
                {
                    "mediaType": MANIFEST,
                    "digest": soci_entry["digest"],
                    "size": len(index_data),
                    "annotations": {"com.amazon.soci.image-manifest-digest": entry["digest"]},
                    "platform": platform,
                    "artifactType": V2,
                },
            ],
        }
    )
    _, old = document(containerd, image.digest)
    old["annotations"] = {"com.amazon.soci.index-digest": soci_entry["digest"]}
    assert manifest_data == compact(old)
    assert manifest["layers"] == [one.descriptor() for one in image.layers]
    assert index["config"]["mediaType"] == V2
    assert "subject" not in index
    (row,) = ArtifactDatabase(soci.root).indices()
    assert (row.version, row.image_digest, row.manifest_digest) == (2, target.digest, entry["digest"])


def test_converting_again_changes_nothing(soci: Soci, containerd: Containerd, pulled: str) -> None:
    soci("convert", *ALL, pulled, NEW)
    first = containerd.images.get(NEW).target.digest
    soci("convert", *ALL, "--force", NEW, "registry.example/newer:soci")
    assert containerd.images.get("registry.example/newer:soci").target.digest == first
    soci("convert", *ALL, pulled, pulled)
    assert containerd.images.get(pulled).target.digest == first


def test_garbage_collection_keeps_and_frees_what_it_should(
    soci: Soci, containerd: Containerd, pulled: str
) -> None:
    soci("convert", *ALL, pulled, NEW)
    containerd.images.remove(pulled, collect=True)
    root = containerd.images.get(NEW).target.digest
    named = [root]
    for digest in (entry["digest"] for entry in document(containerd, root)[1]["manifests"]):
        manifest = document(containerd, digest)[1]
        named += [digest, manifest["config"]["digest"], *(one["digest"] for one in manifest["layers"])]
    assert len(named) == 1 + 2 * (2 + 2)
    assert all(containerd.content.exists(Digest(digest)) for digest in named)
    containerd.images.remove(NEW, collect=True)
    assert not any(containerd.content.exists(Digest(digest)) for digest in named)


def test_a_subset_leaves_the_others_alone(soci: Soci, containerd: Containerd, tmp_path: Path) -> None:
    platforms = {name: [layer({"a": os.urandom(99)})] for name in ("amd64", "arm64")}
    root = multi_platform(tmp_path / "multi", platforms)
    put(containerd, tmp_path / "multi", "registry.example/multi:1", root)
    old = document(containerd, root["digest"])[1]["manifests"]
    soci("convert", *ALL, "--platform", "linux/arm64", "registry.example/multi:1", NEW)
    new = document(containerd, containerd.images.get(NEW).target.digest)[1]["manifests"]
    assert [new[0], new[2]] == [old[0], old[2]]
    assert [one.get("artifactType") for one in new] == [None, None, None, V2]
    assert new[3]["platform"] == new[1]["platform"] == old[1]["platform"]
    soci("convert", *ALL, "--all-platforms", NEW, "registry.example/all:1")
    both = containerd.images.get("registry.example/all:1").target.digest
    after = document(containerd, both)[1]["manifests"]
    assert after[1:4] == new[1:4]
    assert [one.get("artifactType") for one in after] == [None, None, None, V2, V2]
    soci(
        "convert", *ALL, "--force", "-p", "linux/amd64", "registry.example/all:1", "registry.example/again:1"
    )
    assert containerd.images.get("registry.example/again:1").target.digest == both
    soci("convert", *ALL, "--all-platforms", "registry.example/all:1", "registry.example/again:1")
    assert containerd.images.get("registry.example/again:1").target.digest == both


def test_attestations_follow_their_manifest(soci: Soci, containerd: Containerd, tmp_path: Path) -> None:
    root = multi_platform(tmp_path / "multi", {"amd64": [layer({"a": b"1"})]})
    listing = json.loads((tmp_path / "multi/blobs/sha256" / root["digest"][7:]).read_bytes())
    listing["manifests"][1]["annotations"] = {
        "vnd.docker.reference.digest": listing["manifests"][0]["digest"],
        "vnd.docker.reference.type": "attestation-manifest",
    }
    data = compact(listing)
    put(containerd, tmp_path / "multi", "registry.example/old:1", root)
    with containerd.lease() as leased:
        digest = leased.content.write(data)
        leased.images.put("registry.example/multi:1", Descriptor(listing["mediaType"], digest, len(data)))
        soci("convert", *ALL, "-p", "linux/amd64", "registry.example/multi:1", NEW)
    image, attestation, _ = document(containerd, containerd.images.get(NEW).target.digest)[1]["manifests"]
    assert attestation["digest"] == listing["manifests"][1]["digest"]
    assert attestation["annotations"] == {
        "vnd.docker.reference.digest": image["digest"],
        "vnd.docker.reference.type": "attestation-manifest",
    }


def test_the_soci_content_store_has_the_artifacts_too(
    soci: Soci, containerd: Containerd, pulled: str
) -> None:
    soci("--content-store", "soci", "convert", *ALL, pulled, NEW)
    (row,) = ArtifactDatabase(soci.root).indices()
    assert LayoutStore(soci.root / "content").size(row.digest) == row.size
    assert containerd.content.size(row.digest) == row.size


def test_what_can_be_wrong(soci: Soci, containerd: Containerd, pulled: str) -> None:
    assert "needs a tag" in soci.fails("convert", pulled, "registry.example:5000/new")
    digest = "sha256:" + "0" * 64
    assert "must not name a digest" in soci.fails("convert", pulled, f"registry.example/new:1@{digest}")
    assert soci.fails("convert", pulled, NEW).startswith("no ztocs created")
    assert soci.fails("convert", *ALL, "registry.example/absent:1", NEW).startswith(
        "image registry.example/absent:1"
    )
    assert "it has linux/amd64" in soci.fails("convert", *ALL, "-p", "linux/s390x", pulled, NEW)
    assert [one.name for one in containerd.images.list()] == [pulled]


def test_the_database_can_be_made_again(soci: Soci, pulled: str) -> None:
    soci("convert", *ALL, pulled, "registry.example/new:1")
    soci("create", *ALL, "--prefetch-file", "*", pulled)
    database = ArtifactDatabase(soci.root)

    def state() -> tuple[object, ...]:
        indices = {
            (row.digest, row.image_digest, row.manifest_digest, row.platform) for row in database.indices()
        }
        ztocs = {(row.digest, row.layer_digest, row.span_size, row.build_tool) for row in database.ztocs()}
        return indices, ztocs, {(row.digest, row.layer_digest) for row in database.prefetches()}

    before = state()
    assert [len(one) for one in before] == [2, 2, 2]  # type: ignore[arg-type]
    assert soci("rebuild-db").out == ""
    (soci.root / "artifacts.sqlite").unlink()
    assert len(soci("rebuild-db").out.splitlines()) == 6
    assert state() == before
    soci("--content-store", "soci", "rebuild_db", "--json")
    assert state() == (set(), set(), set())
