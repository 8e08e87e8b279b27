"""`soci image rpull`: containerd must end up as after a pull by its own client, or with remote layers."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import trio

from snapshotter.cli.pull import PulledImage, PullOptions, pull
from snapshotter.cli.unpack import chain_ids
from snapshotter.containerd.client import Containerd
from snapshotter.containerd.labels import source_label
from snapshotter.download.downloads import RANGE_SIZE
from snapshotter.oci.reference import Reference
from snapshotter.registry.client import RegistryClient
from snapshotter.registry.keychain import StaticKeychain
from snapshotter.units import Digest
from tests.cli.conftest import Soci
from tests.soci.images import multi_platform
from tests.support.containerd import Containerd as Server
from tests.support.dockerregistry import DockerRegistry
from tests.support.images import Image, ImageBuilder, directory, symlink
from tests.support.registry import Drop, ExpireUrl, FlipByte, IgnoreRange, Registry, Stall, Status, Truncate


def an_image(layout: Path) -> Image:
    """Three layers, one of them larger than a message, one that hides a file of another; never the same twice."""
    return (
        ImageBuilder(layout)
        .layer(
            {"etc/": directory(), "etc/motd": b"hello\n", "etc/link": symlink("motd"), "old": os.urandom(9)}
        )
        .layer({"data": os.urandom(3 << 20)})
        .layer({".wh.old": b"", "etc/motd": b"changed\n"}, compression="zstd")
        .build()
    )


@pytest.fixture(scope="module")
def reference(docker_registry: DockerRegistry, tmp_path_factory: pytest.TempPathFactory) -> str:
    return docker_registry.push(an_image(tmp_path_factory.mktemp("image")), "pull/app")


def labels(containerd: Containerd, server: Server) -> dict[str, dict[str, str]]:
    """Labels of everything in the content store, without the times in them."""
    digests = [Digest(line) for line in server.ctr("content", "ls", "--quiet").split()]
    return {digest: containerd.content.labels(digest) for digest in digests}


def state(containerd: Containerd, server: Server) -> dict[str, object]:
    """All that a pull leaves in a namespace."""
    return {
        "images": containerd.images.list(),
        "snapshots": sorted(
            (one.name, one.parent, one.committed) for one in containerd.snapshots("overlayfs").list()
        ),
        "content": labels(containerd, server),
        "leases": server.ctr("leases", "ls", "--quiet"),
        "ingests": containerd.content.ingests(),
    }


def test_a_full_pull_leaves_what_containerd_s_own_client_leaves(
    soci: Soci, server: Server, containerd: Containerd, reference: str
) -> None:
    soci("image", "rpull", "--snapshotter", "overlayfs", reference)
    ours = state(containerd, server)
    server.namespace += "-ctr"
    server.pull(reference)
    with Containerd.connect(str(server.address), server.namespace) as theirs:
        assert ours == state(theirs, server)


def paths(dump: list[str]) -> dict[str, dict[str, object]]:
    """A dumped tree by path, without the times, which the mount points of a container have of their own."""
    entries = [json.loads(line) for line in dump]
    return {entry.pop("path"): {**entry, "mtime_ns": 0} for entry in entries}


def test_a_container_runs_in_a_pulled_image(soci: Soci, server: Server, reference: str) -> None:
    soci("image", "rpull", "--snapshotter", "overlayfs", reference)
    tree = paths(server.dump_tree(reference))
    server.namespace += "-ctr"
    server.pull(reference)
    assert tree == paths(server.dump_tree(reference))
    assert tree["etc/link"]["type"] == "symlink"
    assert "old" not in tree


def test_lines_say_what_happened(soci: Soci, reference: str) -> None:
    first = soci("image", "rpull", "--snapshotter", "overlayfs", reference).out.splitlines()
    assert len(first) == 5
    assert first[0].startswith(f"{reference}: manifest sha256:")
    assert first[0].endswith("3 layers, 3.0 MiB")
    assert [line.split(": ")[1].split(" ")[0] for line in first[1:4]] == ["unpacked"] * 3
    second = soci("image", "rpull", "--snapshotter", "overlayfs", reference).out.splitlines()
    assert [line.split(": ")[1].split(" ")[0] for line in second[1:4]] == ["present"] * 3


def test_removing_the_image_removes_everything(
    soci: Soci, server: Server, containerd: Containerd, reference: str
) -> None:
    soci("image", "rpull", "--snapshotter", "overlayfs", reference)
    containerd.images.remove(reference, collect=True)
    empty: dict[str, object] = {"images": [], "snapshots": [], "content": {}, "leases": "", "ingests": []}
    assert state(containerd, server) == empty


def test_nothing_is_collected_while_the_image_exists(
    soci: Soci, server: Server, containerd: Containerd, reference: str
) -> None:
    soci("image", "rpull", "--snapshotter", "overlayfs", reference)
    before = state(containerd, server)
    containerd.images.put("registry.example/garbage:1", containerd.images.get(reference).target)
    containerd.images.remove("registry.example/garbage:1", collect=True)
    assert state(containerd, server) == before


def test_one_platform_of_several(soci: Soci, containerd: Containerd, tmp_path: Path) -> None:
    with Registry() as registry:
        builder = ImageBuilder(tmp_path / "layers").layer({"only": b"amd64"})
        layers = builder.build().layers
        root = multi_platform(tmp_path / "multi", {"arm64": layers, "amd64": layers})
        for path in (tmp_path / "multi/blobs/sha256").iterdir():
            registry.add_blob(path.read_bytes())
        push_manifests(registry, tmp_path / "multi", root["digest"])
        name = str(registry.reference("app", "v1"))
        soci("image", "rpull", "--snapshotter", "overlayfs", "--platform", "linux/amd64", name)
        assert containerd.images.get(name).target.digest == root["digest"]
        assert len(containerd.content.labels(root["digest"])) == 4
        error = soci.fails("image", "rpull", "--platform", "linux/riscv64", name)
        assert (
            error == f"image {name}: no manifest for platform linux/riscv64; it has linux/amd64, linux/arm64"
        )


def push_manifests(registry: Registry, layout: Path, root: str) -> None:
    """Make the list and the manifests in it known as manifests, the list under the tag v1."""
    listed = (layout / "blobs/sha256" / root.removeprefix("sha256:")).read_bytes()
    for manifest in json.loads(listed)["manifests"]:
        data = (layout / "blobs/sha256" / manifest["digest"].removeprefix("sha256:")).read_bytes()
        registry.add_manifest(data)
    registry.add_manifest(listed, "application/vnd.oci.image.index.v1+json", tag="v1")


def blobs_of(image: Image) -> list[bytes]:
    contents = [blob.content for blob in image.layers if "gzip" in blob.media_type]
    return [content for content in contents if isinstance(content, bytes)]


TROUBLE = {
    "unavailable": lambda path: Status(path=path, skip=1, count=3, status=503),
    "too many": lambda path: Status(path=path, skip=1, count=1, status=429, headers={"Retry-After": "0"}),
    "cut": lambda path: Truncate(path=path, skip=1, count=2, after=1000),
    "dropped": lambda path: Drop(path=path, skip=1, count=2),
    "expired": lambda path: ExpireUrl(path=path, skip=1, count=1),
}
"""What passes; the first request for a blob only finds out where it is."""


@pytest.mark.parametrize("case", TROUBLE)
def test_passing_trouble_at_the_registry_is_survived(
    soci: Soci, containerd: Containerd, tmp_path: Path, case: str
) -> None:
    with Registry(presigned_ttl=60) as registry:
        image = registry.add_image(blobs_of(an_image(tmp_path)))
        layer = image.layers[1].digest
        fault = registry.fault(TROUBLE[case](f"/storage/{layer}"))
        soci("image", "rpull", "--snapshotter", "overlayfs", image.name)
        assert fault.hits == fault.count
        assert containerd.content.exists(layer)


LASTING = {
    "forbidden": lambda path: ExpireUrl(path=path, skip=1, count=-1),
    "gone": lambda path: Status(path=path, skip=1, count=-1, status=404, code="BLOB_UNKNOWN"),
    "refused": lambda path: Status(path=path, skip=1, count=-1, status=400),
}


@pytest.mark.parametrize("case", LASTING)
def test_lasting_trouble_is_told_without_a_secret(
    soci: Soci, containerd: Containerd, tmp_path: Path, case: str
) -> None:
    with Registry(presigned_ttl=60) as registry:
        image = registry.add_image(blobs_of(an_image(tmp_path)))
        layer = image.layers[1].digest
        registry.fault(LASTING[case](f"/storage/{layer}"))
        error = soci.fails("image", "rpull", "--snapshotter", "overlayfs", image.name)
        assert str(layer) in error
        registry.assert_no_secret(error)
        assert not containerd.content.exists(layer)
        assert containerd.content.ingests() == []


def test_a_registry_without_ranges_is_asked_for_whole_blobs(
    soci: Soci, containerd: Containerd, tmp_path: Path
) -> None:
    with Registry() as registry:
        image = registry.add_image(blobs_of(an_image(tmp_path)))
        registry.fault(IgnoreRange(path="/blobs/", count=-1))
        soci("image", "rpull", "--snapshotter", "overlayfs", image.name)
        assert containerd.content.exists(image.layers[1].digest)


def test_wrong_bytes_are_refused_and_leave_nothing(
    soci: Soci, server: Server, containerd: Containerd, tmp_path: Path
) -> None:
    with Registry() as registry:
        image = registry.add_image(blobs_of(an_image(tmp_path)))
        broken = image.layers[1].digest
        registry.fault(FlipByte(path=f"/blobs/{broken}", count=-1, at=1))
        error = soci.fails("image", "rpull", "--snapshotter", "overlayfs", image.name)
        assert error.startswith(f"layer {broken} of {registry.host}/app: the registry sent other bytes")
        assert containerd.images.list() == []
        assert containerd.content.ingests() == []
        assert server.ctr("leases", "ls", "--quiet") == ""
        assert not [one for one in containerd.snapshots("overlayfs").list() if not one.committed]


def test_a_config_that_lies_about_a_layer_is_found(
    soci: Soci, containerd: Containerd, tmp_path: Path
) -> None:
    with Registry() as registry:
        blobs = blobs_of(an_image(tmp_path))
        wrong = Digest("sha256:" + "0" * 64)
        image = registry.add_image(blobs[:1], diff_ids=[wrong])
        error = soci.fails("image", "rpull", "--snapshotter", "overlayfs", image.name)
        assert f"layer {image.layers[0].digest}: uncompressed it has digest" in error
        assert str(wrong) in error
        assert containerd.snapshots("overlayfs").list() == []


def test_an_unknown_image_or_snapshotter_is_named(soci: Soci, tmp_path: Path) -> None:
    with Registry() as registry:
        image = registry.add_image(blobs_of(an_image(tmp_path)))
        assert "absent" in soci.fails("image", "rpull", f"{registry.host}/absent:latest")
        assert "[proxy_plugins.nosuch]" in soci.fails("image", "rpull", "--snapshotter", "nosuch", image.name)
        assert "--soci-index-digest" not in soci.fails(
            "image", "rpull", "--soci-index-digest", "sha256:1", image.name
        )


def test_the_time_limit_ends_a_pull(
    soci: Soci, containerd: Containerd, server: Server, tmp_path: Path
) -> None:
    with Registry() as registry:
        image = registry.add_image(blobs_of(an_image(tmp_path)))
        registry.fault(Stall(path=f"/blobs/{image.layers[1].digest}", count=-1))
        error = soci.fails("--timeout", "700ms", "image", "rpull", "--snapshotter", "overlayfs", image.name)
        assert "(--timeout)" in error or "did not answer in time" in error
        assert server.ctr("leases", "ls", "--quiet") == ""
        assert containerd.content.ingests() == []


def test_a_large_layer_comes_in_ranges_and_goes_on_where_it_broke(
    soci: Soci, containerd: Containerd, tmp_path: Path
) -> None:
    made = ImageBuilder(tmp_path).layer({"big": os.urandom(RANGE_SIZE * 2 + 5)}, level=1).build()
    with Registry() as registry:
        image = registry.add_image(blobs_of(made))
        path = f"/blobs/{image.layers[0].digest}"
        # The first request only looks where the blob is.
        registry.fault(Truncate(path=path, skip=2, after=1000))
        soci("image", "rpull", "--snapshotter", "overlayfs", image.name)
        ranges = [request.headers.get("range") for request in registry.matching(path=path, method="GET")]
    first, *others = ranges
    assert first == "bytes=0-1"
    pieces = {
        f"bytes=0-{RANGE_SIZE - 1}",
        f"bytes={RANGE_SIZE}-{2 * RANGE_SIZE - 1}",
        f"bytes={2 * RANGE_SIZE}-{image.layers[0].size - 1}",
    }
    assert set(others) == pieces
    assert len(others) == 4, "one of them, which broke, again"
    assert containerd.content.size(image.layers[0].digest) == image.layers[0].size


def test_two_pulls_of_one_image_at_once_both_succeed(containerd: Containerd, tmp_path: Path) -> None:
    results: list[PulledImage] = []

    async def one(name: str) -> None:
        async with RegistryClient(keychain=StaticKeychain({})) as client:
            options = PullOptions(snapshotter="overlayfs")
            reference = Reference.parse(name)
            results.append(await pull(reference, containerd=containerd, registry=client, options=options))

    async def both(name: str) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, name)
            nursery.start_soon(one, name)

    with Registry() as registry:
        image = registry.add_image(blobs_of(an_image(tmp_path)))
        trio.run(both, image.name)
    assert len(results) == 2
    assert results[0].target == results[1].target
    assert len([one for one in containerd.snapshots("overlayfs").list() if one.committed]) == 2


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("redis", {"containerd.io/distribution.source.docker.io": "library/redis"}),
        ("localhost:5000/a/b", {"containerd.io/distribution.source.localhost": "a/b"}),
        ("[::1]:5000/a", {"containerd.io/distribution.source.[::1]": "a"}),
        ("[::1]/a", {"containerd.io/distribution.source.[::1]": "a"}),
    ],
)
def test_the_source_label_names_host_and_repository(name: str, label: dict[str, str]) -> None:
    assert source_label(Reference.parse(name)) == label


def test_chain_ids() -> None:
    one, two = Digest("sha256:" + "1" * 64), Digest("sha256:" + "2" * 64)
    assert chain_ids([]) == []
    chain = chain_ids([one, two, two])
    assert chain[0] == one
    # By containerd's identity.ChainID.
    assert chain[1] == "sha256:" + hashlib.sha256(f"{one} {two}".encode()).hexdigest()
    assert len(set(chain)) == 3
