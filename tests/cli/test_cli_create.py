"""`soci create` on images of containerd and of layouts: where artifacts go, and how long they live."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from snapshotter.containerd.client import Containerd
from snapshotter.oci.descriptor import Descriptor
from snapshotter.soci.artifacts import ArtifactDatabase
from snapshotter.soci.content import read_verified
from snapshotter.soci.index import SociIndex, parse
from snapshotter.soci.store import LayoutStore
from snapshotter.units import Digest, sha256_digest
from tests.cli.conftest import Soci
from tests.soci.images import multi_platform
from tests.support.dockerregistry import DockerRegistry
from tests.support.images import Image, ImageBuilder, layer

ALL = ("--min-layer-size", "0", "--span-size", "65536")
GC = "containerd.io/gc.ref.content"


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return (
        ImageBuilder(tmp_path / "image")
        .layer({"a": os.urandom(200_000)})
        .layer({"b": os.urandom(99)})
        .build()
    )


@pytest.fixture
def pulled(soci: Soci, docker_registry: DockerRegistry, image: Image) -> str:
    """The name of an image that containerd has whole."""
    reference = docker_registry.push(image, "create/app")
    soci("image", "rpull", "--snapshotter", "overlayfs", reference)
    return reference


def collect_garbage(containerd: Containerd) -> None:
    """Make containerd's garbage collector run, and wait for it."""
    image = containerd.images.list()[0]
    containerd.images.put("registry.example/garbage:1", image.target)
    containerd.images.remove("registry.example/garbage:1", collect=True)


def only_index(soci: Soci) -> Digest:
    (row,) = ArtifactDatabase(soci.root).indices()
    return row.digest


def artifacts(index: SociIndex) -> list[Digest]:
    return [index.digest, sha256_digest(b"{}"), *(entry.ztoc for entry in index.ztocs)]


def test_artifacts_live_in_containerd_as_long_as_the_image(
    soci: Soci, containerd: Containerd, pulled: str
) -> None:
    out = soci("create", *ALL, pulled).out.splitlines()
    index = parse(read_verified(containerd.content, only_index(soci)))
    assert out == [f"layer {entry.layer} -> ztoc {entry.ztoc}" for entry in index.ztocs]
    assert containerd.content.labels(index.digest) == {
        f"{GC}.config": sha256_digest(b"{}"),
        f"{GC}.ztoc.0": index.ztocs[0].ztoc,
        f"{GC}.ztoc.1": index.ztocs[1].ztoc,
    }
    assert containerd.images.get(pulled).labels == {
        f"{GC}.soci-index": index.digest,
        f"{GC}.soci-index.linux-amd64": index.digest,
    }
    collect_garbage(containerd)
    assert all(containerd.content.exists(digest) for digest in artifacts(index))
    containerd.images.put("registry.example/other:1", containerd.images.get(pulled).target)
    containerd.images.remove(pulled, collect=True)
    assert not any(containerd.content.exists(digest) for digest in artifacts(index))


def test_the_image_itself_is_untouched(soci: Soci, containerd: Containerd, pulled: str) -> None:
    before = containerd.images.get(pulled).target
    soci("create", *ALL, pulled)
    assert containerd.images.get(pulled).target == before


def test_small_layers_and_a_second_run(soci: Soci, pulled: str, image: Image) -> None:
    limit = ("--min-layer-size", "1000")
    big, small = image.layers
    first = soci("create", *limit, pulled).out.splitlines()
    ztoc = ArtifactDatabase(soci.root).ztocs()[0].digest
    skipped = f"ztoc skipped - layer {small.digest} ({small.media_type}) size {small.size} is less than min-layer-size 1000"
    assert first == [f"layer {big.digest} -> ztoc {ztoc}", skipped]
    second = soci("create", *limit, pulled).out.splitlines()
    assert second == [f"layer {big.digest} -> ztoc {ztoc} (already exists)", skipped]
    assert soci("create", *limit, "--force", pulled).out.splitlines() == first


def test_the_tool_string_is_part_of_every_digest(soci: Soci, pulled: str) -> None:
    create = ("--content-store", "soci", "create", *ALL, pulled)
    soci(*create)
    soci(*create, "--build-tool-identifier", "AWS SOCI CLI v0.1")
    store = LayoutStore(soci.root / "content")
    first, second = (parse(read_verified(store, row.digest)) for row in ArtifactDatabase(soci.root).indices())
    assert first.build_tool == "AWS SOCI CLI v0.1"
    assert not {entry.ztoc for entry in first.ztocs} & {entry.ztoc for entry in second.ztocs}


def test_a_newer_index_of_the_platform_replaces_the_older(
    soci: Soci, containerd: Containerd, pulled: str
) -> None:
    soci("create", *ALL, pulled)
    old = only_index(soci)
    soci("create", *ALL, "--build-tool-identifier", "newer", pulled)
    new = ArtifactDatabase(soci.root).indices()[0].digest
    collect_garbage(containerd)
    assert [containerd.content.exists(digest) for digest in (old, new)] == [False, True]


