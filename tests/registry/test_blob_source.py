"""Where a blob's bytes are: kept, renewed when it is asked for, and of no use to anybody who reads messages."""

import pytest
import trio

from snapshotter.errors import RangeNotHonoured, RegistryRefused
from snapshotter.registry.client import RegistryClient
from snapshotter.registry.source import BlobSource
from snapshotter.units import Digest
from tests.registry.conftest import StartRegistry
from tests.support.registry import (
    Basic,
    Bearer,
    Ecr,
    ExpireToken,
    ExpireUrl,
    IgnoreRange,
    NoAuth,
    Redirect,
    Registry,
    Stall,
    Status,
    WrongRange,
)
from tests.support.registry_clients import failure, ranges_for, run

DATA = bytes(range(256)) * 40


def find(registry: Registry, digest: Digest) -> BlobSource:
    return run(registry, lambda client: client.blob_source(registry.reference("app"), digest))


@pytest.mark.parametrize("presigned_ttl", [None, 60.0])
@pytest.mark.parametrize("mode", [NoAuth, Basic, Bearer, Ecr])
def test_a_source_is_all_that_a_reader_needs(
    start: StartRegistry, mode: type[NoAuth], presigned_ttl: float | None
) -> None:
    registry = start(auth=mode(), presigned_ttl=presigned_ttl)
    digest = registry.add_blob(DATA)
    source = find(registry, digest)
    assert source.host == registry.storage_host
    assert source.what == f"blob {digest} of {registry.host}/app"
    assert ("Authorization" in source.headers) == (mode is not NoAuth and presigned_ttl is None)
    registry.clear_requests()
    assert ranges_for(registry).read(source, 100, 9000) == DATA[100:9000]
    assert [request.status for request in registry.requests] == [206]


def test_two_bytes_are_asked_for(start: StartRegistry) -> None:
    registry = start(presigned_ttl=60.0)
    find(registry, registry.add_blob(DATA))
    assert [(request.method, request.range) for request in registry.requests] == [
        ("GET", (0, 2)),
        ("GET", (0, 2)),
    ]
    assert registry.requests[-1].sent == 2


def test_a_source_is_kept_for_each_blob_of_each_repository(start: StartRegistry) -> None:
    registry = start(presigned_ttl=60.0)
    digest, other = registry.add_blob(DATA), registry.add_blob(b"another")
    registry.add_blob(DATA, repository="second")
    app, second = registry.reference("app"), registry.reference("second")

    async def work(client: RegistryClient) -> None:
        first = await client.blob_source(app, digest)
        assert await client.blob_source(app.with_digest(digest), digest) is first
        assert registry.count(server="storage") == 1
        assert await client.blob_source(app, other) != first
        assert await client.blob_source(second, digest) != first
        assert registry.count(server="storage") == 3

    run(registry, work)


def test_of_many_sources_the_longest_unused_are_forgotten(
    start: StartRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snapshotter.registry.client.MAX_SOURCES", 2)
    registry = start()
    digests = [registry.add_blob(b"blob %d" % number) for number in range(3)]
    ref = registry.reference("app")

    async def work(client: RegistryClient) -> None:
        for index in (0, 1, 0, 2, 0, 1):
            await client.blob_source(ref, digests[index])

    run(registry, work)
    assert [request.path[-71:] for request in registry.requests] == [digests[index] for index in (0, 1, 2, 1)]


def test_renewing_gets_another_url_and_keeps_that(start: StartRegistry) -> None:
    registry = start(auth=Ecr(), presigned_ttl=60.0)
    digest = registry.add_blob(DATA)
    ref = registry.reference("app")

    async def work(client: RegistryClient) -> None:
        first = await client.blob_source(ref, digest)
        second = await client.blob_source(ref, digest, renew=True)
        assert second.url != first.url
        assert await client.blob_source(ref, digest) is second

    run(registry, work)


def test_renewing_gets_another_token_when_the_old_one_is_refused(start: StartRegistry) -> None:
    registry = start(auth=Bearer())
    digest = registry.add_blob(DATA)
    ref = registry.reference("app")

    async def work(client: RegistryClient) -> None:
        first = await client.blob_source(ref, digest)
        registry.fault(ExpireToken(path="/blobs/"))
        second = await client.blob_source(ref, digest, renew=True)
        assert second.headers != first.headers
        assert ranges_for(registry).read(second, 0, 10) == DATA[:10]

    run(registry, work)


def test_many_tasks_share_one_round(start: StartRegistry) -> None:
    registry = start(presigned_ttl=60.0)
    digest = registry.add_blob(DATA)
    registry.fault(Stall(seconds=0.1))
    found = []

    async def ask(client: RegistryClient, renew: bool) -> None:
        found.append(await client.blob_source(registry.reference("app"), digest, renew=renew))

    async def work(client: RegistryClient) -> None:
        async with trio.open_nursery() as nursery:
            for index in range(20):
                nursery.start_soon(ask, client, index % 2 == 0)

    run(registry, work)
    assert len(set(found)) == 1
    assert len(registry.requests) == 2


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (IgnoreRange(count=-1), "answers a range request with everything"),
        (WrongRange(count=-1), r"asked .* for bytes [0, 2), was sent [1, 3)"),
        (WrongRange(header="", count=-1), "without a usable Content-Range"),
    ],
)
def test_a_registry_without_ranges_is_found_out_at_once(
    start: StartRegistry, fault: IgnoreRange, said: str
) -> None:
    registry = start()
    digest = registry.add_blob(bytes(30 << 20))
    registry.fault(fault)
    error = failure(registry, RangeNotHonoured, lambda: find(registry, digest))
    assert str(error).startswith(f"blob {digest} of {registry.host}/app: ")
    assert said.replace("asked .* for", f"asked {registry.host} for") in str(error)
    assert len(registry.requests) == 1


def test_a_url_that_dies_on_the_way_is_made_anew(start: StartRegistry) -> None:
    registry = start(auth=Basic(), presigned_ttl=60.0)
    digest = registry.add_blob(DATA)
    registry.fault(ExpireUrl(path="/storage/"))
    assert ranges_for(registry).read(find(registry, digest), 0, 2) == DATA[:2]
    assert registry.count(server="storage", path=digest) == 3


def test_a_temporary_failure_is_tried_again(start: StartRegistry) -> None:
    registry = start(presigned_ttl=60.0)
    digest = registry.add_blob(DATA)
    registry.fault(Status(status=503))
    registry.fault(Status(status=500, path="/storage/"))
    assert find(registry, digest).host == registry.storage_host


def test_a_loop_is_refused(start: StartRegistry) -> None:
    registry = start()
    digest = registry.add_blob(DATA)
    registry.fault(Redirect(count=-1))
    error = failure(registry, RegistryRefused, lambda: find(registry, digest))
    assert "redirects in a loop" in str(error)


def test_a_failure_is_not_kept(start: StartRegistry) -> None:
    registry = start()
    digest = registry.add_blob(DATA)
    registry.fault(Status(status=400))

    async def work(client: RegistryClient) -> None:
        with pytest.raises(RegistryRefused):
            await client.blob_source(registry.reference("app"), digest)
        assert (await client.blob_source(registry.reference("app"), digest)).host == registry.host

    run(registry, work)
