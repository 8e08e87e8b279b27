"""Where blobs are: which repository is asked, and who answers when one does not."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator

import pytest
import trio

from snapshotter.daemon.phases import Phases
from snapshotter.daemon.sources import BlobSources
from snapshotter.errors import BlobNotFound, RangeNotHonoured, RegistryUnavailable
from snapshotter.units import Digest, sha256_digest
from tests.conftest import ExpectedLogs
from tests.support.registry import Basic, IgnoreRange, Registry, Status
from tests.support.registry_clients import client_for

BLOB = b"the bytes of a layer" * 100
LAYER = sha256_digest(BLOB)


@pytest.fixture
def registry() -> Iterator[Registry]:
    with Registry(auth=Basic()) as registry:
        for repository in ("first", "second"):
            registry.add_blob(BLOB, repository=repository)
        yield registry


def with_sources(registry: Registry, test: Callable[[BlobSources], Awaitable[None]]) -> None:
    async def main() -> None:
        async with client_for(registry) as client:
            await test(BlobSources(client, Phases()))

    trio.run(main)


def repositories(registry: Registry) -> list[str]:
    """Return the repositories whose blob was asked for with credentials, in order."""
    return [
        request.path.split("/")[2]
        for request in registry.matching(path="/blobs/")
        if "authorization" in request.headers
    ]


def test_a_layer_that_no_image_has_is_not_found(registry: Registry) -> None:
    async def test(sources: BlobSources) -> None:
        with pytest.raises(BlobNotFound, match=LAYER):
            await sources.find(LAYER, renew=False)
        assert registry.requests == []

    with_sources(registry, test)


def test_it_is_found_where_it_was_learned_last(registry: Registry) -> None:
    async def test(sources: BlobSources) -> None:
        for name in ("first", "second", "first"):
            sources.learn(LAYER, registry.reference(name))
        source = await sources.find(LAYER, renew=False)
        assert "/first/" in source.url
        assert repositories(registry) == ["first"]

    with_sources(registry, test)


def test_a_source_is_kept_until_it_is_to_be_renewed(registry: Registry) -> None:
    async def test(sources: BlobSources) -> None:
        sources.learn(LAYER, registry.reference("first"))
        for _ in range(3):
            await sources.find(LAYER, renew=False)
        assert len(repositories(registry)) == 1
        await sources.find(LAYER, renew=True)
        assert len(repositories(registry)) == 2

    with_sources(registry, test)


def test_when_one_repository_refuses_the_other_is_asked(
    registry: Registry, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("does not give a layer")
    registry.delete_blob("second", LAYER)

    async def test(sources: BlobSources) -> None:
        for name in ("first", "second"):
            sources.learn(LAYER, registry.reference(name))
        assert "/first/" in (await sources.find(LAYER, renew=False)).url

    with_sources(registry, test)


def test_when_all_refuse_the_last_word_is_raised(registry: Registry, expected_logs: ExpectedLogs) -> None:
    expected_logs.allow("does not give a layer")
    registry.fault(Status(path="/second/blobs/", status=404, count=-1))
    registry.fault(Status(path="/first/blobs/", status=503, count=-1))

    async def test(sources: BlobSources) -> None:
        for name in ("first", "second"):
            sources.learn(LAYER, registry.reference(name))
        with pytest.raises(RegistryUnavailable) as info:
            await sources.find(LAYER, renew=False)
        assert info.value.temporary
        registry.assert_no_secret(str(info.value))

    with_sources(registry, test)


def test_a_registry_without_ranges_is_an_error_of_its_own(
    registry: Registry, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("does not give a layer")
    registry.fault(IgnoreRange(count=-1))

    async def test(sources: BlobSources) -> None:
        sources.learn(LAYER, registry.reference("first"))
        with pytest.raises(RangeNotHonoured):
            await sources.find(LAYER, renew=False)

    with_sources(registry, test)


def test_what_is_forgotten_is_not_asked_for(registry: Registry) -> None:
    async def test(sources: BlobSources) -> None:
        sources.learn(LAYER, registry.reference("first"))
        sources.forget(LAYER)
        sources.forget(Digest("sha256:" + "0" * 64))
        with pytest.raises(BlobNotFound):
            await sources.find(LAYER, renew=True)

    with_sources(registry, test)


def test_a_source_shows_no_secret(registry: Registry) -> None:
    async def test(sources: BlobSources) -> None:
        sources.learn(LAYER, registry.reference("first"))
        source = await sources.find(LAYER, renew=False)
        registry.assert_no_secret(repr(source), str(source))

    with_sources(registry, test)
