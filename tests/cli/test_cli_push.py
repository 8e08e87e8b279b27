"""`soci push`: to registries with and without a referrers API, and to some that are not in the mood."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import trio

from snapshotter.oci.descriptor import Descriptor
from snapshotter.oci.media_types import SOCI_INDEX_V1
from snapshotter.oci.reference import Reference
from snapshotter.registry.client import RegistryClient
from snapshotter.registry.keychain import StaticKeychain
from snapshotter.soci.artifacts import ArtifactDatabase
from snapshotter.soci.content import read_verified
from snapshotter.soci.index import SociIndex, parse
from snapshotter.soci.store import LayoutStore
from snapshotter.units import Digest
from tests.cli.conftest import Soci
from tests.support.dockerregistry import DockerRegistry
from tests.support.images import Image, ImageBuilder
from tests.support.registry import Basic, Registry, Status
from tests.support.tls import make_certificate

ALL = ("--min-layer-size", "0", "--span-size", "65536")


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return (
        ImageBuilder(tmp_path / "image")
        .layer({"a": os.urandom(200_000)})
        .layer({"b": os.urandom(99)})
        .build()
    )


@pytest.fixture
def layout(image: Image) -> tuple[str, Path]:
    """The option that takes the image from its layout, and no containerd."""
    return "--oci-layout", image.layout


def hosted(registry: Registry, image: Image) -> str:
    """Put the image's manifest into the registry, and return its name."""
    manifest = image.layout / "blobs/sha256" / image.digest.removeprefix("sha256:")
    registry.add_manifest(manifest.read_bytes(), tag="latest")
    return str(registry.reference("app", "latest"))


def local_index(soci: Soci) -> SociIndex:
    row = ArtifactDatabase(soci.root).indices()[0]
    return parse(read_verified(LayoutStore(soci.root / "content"), row.digest))


def referrers(name: str, image: Image) -> list[Descriptor]:
    """What any client finds for the image."""

    async def find() -> tuple[Descriptor, ...]:
        async with RegistryClient(keychain=StaticKeychain({})) as client:
            subject = Reference.parse(name).with_digest(Digest(image.digest))
            return await client.referrers(subject, SOCI_INDEX_V1)

    return list(trio.run(find))


def fetch(name: str, index: Descriptor) -> tuple[bytes, dict[Digest, bytes]]:
    """The index as the registry has it, and the content of all that it names."""

    async def get() -> tuple[bytes, dict[Digest, bytes]]:
        async with RegistryClient(keychain=StaticKeychain({})) as client:
            reference = Reference.parse(name).with_digest(index.digest)
            _, data = await client.manifest(reference)
            manifest = json.loads(data)
            named = [Descriptor.from_json(one) for one in (manifest["config"], *manifest["layers"])]
            return data, {one.digest: await client.blob(reference, one, max_size=1 << 20) for one in named}

    return trio.run(get)


def test_referrers_api_round_trip(soci: Soci, image: Image, layout: tuple[str, Path]) -> None:
    with Registry() as registry:
        name = hosted(registry, image)
        soci("create", *ALL, *layout, name)
        out = soci("push", *layout, name).out.splitlines()
        index = local_index(soci)
        check_published(name, image, soci, index)
    assert out[0] == "checking if a soci index already exists in remote repository..."
    assert out[1] == f"pushing soci index with digest: {index.digest}"
    pushed = {line.rpartition(" ")[2] for line in out if line.startswith("successfully pushed artifact")}
    assert pushed == {index.digest, *(entry.ztoc for entry in index.ztocs)}


def check_published(name: str, image: Image, soci: Soci, index: SociIndex) -> None:
    (found,) = referrers(name, image)
    assert found == index.descriptor
    data, blobs = fetch(name, found)
    assert data == index.data
    store = LayoutStore(soci.root / "content")
    assert blobs == {digest: read_verified(store, digest) for digest in blobs}
    assert len(blobs) == 3


def test_fallback_tag_round_trip(
    soci: Soci, image: Image, layout: tuple[str, Path], docker_registry: DockerRegistry
) -> None:
    name = docker_registry.push(image, "push/fallback")
    soci("create", *ALL, *layout, name)
    soci("push", *layout, name)
    index = local_index(soci)
    check_published(name, image, soci, index)
    tag = "sha256-" + image.digest.removeprefix("sha256:")
    listing = json.loads(docker_registry.get(f"/v2/push/fallback/manifests/{tag}"))
    assert listing["manifests"] == [index.descriptor.to_json()]


def test_an_image_of_containerd_is_pushed_from_there(
    soci: Soci, image: Image, docker_registry: DockerRegistry
) -> None:
    name = docker_registry.push(image, "push/containerd")
    soci("image", "rpull", "--snapshotter", "overlayfs", name)
    soci("create", *ALL, name)
    soci("push", "--quiet", name)
    (found,) = referrers(name, image)
    assert found.digest == ArtifactDatabase(soci.root).indices()[0].digest


