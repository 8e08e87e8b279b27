"""Manifests and blobs: what comes back is what was asked for, or an error that names it."""

import json
from typing import Any

import pytest

from snapshotter import __version__
from snapshotter.errors import BlobNotFound, DigestMismatch, InvalidIndex, RegistryRefused
from snapshotter.oci.descriptor import Descriptor
from snapshotter.oci.media_types import DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST
from snapshotter.registry.client import RegistryClient
from snapshotter.units import Digest, sha256_digest
from tests.registry.conftest import StartRegistry
from tests.support.registry import FlipByte, Registry, Status
from tests.support.registry_clients import failure, run

ABSENT = Digest("sha256:" + "00" * 32)


@pytest.mark.parametrize("media_type", [OCI_MANIFEST, DOCKER_MANIFEST, OCI_INDEX, DOCKER_LIST])
@pytest.mark.parametrize("by", ["tag", "digest"])
def test_any_kind_of_manifest_is_found_by_tag_and_by_digest(
    start: StartRegistry, media_type: str, by: str
) -> None:
    registry = start()
    data = json.dumps({"schemaVersion": 2, "mediaType": media_type}).encode()
    digest = registry.add_manifest(data, media_type, tag="v1")
    ref = registry.reference("app", "v1" if by == "tag" else digest)
    expected = Descriptor(media_type, digest, len(data))

    async def work(client: RegistryClient) -> None:
        assert await client.resolve(ref) == expected
        assert await client.manifest(ref) == (expected, data)

    run(registry, work)
    assert [request.method for request in registry.requests] == ["HEAD", "GET"]


def test_requests_say_who_we_are_and_what_we_take(start: StartRegistry) -> None:
    registry = start()
    image = registry.add_image([b"x"], diff_ids=[ABSENT])
    run(registry, lambda client: client.manifest(registry.reference("app")))
    headers = registry.requests[0].headers
    assert headers["user-agent"] == f"soci-snapshotter/{__version__}"
    assert headers["accept-encoding"] == "identity"
    assert {OCI_MANIFEST, OCI_INDEX, DOCKER_LIST, DOCKER_MANIFEST} == set(headers["accept"].split(", "))
    assert image.digest


@pytest.mark.parametrize("missing", ["Docker-Content-Digest", "Content-Type"])
def test_a_head_that_says_too_little_is_followed_by_a_get(start: StartRegistry, missing: str) -> None:
    registry = start()
    image = registry.add_image([b"x"], diff_ids=[ABSENT])
    headers = {"Docker-Content-Digest": image.digest, "Content-Type": OCI_MANIFEST, "Content-Length": "10"}
    del headers[missing]
    registry.fault(Status(status=200, method="HEAD", headers=headers))
    found = run(registry, lambda client: client.resolve(registry.reference("app")))
    assert found == Descriptor(OCI_MANIFEST, image.digest, len(image.manifest))


@pytest.mark.parametrize("status", [403, 405])
def test_a_head_that_is_refused_is_followed_by_a_get(start: StartRegistry, status: int) -> None:
    registry = start()
    image = registry.add_image([b"x"], diff_ids=[ABSENT])
    registry.fault(Status(status=status, method="HEAD"))
    assert run(registry, lambda client: client.resolve(registry.reference("app"))).digest == image.digest


def test_a_digest_that_the_registry_calls_otherwise_is_refused(start: StartRegistry) -> None:
    registry = start()
    image = registry.add_image([b"x"], diff_ids=[ABSENT])
    headers = {"Docker-Content-Digest": ABSENT, "Content-Type": OCI_MANIFEST, "Content-Length": "10"}
    registry.fault(Status(status=200, method="HEAD", headers=headers))
    ref = registry.reference("app", image.digest)
    error = failure(registry, DigestMismatch, lambda: run(registry, lambda client: client.resolve(ref)))
    assert str(error) == f"manifest {image.digest} of {registry.host}/app: the registry calls it {ABSENT}"


def test_the_content_decides_where_the_header_is_vague(start: StartRegistry) -> None:
    registry = start()
    data = json.dumps({"schemaVersion": 2, "manifests": []}).encode()
    registry.add_manifest(data, "text/plain; charset=utf-8", tag="v1")
    descriptor, _ = run(registry, lambda client: client.manifest(registry.reference("app", "v1")))
    assert descriptor.media_type == OCI_INDEX


def test_a_header_with_parameters_is_understood(start: StartRegistry) -> None:
    registry = start()
    registry.add_manifest(b"{}", f"{OCI_MANIFEST.upper()}; charset=utf-8", tag="v1")
    assert (
        run(registry, lambda client: client.resolve(registry.reference("app", "v1"))).media_type
        == OCI_MANIFEST
    )


def test_what_is_no_manifest_is_refused(start: StartRegistry) -> None:
    registry = start()
    registry.add_manifest(b"<html>", "text/html", tag="v1")
    failure(
        registry,
        InvalidIndex,
        lambda: run(registry, lambda client: client.manifest(registry.reference("app", "v1"))),
    )


