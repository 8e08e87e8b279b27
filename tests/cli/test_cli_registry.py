"""`soci create` and `soci convert` on images in registries, without containerd."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from snapshotter.oci.descriptor import Descriptor
from snapshotter.oci.media_types import OCI_MANIFEST, SOCI_INDEX_V1
from snapshotter.oci.reference import Reference
from snapshotter.registry.client import RegistryClient
from snapshotter.registry.keychain import StaticKeychain
from snapshotter.units import Digest
from tests.cli.conftest import Soci
from tests.soci.images import multi_platform
from tests.support import raw_tar
from tests.support.dockerregistry import Credentials, DockerRegistry
from tests.support.images import Image, ImageBuilder, layer, tar_layer
from tests.support.process import wait_until
from tests.support.registry import Drop, FlipByte, IgnoreRange, LoseReply, Registry, Stall, Status

REMOTE = ("--registry", "--min-layer-size", "0")
LARGE = 20 << 20
"""Several ranges."""


@pytest.fixture
def soci(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Soci:
    root = tmp_path / "root"
    return Soci(["--root", str(root)], root, capsys)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    layout = tmp_path_factory.mktemp("image")
    return ImageBuilder(layout).add(layer({"a": os.urandom(LARGE)}, level=0)).layer({"b": b"2"}).build()


@pytest.fixture(scope="module")
def other_registry(session_workdir: Path) -> Iterator[DockerRegistry]:
    registry = DockerRegistry(session_workdir / "other", credentials=Credentials("me", "secret"))
    try:
        yield registry.start()
    finally:
        registry.cleanup()


def referrers(name: str, digest: str) -> list[Descriptor]:
    async def find() -> tuple[Descriptor, ...]:
        async with RegistryClient(keychain=StaticKeychain({})) as client:
            return await client.referrers(Reference.parse(name).with_digest(Digest(digest)), SOCI_INDEX_V1)

    return list(trio.run(find))


def get(registry: DockerRegistry, repository: str, name: str) -> Any:
    """A manifest of a registry that asks for nothing."""
    accept = {"Accept": f"{OCI_MANIFEST}, application/vnd.oci.image.index.v1+json"}
    request = urllib.request.Request(f"{registry.url}/v2/{repository}/manifests/{name}", headers=accept)
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


def test_create_pushes_the_index_that_containerd_would_give(
    soci: Soci, docker_registry: DockerRegistry, image: Image
) -> None:
    name = docker_registry.push(image, "remote/create")
    out = soci("create", *REMOTE, name).out.splitlines()
    assert [line.split()[:2] for line in out[:2]] == [["layer", one.digest] for one in image.layers]
    (found,) = referrers(name, image.digest)
    assert out[-1] == f"successfully pushed artifact with digest: {found.digest}"
    assert not soci.root.exists()
    soci("create", "--oci-layout", image.layout, "--min-layer-size", "0", name)
    assert soci("index", "ls", "-q").out.split() == [found.digest]
    soci("create", *REMOTE, name)
    assert referrers(name, image.digest) == [found]


def test_convert_within_a_registry_moves_no_layer(
    soci: Soci, docker_registry: DockerRegistry, image: Image, tmp_path: Path
) -> None:
    name = docker_registry.push(image, "remote/from")
    before = len(docker_registry.requests())
    out = soci("convert", *REMOTE, name, f"{docker_registry.name}/remote/to:v2").out
    requests = docker_registry.requests()[before:]
    assert not [one for one in requests if one.method == "PUT" and image.layers[0].digest in one.path]
    served = sum(one.size for one in requests if one.kind == "blob" and image.layers[0].digest in one.path)
    assert image.layers[0].size <= served < image.layers[0].size + 1000
    soci("convert", "--standalone", "--min-layer-size", "0", image.layout, tmp_path / "out.tar")
    local = soci("convert", "--standalone", "--min-layer-size", "0", tmp_path / "out.tar", tmp_path / "b").out
    assert local.splitlines()[-1] == out.splitlines()[-1]
    entry, soci_entry = get(docker_registry, "remote/to", "v2")["manifests"]
    manifest = get(docker_registry, "remote/to", entry["digest"])
    assert manifest["annotations"]["com.amazon.soci.index-digest"] == soci_entry["digest"]
    assert get(docker_registry, "remote/from", "latest")["layers"] == manifest["layers"]


def test_convert_into_another_registry_reads_each_layer_once(
    soci: Soci, docker_registry: DockerRegistry, other_registry: DockerRegistry, image: Image
) -> None:
    name = docker_registry.push(image, "remote/away")
    target = f"{other_registry.name}/there/app:v2"
    before = len(docker_registry.requests())
    refused = soci.fails("convert", *REMOTE, name, target)
    assert other_registry.name in refused or "there/app" in refused
    assert not [one for one in docker_registry.requests()[before:] if one.kind == "blob"]
    soci("convert", *REMOTE, "--user", "me:secret", name, target)
    served = [one.size for one in docker_registry.requests()[before:] if image.layers[0].digest in one.path]
    assert image.layers[0].size <= sum(served) < image.layers[0].size + 1000
    for one in image.layers:
        path = other_registry.storage / "docker/registry/v2/blobs/sha256" / one.digest[7:9] / one.digest[7:]
        assert (path / "data").stat().st_size == one.size
    # Too small to be indexed, hence not read for it: copied all the same.
    soci("convert", "--registry", "--user", "me:secret", name, f"{other_registry.name}/there/big:v2")


def add_multi(registry: Registry, layout: Path) -> dict[str, Any]:
    """Put an image of two platforms and an attestation into the repository `app`, and return its list."""
    root = multi_platform(layout, {name: [layer({"a": name.encode()})] for name in ("amd64", "arm64")})
    blobs = {f"sha256:{path.name}": path.read_bytes() for path in (layout / "blobs/sha256").iterdir()}
    listing: dict[str, Any] = json.loads(blobs[root["digest"]])
    manifests = {one["digest"] for one in listing["manifests"]}
    for digest, data in blobs.items():
        if digest in manifests:
            registry.add_manifest(data)
        elif digest != root["digest"]:
            registry.add_blob(data)
    registry.add_manifest(blobs[root["digest"]], root["mediaType"], tag="latest")
    return listing


def test_other_platforms_and_attestations_come_along(soci: Soci, tmp_path: Path) -> None:
    with Registry() as here, Registry() as there:
        old = add_multi(here, tmp_path / "multi")["manifests"]
        target = there.reference("copy", "v2")
        soci("convert", *REMOTE, "-p", "linux/arm64", here.reference("app"), target)
        new = json.loads(there.manifest("copy", "v2"))["manifests"]
        assert [new[0], new[2]] == [old[0], old[2]]
        assert there.manifest("copy", old[0]["digest"]) == here.manifest("app", old[0]["digest"])
        again = there.reference("copy", "v3")
        soci("convert", *REMOTE, "--all-platforms", target, again)
        assert json.loads(there.manifest("copy", "v3"))["manifests"][1:4] == new[1:4]


def test_a_layer_that_is_not_what_it_should_be_ends_it_before_anything_is_named(soci: Soci) -> None:
    with Registry() as here, Registry() as there:
        data = layer({"a": os.urandom(1000)}).content
        assert isinstance(data, bytes)
        image = here.add_image([data])
        here.fault(FlipByte(path=image.layers[0].digest, count=-1))
        error = soci.fails("convert", *REMOTE, image.name, there.reference("copy", "v2"))
        assert image.layers[0].digest in error
        with pytest.raises(KeyError):
            there.manifest("copy", "v2")


def test_what_was_refused_midway_is_finished_by_the_next_run(soci: Soci) -> None:
    with Registry() as here, Registry() as there:
        data = layer({"a": os.urandom(1000)}).content
        assert isinstance(data, bytes)
        image = here.add_image([data])
        fault = there.fault(Status(path="/manifests/sha256", method="PUT", status=403))
        soci.fails("convert", *REMOTE, image.name, there.reference("copy", "v2"))
        assert fault.hits == 1
        there.clear_requests()
        soci("convert", *REMOTE, image.name, there.reference("copy", "v2"))
        assert not [one for one in there.matching(method="PUT") if "/blobs/" in one.path]
        assert len(json.loads(there.manifest("copy", "v2"))["manifests"]) == 2


def test_a_registry_that_hangs_up_has_no_index_until_the_next_run(soci: Soci) -> None:
    with Registry() as registry:
        data = layer({"a": os.urandom(1000)}).content
        assert isinstance(data, bytes)
        image = registry.add_image([data])
        fault = registry.fault(Drop(method="PUT", path="/manifests/", count=-1))
        assert registry.host in soci.fails("create", *REMOTE, image.name)
        assert fault.hits > 0
        assert referrers(image.name, image.digest) == []
        registry.clear_faults()
        soci("create", *REMOTE, image.name)
        assert len(referrers(image.name, image.digest)) == 1


@pytest.mark.parametrize("after", [0, 3 << 20, None])
def test_a_layer_whose_upload_breaks_is_read_again_from_there(soci: Soci, after: int | None) -> None:
    with Registry() as here, Registry() as there:
        data = layer({"a": os.urandom(6 << 20)}, level=0).content
        assert isinstance(data, bytes)
        image = here.add_image([data])
        # That of the layer; the small blobs travel beside it.
        broken = there.fault(LoseReply(method="PUT", path="/blobs/uploads", least=1 << 20, after=after))
        soci("convert", *REMOTE, image.name, there.reference("copy", "v2"))
        assert broken.hits == 1
        assert there.blob(image.layers[0].digest) == data
        served = sum(one.sent for one in here.matching(method="GET") if image.layers[0].digest in one.path)
        again = 0 if after is None else len(data) - after
        assert len(data) + again <= served < len(data) + again + 1000


def test_a_layer_that_turns_out_to_be_unfit_travels_all_the_same(soci: Soci) -> None:
    unfit = raw_tar.entry(b"first", name=b"a") + raw_tar.entry(name=b"b", flag=b"V") + bytes(1024)
    with Registry() as here, Registry() as there:
        blobs = [layer({"a": os.urandom(1000)}).content, tar_layer(unfit).content]
        image = here.add_image([one for one in blobs if isinstance(one, bytes)])
        out = soci("convert", *REMOTE, image.name, there.reference("copy", "v2")).out
        assert (
            f"{image.layers[1].digest} (application/vnd.oci.image.layer.v1.tar+gzip) cannot be indexed" in out
        )
        assert [there.blob(one.digest) for one in image.layers] == blobs


def test_an_upload_that_is_refused_ends_the_command(soci: Soci) -> None:
    with Registry() as here, Registry() as there:
        data = layer({"a": os.urandom(2 << 20)}, level=0).content
        assert isinstance(data, bytes)
        image = here.add_image([data])
        there.fault(Status(method="PUT", path="/blobs/uploads", least=1 << 20, status=413, count=-1))
        error = soci.fails("convert", *REMOTE, image.name, there.reference("copy", "v2"))
        assert f"upload of blob {image.layers[0].digest}" in error
        assert "413" in error


def test_a_registry_without_ranges_is_read_from_one_connection(soci: Soci) -> None:
    with Registry() as registry:
        data = layer({"a": os.urandom(1000)}).content
        assert isinstance(data, bytes)
        image = registry.add_image([data])
        registry.fault(IgnoreRange(path=image.layers[0].digest, count=-1))
        soci("create", *REMOTE, image.name)
        assert len(referrers(image.name, image.digest)) == 1


def test_an_image_is_verified_where_it_is(soci: Soci) -> None:
    with Registry() as registry:
        data = layer({"a": os.urandom(1000)}).content
        assert isinstance(data, bytes)
        image = registry.add_image([data])
        verify = ("index", "verify", "--registry", "--json")
        assert "no SOCI index" in soci.fails(*verify, image.name)
        soci("create", *REMOTE, image.name)
        soci("convert", *REMOTE, image.name, registry.reference("app", "v2"))
        for name in (image.name, registry.reference("app", "v2")):
            (verdict,) = json.loads(soci(*verify, name).out)
            assert verdict["ok"]
        (entry,) = referrers(image.name, image.digest)
        ztoc = json.loads(registry.manifest("app", entry.digest))["layers"][0]["digest"]
        registry.delete_blob("app", ztoc)
        outcome = soci("index", "verify", "--registry", image.name, code=1)
        assert f"zTOC {ztoc}" in outcome.out


def test_an_interrupt_ends_it_at_once_and_leaves_nothing(soci: Soci, tmp_path: Path) -> None:
    with Registry() as here, Registry() as there:
        data = layer({"a": os.urandom(1000)}).content
        assert isinstance(data, bytes)
        image = here.add_image([data])
        stall = here.fault(Stall(path=image.layers[0].digest, skip=1, count=-1))
        command = [sys.executable, "-m", "snapshotter.cli.main", "--root", str(soci.root), "convert", *REMOTE]
        environment = os.environ | {"TMPDIR": str(tmp_path)}
        process = subprocess.Popen(
            [*command, image.name, str(there.reference("copy", "v2"))],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        wait_until(lambda: stall.hits, timeout=60, what="the layer is asked for")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (130, "soci: interrupted\n")
        assert list(tmp_path.glob("soci-*")) == []
        with pytest.raises(KeyError):
            there.manifest("copy", "v2")


def test_the_options_name_one_place(soci: Soci, tmp_path: Path) -> None:
    assert "another place" in soci.fails("create", "--registry", "--oci-layout", tmp_path, "app")
    assert "another place" in soci.fails("convert", "--registry", "--standalone", "a", "b")
    assert "needs a tag" in soci.fails("convert", "--registry", "registry.example/a:1", "registry.example/b")
