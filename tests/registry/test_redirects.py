"""Redirects: followed, counted, and never followed by a credential."""

import pytest

from snapshotter.errors import RegistryRefused
from tests.registry.conftest import StartRegistry
from tests.support.registry import Basic, Redirect, Registry, Status
from tests.support.registry_clients import failure, run
from tests.support.tls import Certificate

DATA = b"some bytes"


def fetch(registry: Registry, digest: str, **options: object) -> bytes:
    return run(
        registry, lambda client: client.blob(registry.reference("app"), digest, max_size=99), **options
    )


def test_credentials_stay_with_the_registry(start: StartRegistry) -> None:
    registry, other = start(auth=Basic()), start()
    digest = registry.add_blob(DATA)
    other.add_blob(DATA)
    registry.fault(Redirect(path="/blobs/", skip=1, to=f"{other.url}/v2/app/blobs/{digest}"))
    assert fetch(registry, digest) == DATA
    assert "authorization" in registry.requests[1].headers
    assert [request.headers.get("authorization") for request in other.requests] == [None]


def test_credentials_go_along_within_the_registry(start: StartRegistry) -> None:
    registry = start(auth=Basic())
    digest = registry.add_blob(DATA, repository="elsewhere")
    registry.fault(Redirect(path="/app/blobs/", skip=1, to=f"/v2/elsewhere/blobs/{digest}"))
    assert fetch(registry, digest) == DATA
    assert registry.requests[-1].path == f"/v2/elsewhere/blobs/{digest}"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_every_kind_of_redirect_is_followed(start: StartRegistry, status: int) -> None:
    registry = start()
    digest = registry.add_blob(DATA, repository="elsewhere")
    registry.fault(Redirect(path="/app/", status=status, to=f"../../elsewhere/blobs/{digest}"))
    assert fetch(registry, digest) == DATA


def test_ten_redirects_are_followed_and_no_more(start: StartRegistry) -> None:
    registry = start()
    digest = registry.add_blob(DATA)
    for hop in range(10):
        registry.fault(Redirect(path=f"/blobs/{digest}", to=f"/v2/app/blobs/{digest}?hop={hop}", count=1))
    assert fetch(registry, digest) == DATA
    for hop in range(11):
        registry.fault(Redirect(path=f"/blobs/{digest}", to=f"/v2/app/blobs/{digest}?hop={hop}", count=1))
    error = failure(registry, RegistryRefused, lambda: fetch(registry, digest))
    assert "more than 10 redirects" in str(error)


def test_a_loop_of_two_is_seen(start: StartRegistry) -> None:
    registry = start()
    digest = registry.add_blob(DATA)
    registry.fault(Redirect(path="/app/", to=f"/v2/other/blobs/{digest}", count=-1))
    registry.fault(Redirect(path="/other/", to=f"/v2/app/blobs/{digest}", count=-1))
    error = failure(registry, RegistryRefused, lambda: fetch(registry, digest))
    assert "redirects in a loop" in str(error)
    assert len(registry.requests) == 2


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("http://[::1", "sends us to something that is no URL"),
        ("ftp://x.example/secret-part", "redirects to a URL that is not http or https"),
    ],
)
def test_a_redirect_to_nowhere_is_refused_without_being_shown(
    start: StartRegistry, location: str, said: str
) -> None:
    registry = start()
    digest = registry.add_blob(DATA)
    registry.fault(Redirect(path="/blobs/", to=location))
    error = failure(registry, RegistryRefused, lambda: fetch(registry, digest))
    assert said in str(error)
    assert "secret-part" not in str(error)


def test_https_is_not_left_for_plain_http(start: StartRegistry, certificate: Certificate) -> None:
    registry, plain = start(certificate=certificate), start()
    digest = registry.add_blob(DATA)
    plain.add_blob(DATA)
    registry.fault(Redirect(path="/blobs/", to=f"{plain.url}/v2/app/blobs/{digest}", count=-1))
    error = failure(registry, RegistryRefused, lambda: fetch(registry, digest))
    assert f"{registry.host} redirects from https to plain http at {plain.host}" in str(error)
    assert plain.requests == []


def test_plain_http_leads_to_https_and_back_where_plain_http_was_asked_for(
    start: StartRegistry, certificate: Certificate
) -> None:
    plain, secure = start(), start(certificate=certificate)
    digest = plain.add_blob(DATA)
    plain.fault(Redirect(path="/app/", to=f"{secure.url}/v2/app/blobs/{digest}"))
    secure.fault(Redirect(path="/app/", to=f"{plain.url}/v2/app/blobs/{digest}?again"))
    assert fetch(plain, digest, plain_http=True, ca_file=certificate.ca_file) == DATA


def test_a_certificate_that_is_not_trusted_is_final(start: StartRegistry, certificate: Certificate) -> None:
    registry = start(certificate=certificate)
    digest = registry.add_blob(DATA)
    error = failure(registry, RegistryRefused, lambda: fetch(registry, digest, ca_file=None))
    assert f"certificate of {registry.host} is not trusted: self-signed certificate" in str(error)
    assert registry.requests == []


def test_cookies_are_not_kept(start: StartRegistry) -> None:
    registry = start()
    digest = registry.add_blob(DATA)
    registry.fault(Status(status=503, headers={"Set-Cookie": "session=1; Path=/"}))
    assert fetch(registry, digest) == DATA
    assert [request.headers.get("cookie") for request in registry.requests] == [None, None]