def test_quiet_prints_digests_alone_and_the_repository_may_be_new(
    soci: Soci, layout: tuple[str, Path]
) -> None:
    with Registry() as registry:
        name = str(registry.reference("app", "latest"))
        soci("create", *ALL, *layout, name)
        assert soci("push", "-q", *layout, name).out == f"{local_index(soci).digest}\n"


def test_an_existing_index_is_warned_about_skipped_or_allowed(
    soci: Soci, image: Image, layout: tuple[str, Path]
) -> None:
    with Registry() as registry:
        name = hosted(registry, image)
        soci("create", *ALL, *layout, name)
        soci("push", *layout, name)
        found = f"soci index found in remote repository with digest: {local_index(soci).digest}"
        before = registry.count(method="PUT")
        skipped = soci("push", "--existing-index", "skip", *layout, name).out
        assert f"{found}: skipping pushing artifacts for image manifest: sha256:" in skipped
        assert registry.count(method="PUT") == before
        warned = soci("push", *layout, name).out
        assert f"[WARN] {found}: pushing index anyway" in warned
        allowed = soci("push", "--existing-index", "allow", *layout, name).out
        assert "found" not in allowed
        assert "checking" not in allowed


def test_the_newest_index_of_the_platform_is_pushed(
    soci: Soci, image: Image, layout: tuple[str, Path]
) -> None:
    with Registry() as registry:
        name = hosted(registry, image)
        for tool in ("one", "two"):
            soci("create", *ALL, "--build-tool-identifier", tool, *layout, name)
        soci("push", *layout, name)
        (found,) = referrers(name, image)
        assert found.annotations["com.amazon.soci.build-tool-identifier"] == "two"


def test_a_refused_upload_publishes_nothing_and_the_next_run_finishes(
    soci: Soci, image: Image, layout: tuple[str, Path]
) -> None:
    with Registry() as registry:
        name = hosted(registry, image)
        soci("create", *ALL, *layout, name)
        registry.fault(
            Status(path="/blobs/uploads", method="PUT", status=403, code="DENIED", skip=1, count=-1)
        )
        error = soci.fails("push", "--max-concurrent-uploads", "1", *layout, name)
        assert registry.host in error
        assert referrers(name, image) == []
        assert registry.count(method="PUT", path="/manifests/") == 0
    with Registry() as registry:
        name = hosted(registry, image)
        registry.fault(Status(path="/blobs/uploads", method="PUT", status=403, code="DENIED", skip=1))
        soci.fails("push", "--max-concurrent-uploads", "1", *layout, name)
        done = registry.count(method="PUT", path="/blobs/uploads")
        soci("push", *layout, name)
        check_published(name, image, soci, local_index(soci))
        assert registry.count(method="PUT", path="/blobs/uploads") - done < 3


def test_what_nerdctl_says_is_understood(soci: Soci, image: Image, layout: tuple[str, Path]) -> None:
    with Registry() as registry:
        name = hosted(registry, image)
        soci("create", *ALL, *layout, name)
        nerdctl = ("--skip-verify", "--plain-http", "--hosts-dir", "/nowhere/certs.d,/nowhere/else")
        soci("push", *nerdctl, *layout, name)
        check_published(name, image, soci, local_index(soci))


def test_trust_of_the_command_line_holds_beside_the_hosts_directory(
    soci: Soci, image: Image, layout: tuple[str, Path], tmp_path: Path
) -> None:
    certificate = make_certificate(tmp_path)
    with Registry(certificate=certificate) as registry:
        name = hosted(registry, image)
        soci("create", *ALL, *layout, name)
        here = tmp_path / "certs.d" / registry.host
        here.mkdir(parents=True)
        (here / "hosts.toml").write_text(f'server = "https://{registry.host}"\n')
        hosts = ("--hosts-dir", here.parent)
        assert "is not trusted" in soci.fails("push", *hosts, *layout, name)
        soci("push", *hosts, "--tlscacert", certificate.ca_file, *layout, name)
        soci("push", *hosts, "--skip-verify", *layout, name)


def test_credentials(soci: Soci, image: Image, layout: tuple[str, Path]) -> None:
    with Registry(auth=Basic("writer", "right-password")) as registry:
        name = hosted(registry, image)
        soci("create", *ALL, *layout, name)
        wrong = soci.fails("push", "--user", "writer:wrong-password", *layout, name)
        assert registry.host in wrong
        assert "wrong-password" not in wrong
        soci("push", "--user", "writer:right-password", *layout, name)


def test_there_must_be_something_to_push(soci: Soci, layout: tuple[str, Path]) -> None:
    name = "registry.example/app:latest"
    error = soci.fails("push", *layout, name)
    assert error.startswith("could not find any soci index manifest v1 to push for platform linux/amd64")
    assert "`soci create`" in error
    soci("create", *ALL, *layout, name)
    lost = local_index(soci).ztocs[0].ztoc
    LayoutStore(soci.root / "content").remove(lost)
    assert str(lost) in soci.fails("push", *layout, name)
    assert "not a number of uploads" in soci.fails("push", "--max-concurrent-uploads=-1", *layout, name)