def test_the_soci_content_store_is_a_directory(soci: Soci, containerd: Containerd, pulled: str) -> None:
    soci("--content-store", "soci", "create", *ALL, pulled)
    store = LayoutStore(soci.root / "content")
    index = parse(read_verified(store, only_index(soci)))
    assert all(store.size(digest) > 0 for digest in artifacts(index))
    assert not containerd.content.exists(index.digest)
    assert containerd.images.get(pulled).labels == {}


def test_a_layout_needs_no_containerd(soci: Soci, image: Image, containerd: Containerd) -> None:
    soci("--address", "/nowhere", "create", *ALL, "--oci-layout", image.layout, "registry.example/app:latest")
    index = parse(read_verified(LayoutStore(soci.root / "content"), only_index(soci)))
    assert [entry.layer for entry in index.ztocs] == [one.digest for one in image.layers]
    assert containerd.images.list() == []


def test_a_layout_s_index_in_containerd_is_kept_for_its_own_sake(
    soci: Soci, image: Image, containerd: Containerd, pulled: str
) -> None:
    soci(
        "--content-store",
        "containerd",
        "create",
        *ALL,
        "--oci-layout",
        image.layout,
        "registry.example/app:latest",
    )
    index = only_index(soci)
    assert "containerd.io/gc.root" in containerd.content.labels(index)
    collect_garbage(containerd)
    assert containerd.content.exists(index)


def test_platforms(soci: Soci, tmp_path: Path) -> None:
    one, two = layer({"a": os.urandom(99)}), layer({"a": os.urandom(99)})
    multi_platform(tmp_path / "multi", {"amd64": [one], "arm64": [two]})
    create = ("create", *ALL, "--oci-layout", tmp_path / "multi")
    soci(*create, "--platform", "linux/arm64", "app")
    assert [row.platform for row in ArtifactDatabase(soci.root).indices()] == ["linux/arm64"]
    out = soci(*create, "--platform", "linux/amd64,linux/arm64", "app").out.splitlines()
    assert [line.endswith("(already exists)") for line in out] == [False, True]
    assert len(soci(*create, "--all-platforms", "app").out.splitlines()) == 2
    rows = ArtifactDatabase(soci.root).indices()
    assert sorted(row.platform for row in rows) == ["linux/amd64", "linux/arm64"]
    assert len({row.image_digest for row in rows}) == 1
    error = soci.fails(*create, "--platform", "linux/s390x", "app")
    assert error == "image app: no manifest for platform linux/s390x; it has linux/amd64, linux/arm64"


def test_two_platforms_of_one_image_are_both_kept(soci: Soci, containerd: Containerd, tmp_path: Path) -> None:
    platforms = {name: [layer({"a": os.urandom(99)})] for name in ("amd64", "arm64")}
    root = multi_platform(tmp_path / "multi", platforms)
    name = "registry.example/multi:1"
    with containerd.lease() as leased:
        for path in (tmp_path / "multi/blobs/sha256").iterdir():
            leased.content.write(path.read_bytes())
        leased.images.put(name, Descriptor.from_json(root))
        soci("create", *ALL, "--all-platforms", name)
        labels = containerd.images.get(name).labels
    digests = {str(row.platform): row.digest for row in ArtifactDatabase(soci.root).indices()}
    assert labels[f"{GC}.soci-index.linux-amd64"] == digests["linux/amd64"]
    assert labels[f"{GC}.soci-index.linux-arm64"] == digests["linux/arm64"]
    collect_garbage(containerd)
    assert all(containerd.content.exists(digest) for digest in digests.values())


def test_what_can_be_wrong_with_the_image(
    soci: Soci, containerd: Containerd, pulled: str, image: Image
) -> None:
    absent = soci.fails("create", "registry.example/absent:1")
    assert absent.startswith(f"image registry.example/absent:1: not in namespace {containerd.namespace}")
    skipped = soci.fails("create", pulled)
    assert skipped.startswith("no ztocs created, all layers either skipped or produced errors")
    assert "--min-layer-size" in skipped
    missing = Digest(image.layers[1].digest)
    containerd.content.remove(missing)
    error = soci.fails("create", *ALL, pulled)
    assert error.startswith(f"image {pulled}: content {missing}")
    assert "pull all of it first" in error
    assert ArtifactDatabase(soci.root).indices() == []


def test_short_names_are_docker_s(soci: Soci, containerd: Containerd, pulled: str) -> None:
    containerd.images.put("docker.io/library/short:latest", containerd.images.get(pulled).target)
    soci("create", *ALL, "short")
    assert f"{GC}.soci-index" in containerd.images.get("docker.io/library/short:latest").labels