def test_a_manifest_of_more_than_4_mib_is_refused(start: StartRegistry) -> None:
    registry = start()
    registry.add_manifest(b" " * (4 << 20) + b"{}", tag="v1")
    ref = registry.reference("app", "v1")
    error = failure(registry, RegistryRefused, lambda: run(registry, lambda client: client.manifest(ref)))
    assert "sends more than 4194304 bytes" in str(error)


@pytest.mark.parametrize("by", ["tag", "digest"])
def test_a_damaged_manifest_is_asked_for_once_more(start: StartRegistry, by: str) -> None:
    registry = start()
    image = registry.add_image([b"x"], diff_ids=[ABSENT])
    ref = registry.reference("app", "latest" if by == "tag" else image.digest)
    registry.fault(FlipByte(at=5))
    assert run(registry, lambda client: client.manifest(ref))[1] == image.manifest
    registry.fault(FlipByte(at=5, count=2))
    error = failure(registry, DigestMismatch, lambda: run(registry, lambda client: client.manifest(ref)))
    assert str(error).startswith(
        f"manifest {ref.digest or 'latest'} of {registry.host}/app: {registry.host} sent"
    )


def test_a_blob_is_returned_whole(start: StartRegistry) -> None:
    registry = start()
    data = bytes(range(256)) * 1000
    digest = registry.add_blob(data)
    ref = registry.reference("app")
    assert run(registry, lambda client: client.blob(ref, digest, max_size=len(data))) == data
    described = Descriptor("x", digest, len(data))
    assert run(registry, lambda client: client.blob(ref, described, max_size=len(data))) == data


def test_an_empty_blob_is_a_blob(start: StartRegistry) -> None:
    registry = start()
    digest = registry.add_blob(b"")
    assert run(registry, lambda client: client.blob(registry.reference("app"), digest, max_size=0)) == b""


def test_a_blob_that_is_announced_too_large_is_not_even_asked_for(start: StartRegistry) -> None:
    registry = start()
    target = Descriptor("x", registry.add_blob(b"12345678"), 8)
    ref = registry.reference("app")
    error = failure(
        registry, RegistryRefused, lambda: run(registry, lambda client: client.blob(ref, target, max_size=7))
    )
    assert str(error) == f"blob {target.digest} of {ref.locator}: 8 bytes, more than the 7 allowed"
    assert registry.requests == []


def test_a_blob_that_turns_out_too_large_is_cut_off(start: StartRegistry) -> None:
    registry = start()
    digest = registry.add_blob(bytes(50 << 20))
    ref = registry.reference("app")
    error = failure(
        registry,
        RegistryRefused,
        lambda: run(registry, lambda client: client.blob(ref, digest, max_size=999)),
    )
    assert "sends more than 999 bytes" in str(error)


def test_a_damaged_blob_is_asked_for_once_more(start: StartRegistry) -> None:
    registry = start()
    digest = registry.add_blob(b"content")
    ref = registry.reference("app")
    registry.fault(FlipByte(at=3))
    assert run(registry, lambda client: client.blob(ref, digest, max_size=99)) == b"content"
    registry.fault(FlipByte(at=3, count=-1))
    error = failure(
        registry, DigestMismatch, lambda: run(registry, lambda client: client.blob(ref, digest, max_size=99))
    )
    wrong = sha256_digest(b"con\x8bent")
    assert str(error) == f"blob {digest} of {ref.locator}: {registry.host} sent content of digest {wrong}"


ASKS: dict[str, Any] = {
    "resolve": lambda client, ref: client.resolve(ref.with_digest(ABSENT)),
    "manifest": lambda client, ref: client.manifest(ref.with_digest(ABSENT)),
    "blob": lambda client, ref: client.blob(ref, ABSENT, max_size=9),
    "blob_source": lambda client, ref: client.blob_source(ref, ABSENT),
}


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("repository", ["app", "absent"])
def test_what_is_not_there_is_named(start: StartRegistry, ask: str, repository: str) -> None:
    registry = start()
    registry.add_blob(b"x")
    ref = registry.reference(repository)
    error = failure(registry, BlobNotFound, lambda: run(registry, lambda client: ASKS[ask](client, ref)))
    assert f"{ABSENT} of {registry.host}/{repository}: {registry.host} answered 404" in str(error)
    assert len(registry.requests) == 1


def test_has_blob_says_whether_it_is_there(start: StartRegistry) -> None:
    registry = start()
    digest = registry.add_blob(b"x")
    ref = registry.reference("app")
    assert run(registry, lambda client: client.has_blob(ref, digest)) is True
    assert run(registry, lambda client: client.has_blob(ref, ABSENT)) is False
    assert run(registry, lambda client: client.has_blob(registry.reference("other"), digest)) is False


def test_statistics_count_what_was_done(start: StartRegistry) -> None:
    registry: Registry = start()
    digest = registry.add_blob(b"x")
    registry.fault(Status(status=500, count=2))

    async def work(client: RegistryClient) -> None:
        await client.blob(registry.reference("app"), digest, max_size=9)
        assert (client.statistics().requests, client.statistics().retries) == (3, 2)

    run(registry, work)
