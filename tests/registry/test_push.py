"""Uploads: what is there is not sent, what broke is begun again, what arrived is what was sent."""

import json
from dataclasses import replace

import pytest

from snapshotter.errors import (
    AuthenticationFailed,
    DigestMismatch,
    RegistryRefused,
    RegistryTimeout,
    RegistryUnavailable,
)
from snapshotter.oci.descriptor import Descriptor
from snapshotter.oci.media_types import EMPTY_JSON, OCI_MANIFEST
from snapshotter.registry.client import RegistryClient
from snapshotter.registry.keychain import StaticKeychain
from snapshotter.units import Digest, sha256_digest
from tests.registry.conftest import StartRegistry
from tests.support.registry import (
    Basic,
    Bearer,
    Drop,
    Ecr,
    ExpireToken,
    Fault,
    NoAuth,
    Redirect,
    Registry,
    Stall,
    Status,
)
from tests.support.registry_clients import IMPATIENT, QUICK, failure, run

DATA = bytes(range(256)) * 4000
DIGEST = sha256_digest(DATA)
MANIFEST = json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": {}, "layers": []}).encode()


def push(registry: Registry, data: bytes = DATA, **options: object) -> Descriptor:
    return run(registry, lambda client: client.push_blob(registry.reference("app"), data), **options)


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("mode", [NoAuth, Basic, Bearer, Ecr])
def test_a_blob_is_uploaded(start: StartRegistry, mode: type[NoAuth], relative: bool) -> None:
    registry = start(auth=mode(), relative_locations=relative)
    assert push(registry) == Descriptor("application/octet-stream", DIGEST, len(DATA))
    assert registry.blob(DIGEST) == DATA
    assert registry.has_blob("app", DIGEST)


def test_one_token_serves_a_whole_upload(start: StartRegistry) -> None:
    registry = start(auth=Bearer())
    push(registry)
    assert registry.count(server="token") == 1
    assert registry.matching(server="token")[0].query["scope"] == "repository:app:pull,push"


def test_an_empty_blob_is_uploaded(start: StartRegistry) -> None:
    registry = start()
    assert push(registry, b"").size == 0
    assert registry.has_blob("app", sha256_digest(b""))


def test_what_is_there_is_not_sent(start: StartRegistry) -> None:
    registry = start(presigned_ttl=60.0)
    registry.add_blob(DATA)
    push(registry)
    assert {request.method for request in registry.requests} == {"HEAD"}


@pytest.mark.parametrize(
    "fault",
    [
        Status(status=503, method="HEAD"),
        Status(status=500, method="POST"),
        Status(status=502, method="PUT"),
        Drop(method="PUT"),
        Stall(method="PUT"),
        ExpireToken(method="PUT"),
        ExpireToken(method="POST"),
    ],
)
def test_a_broken_upload_is_begun_again(start: StartRegistry, fault: Fault) -> None:
    registry = start(auth=Bearer())
    armed = registry.fault(replace(fault))
    push(registry, timeouts=IMPATIENT)
    assert registry.blob(DIGEST) == DATA
    assert armed.hits == 1


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        (Status(status=503, method="PUT", count=-1), RegistryUnavailable, "answered 503"),
        (Status(status=413, method="PUT", count=-1), RegistryRefused, "answered 413"),
        (
            Status(status=403, code="DENIED", method="POST", count=-1),
            AuthenticationFailed,
            "answered 403 DENIED",
        ),
        (Status(status=202, method="POST", count=-1), RegistryRefused, "opened an upload without a Location"),
        (
            Status(status=202, method="POST", headers={"Location": "ftp://x/"}, count=-1),
            RegistryRefused,
            "cannot be used",
        ),
        (
            Status(status=202, method="POST", headers={"Location": "http://[::1"}, count=-1),
            RegistryRefused,
            "no URL",
        ),
        (
            Redirect(method="POST", status=301, to="/elsewhere", count=-1),
            RegistryRefused,
            "redirects a POST by 301",
        ),
        (Stall(method="PUT", count=-1), RegistryTimeout, "too slow"),
    ],
)
def test_an_upload_that_cannot_work_is_named(
    start: StartRegistry, fault: Fault, kind: type[RegistryRefused], said: str
) -> None:
    registry = start()
    registry.fault(fault)
    error = failure(registry, kind, lambda: push(registry, timeouts=IMPATIENT))
    assert said in str(error)
    assert f"{registry.host}/app" in str(error)


def test_credentials_do_not_follow_an_upload_to_another_host(start: StartRegistry) -> None:
    registry, other = start(auth=Basic()), start()
    other.fault(Status(status=201, method="PUT"))
    registry.fault(Status(status=202, method="POST", headers={"Location": f"{other.url}/upload?state=1"}))
    push(registry)
    request = other.requests[0]
    assert "authorization" not in request.headers
    assert request.query == {"state": "1", "digest": DIGEST}
    assert request.body == DATA


