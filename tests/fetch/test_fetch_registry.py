"""With the daemon's real way of finding a blob: registry client, redirect, presigned URL, TLS."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from snapshotter.errors import RegistryError
from snapshotter.fetch import control
from snapshotter.registry.client import RegistryClient
from snapshotter.registry.keychain import StaticKeychain
from tests.conftest import ExpectedLogs
from tests.fetch.rig import Layer, Rig, make_layer
from tests.support.registry import Bearer, ExpireUrl, Registry
from tests.support.tls import make_certificate

STORAGE = "/storage/"


def by_registry_client(
    registry: Registry, layer: Layer
) -> Callable[[control.NeedSource], control.FromDaemon]:
    """Answer as the daemon does."""

    async def ask(renew: bool) -> control.Source | control.NoSource:
        try:
            async with RegistryClient(
                keychain=StaticKeychain({}), plain_http=registry.certificate is None, ca_file=registry.ca_file
            ) as client:
                reference = registry.reference("app")
                return control.Source(
                    layer.digest, await client.blob_source(reference, layer.digest, renew=renew)
                )
        except RegistryError as error:
            return control.NoSource(layer.digest, str(error), temporary=error.temporary)

    return lambda question: trio.run(ask, question.renew)


@pytest.fixture(params=["http", "https"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Registry]:
    certificate = make_certificate(tmp_path) if request.param == "https" else None
    with Registry(presigned_ttl=60, certificate=certificate) as registry:
        yield registry


@pytest.fixture
def rig(tmp_path: Path, registry: Registry) -> Iterator[Rig]:
    with Rig(tmp_path, registry, options={"ca_file": str(registry.ca_file or "")}) as rig:
        yield rig


def test_blobs_are_read_where_the_registry_sends_us(rig: Rig, registry: Registry) -> None:
    layer = rig.add(make_layer())
    rig.source = by_registry_client(registry, layer)
    server = rig.connect(layer)
    assert server.read(4) == layer.content(4)
    rig.open(layer, background=True)
    rig.wait_verified(layer)
    assert registry.count(path="/blobs/") == 1, "one redirect for all"
    assert registry.count(path=STORAGE) > 1
    assert all("authorization" not in request.headers for request in registry.matching(path=STORAGE))


@pytest.mark.parametrize("skip", [1, 3])
def test_a_url_that_expires_in_the_middle_is_renewed(rig: Rig, registry: Registry, skip: int) -> None:
    layer = rig.add(make_layer())
    rig.source = by_registry_client(registry, layer)
    registry.fault(ExpireUrl(path=STORAGE, skip=skip))
    server = rig.connect(layer)
    for span in range(len(layer.spans)):
        assert server.read(span) == layer.content(span)
    assert [question.renew for question in rig.questions] == [False, True]
    rig.wait_verified(layer)


def test_the_background_renews_what_has_expired(rig: Rig, registry: Registry) -> None:
    layer = rig.add(make_layer())
    rig.source = by_registry_client(registry, layer)
    registry.fault(ExpireUrl(path=STORAGE, skip=1, count=2))
    rig.open(layer, background=True)
    rig.wait_verified(layer)
    assert rig.count("source_renewals") >= 1
    assert rig.count("failures") == 0


def test_a_registry_that_wants_credentials_we_do_not_have_fails_the_readers(
    tmp_path: Path, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("no source for layer")
    expected_logs.allow("span cannot be had")
    with Registry(auth=Bearer()) as registry, Rig(tmp_path, registry) as rig:
        layer = rig.add(make_layer())
        rig.source = by_registry_client(registry, layer)
        server = rig.connect(layer)
        server.want(4)
        server.wait_failed(4)
        assert rig.count("source_errors") == 1
