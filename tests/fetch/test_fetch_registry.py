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
from snapshotter.registry.source import BlobSource
from snapshotter.registry.tls import Trust
from tests.conftest import ExpectedLogs
from tests.fetch.rig import Layer, Rig, make_layer
from tests.support.registry import (
    Bearer,
    ExpireUrl,
    Fault,
    FlipByte,
    IgnoreRange,
    Registry,
    Status,
    Truncate,
)
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


class Mirrored:
    """A daemon with a mirror before the registry: it goes by what the fetcher complains about."""

    def __init__(self, rig: Rig, mirror: Registry, layer: Layer) -> None:
        self.complaints: list[str] = []
        self._rig = rig
        self._mirror = mirror
        self._layer = layer
        mirror.add_blob(layer.blob)
        rig.source = self._answer

    def _answer(self, question: control.NeedSource) -> control.FromDaemon:
        if question.mirror:
            assert question.mirror == "mirror.example"
            assert question.renew
            self.complaints.append(question.complaint)
        if self.complaints:
            return control.Source(question.layer, self._rig.place(question.layer))
        url = f"{self._mirror.url}/v2/app/blobs/{self._layer.digest}"
        trust = Trust((str(self._mirror.ca_file),) if self._mirror.ca_file else ())
        source = BlobSource(url, {}, self._mirror.host, "a blob", "mirror.example", trust)
        return control.Source(question.layer, source)


@pytest.fixture(params=["http", "https"])
def mirror(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    directory = tmp_path_factory.mktemp("mirror")
    certificate = make_certificate(directory) if request.param == "https" else None
    with Registry(certificate=certificate) as mirror:
        yield mirror


@pytest.fixture
def plain_rig(tmp_path: Path) -> Iterator[Rig]:
    with Registry() as registry, Rig(tmp_path, registry) as rig:
        yield rig


def test_spans_come_from_a_mirror_that_is_known_by_its_own_ca(plain_rig: Rig, mirror: Registry) -> None:
    layer = plain_rig.add(make_layer())
    daemon = Mirrored(plain_rig, mirror, layer)
    server = plain_rig.connect(layer)
    for span in range(len(layer.spans)):
        assert server.read(span) == layer.content(span)
    assert daemon.complaints == []
    assert plain_rig.registry.requests == []


@pytest.mark.parametrize(
    ("fault", "complaint", "count"),
    [
        (FlipByte(path="/blobs/", at=50, count=-1), control.LIED, "digest_mismatches"),
        (Status(path="/blobs/", status=503, count=-1), control.FAILED, "mirrors_passed_over"),
        (Status(path="/blobs/", status=404, count=-1), control.FAILED, "mirrors_passed_over"),
        (Status(path="/blobs/", status=403, count=-1), control.FAILED, "source_renewals"),
        (IgnoreRange(path="/blobs/", count=-1), control.FAILED, "range_not_honoured"),
        (Truncate(path="/blobs/", after=10, count=-1), control.FAILED, "mirrors_passed_over"),
    ],
    ids=["lie", "503", "404", "403", "no-ranges", "short"],
)
def test_a_span_that_a_mirror_does_not_give_comes_from_the_registry(
    plain_rig: Rig, fault: Fault, complaint: str, count: str
) -> None:
    with Registry() as mirror:
        layer = plain_rig.add(make_layer())
        daemon = Mirrored(plain_rig, mirror, layer)
        mirror.fault(fault)
        server = plain_rig.connect(layer)
        for span in range(len(layer.spans)):
            assert server.read(span) == layer.content(span)
        assert daemon.complaints == [complaint]
        assert plain_rig.count(count) >= 1
        assert plain_rig.count("failures") == 0


def test_a_background_goes_on_from_the_registry_too(plain_rig: Rig) -> None:
    with Registry() as mirror:
        layer = plain_rig.add(make_layer())
        daemon = Mirrored(plain_rig, mirror, layer)
        mirror.fault(FlipByte(path="/blobs/", at=50, count=-1))
        plain_rig.open(layer, background=True)
        plain_rig.wait_verified(layer)
        assert daemon.complaints == [control.LIED]


def test_presigned_urls_of_a_mirror_are_renewed_before_it_is_passed_over(plain_rig: Rig) -> None:
    with Registry() as mirror:
        layer = plain_rig.add(make_layer())
        daemon = Mirrored(plain_rig, mirror, layer)
        server = plain_rig.connect(layer)
        for span in range(3):
            mirror.fault(Status(path="/blobs/", status=403))
            assert server.read(span) == layer.content(span)
        assert daemon.complaints == []
        # Some are met by what is read ahead, which nobody has waited for.
        plain_rig.wait_for(lambda: plain_rig.count("source_renewals") >= 2, "renewals")
