"""Proxies from the environment: both clients go by the same variables. The test registry plays the proxy."""

import base64

import pytest

from snapshotter.errors import RegistryUnavailable
from snapshotter.oci.reference import Reference
from snapshotter.registry.source import BlobSource
from tests.registry.conftest import StartRegistry
from tests.support.registry import Registry
from tests.support.registry_clients import failure, ranges_for, run

DATA = bytes(range(256))
BEHIND = "registry.invalid"
"""A name that only a proxy can reach."""


@pytest.fixture(autouse=True)
def no_other_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def source_behind(registry: Registry) -> BlobSource:
    digest = registry.add_blob(DATA)
    return BlobSource(f"http://{BEHIND}/v2/app/blobs/{digest}", {}, BEHIND)


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
@pytest.mark.parametrize("scheme", ["http://", ""])
def test_both_clients_use_the_proxy(
    start: StartRegistry, monkeypatch: pytest.MonkeyPatch, variable: str, scheme: str
) -> None:
    registry = start()
    source = source_behind(registry)
    image = registry.add_image([DATA], layer_media_type="application/vnd.oci.image.layer.v1.tar")
    monkeypatch.setenv(variable, f"{scheme}{registry.host}")
    assert ranges_for(registry).read(source, 5, 100) == DATA[5:100]
    ref = Reference.parse(f"{BEHIND}/app:latest")
    assert run(registry, lambda client: client.resolve(ref), plain_http=True).digest == image.digest
    assert [request.headers["host"] for request in registry.requests] == [BEHIND, BEHIND]


def test_the_proxys_own_credentials_are_sent_to_it(
    start: StartRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = start()
    source = source_behind(registry)
    monkeypatch.setenv("HTTP_PROXY", f"http://user:p%40ss@{registry.host}")
    ranges_for(registry).read(source, 0, 10)
    sent = registry.requests[0].headers["proxy-authorization"]
    assert base64.b64decode(sent.removeprefix("Basic ")) == b"user:p@ss"


@pytest.mark.parametrize("exception", ["other.example,127.0.0.1", "*"])
def test_no_proxy_means_none(start: StartRegistry, monkeypatch: pytest.MonkeyPatch, exception: str) -> None:
    registry = start()
    digest = registry.add_blob(DATA)
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.invalid:3128")
    monkeypatch.setenv("NO_PROXY", exception)
    source = run(registry, lambda client: client.blob_source(registry.reference("app"), digest))
    assert ranges_for(registry).read(source, 0, 10) == DATA[:10]


def test_a_proxy_for_https_is_not_one_for_http(start: StartRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = start()
    monkeypatch.setenv("HTTPS_PROXY", registry.url)
    source = source_behind(registry)
    failure(registry, RegistryUnavailable, lambda: ranges_for(registry).read(source, 0, 10))
    assert registry.requests == []


def test_a_proxy_that_is_gone_is_a_registry_that_cannot_be_reached(
    start: StartRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = start()
    source = source_behind(registry)
    monkeypatch.setenv("HTTP_PROXY", f"http://user:hidden@{registry.host}")
    registry.close()
    error = failure(registry, RegistryUnavailable, lambda: ranges_for(registry).read(source, 0, 10))
    assert f"cannot reach {BEHIND}" in str(error)
    assert "hidden" not in str(error)