def test_another_host_that_asks_for_credentials_gets_none(start: StartRegistry) -> None:
    registry, other = start(auth=Bearer()), start()
    other.fault(Status(status=401, count=-1, headers={"WWW-Authenticate": f'Basic realm="{other.host}"'}))
    registry.fault(Status(status=202, method="POST", headers={"Location": f"{other.url}/upload"}, count=-1))
    error = failure(registry, AuthenticationFailed, lambda: push(registry))
    assert f"{other.host} answered 401" in str(error)
    assert ["authorization" in request.headers for request in other.requests] == [False]


def test_an_upload_that_is_moved_takes_its_body_along(start: StartRegistry) -> None:
    registry = start()
    moved = Redirect(method="PUT", status=307, to="/v2/app/blobs/uploads/moved")
    registry.fault(moved)
    registry.fault(Status(status=201, path="/moved"))
    push(registry)
    assert registry.matching(path="/moved")[0].body == DATA


@pytest.mark.parametrize("mode", [Basic, Bearer])
def test_pushing_without_credentials_is_refused(start: StartRegistry, mode: type[NoAuth]) -> None:
    registry = start(auth=mode())
    failure(registry, AuthenticationFailed, lambda: push(registry, keychain=StaticKeychain({})))
    assert not registry.has_blob("app", DIGEST)


def test_a_blob_is_mounted_from_another_repository(start: StartRegistry) -> None:
    registry = start(auth=Bearer())
    registry.add_blob(DATA, repository="base/image")
    ref = registry.reference("app")
    assert run(registry, lambda client: client.mount_blob(ref, DIGEST, "base/image")) is True
    assert registry.has_blob("app", DIGEST)
    assert run(registry, lambda client: client.mount_blob(ref, DIGEST, "absent")) is False
    scope = registry.matching(server="token")[0].query["scope"]
    assert set(scope.split()) >= {"repository:app:pull,push"}


@pytest.mark.parametrize("by", ["tag", "digest"])
def test_a_manifest_is_uploaded_by_tag_or_by_digest(start: StartRegistry, by: str) -> None:
    registry = start(auth=Basic())
    data = json.dumps({"schemaVersion": 2, "manifests": []}).encode()
    name = "v1" if by == "tag" else sha256_digest(data)
    ref = registry.reference("app", name)
    pushed = run(registry, lambda client: client.push_manifest(ref, data, "application/x"))
    assert pushed == Descriptor("application/x", sha256_digest(data), len(data))
    assert registry.manifest("app", name) == data


def test_a_manifest_is_not_sent_under_another_digest(start: StartRegistry) -> None:
    registry = start()
    ref = registry.reference("app", sha256_digest(b"other"))
    error = failure(
        registry,
        DigestMismatch,
        lambda: run(registry, lambda client: client.push_manifest(ref, MANIFEST, OCI_MANIFEST)),
    )
    assert sha256_digest(MANIFEST) in str(error)
    assert registry.requests == []


def test_a_manifest_whose_blobs_are_missing_is_refused_by_the_registry(start: StartRegistry) -> None:
    registry = start()
    descriptor = {"mediaType": "x", "digest": sha256_digest(EMPTY_JSON), "size": 2}
    data = json.dumps({"schemaVersion": 2, "config": descriptor, "layers": []}).encode()
    ref = registry.reference("app", "v1")
    error = failure(
        registry,
        RegistryRefused,
        lambda: run(registry, lambda client: client.push_manifest(ref, data, OCI_MANIFEST)),
    )
    assert str(error) == (
        f"upload of manifest v1 to {registry.host}/app: {registry.host} answered 400 MANIFEST_BLOB_UNKNOWN"
    )


def test_a_registry_that_stores_something_else_is_found_out(start: StartRegistry) -> None:
    registry = start()
    lie = Digest("sha256:" + "00" * 32)
    registry.fault(Status(status=201, method="PUT", headers={"Docker-Content-Digest": lie}))
    ref = registry.reference("app", "v1")
    failure(
        registry,
        DigestMismatch,
        lambda: run(registry, lambda client: client.push_manifest(ref, MANIFEST, OCI_MANIFEST)),
    )


def test_a_pushed_image_is_pulled_back(start: StartRegistry) -> None:
    registry = start(auth=Bearer(), presigned_ttl=60.0)
    ref = registry.reference("app", "v1")

    async def work(client: RegistryClient) -> None:
        config = await client.push_blob(ref, EMPTY_JSON, "application/vnd.oci.image.config.v1+json")
        layer = await client.push_blob(ref, DATA)
        manifest = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": config.to_json(),
            "layers": [layer.to_json()],
        }
        pushed = await client.push_manifest(ref, json.dumps(manifest).encode(), OCI_MANIFEST)
        assert await client.resolve(ref) == pushed
        assert await client.blob(ref, layer, max_size=len(DATA)) == DATA

    run(registry, work, retry=QUICK)
