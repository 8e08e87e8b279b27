"""Whole blobs as streams: resumed where they broke, verified at the end, given up when nothing helps."""

import hashlib
from collections.abc import Callable
from contextlib import aclosing

import pytest
import trio

from snapshotter.errors import (
    DigestMismatch,
    RangeNotHonoured,
    RegistryRefused,
    RegistryUnavailable,
    ShortBody,
)
from snapshotter.oci.descriptor import Descriptor
from snapshotter.registry.client import RegistryClient
from snapshotter.registry.retry import RetryPolicy
from snapshotter.registry.stream import PROGRESS
from snapshotter.units import Digest, sha256_digest
from tests.registry.conftest import StartRegistry
from tests.support.registry import (
    Bearer,
    Drop,
    Ecr,
    ExpireToken,
    ExpireUrl,
    Fault,
    FlipByte,
    IgnoreRange,
    Registry,
    Stall,
    Status,
    Truncate,
    WrongRange,
)
from tests.support.registry_clients import IMPATIENT, failure, run

DATA = hashlib.shake_256(b"stream").digest(3 << 20)


async def collect(client: RegistryClient, registry: Registry, target: Descriptor | Digest) -> bytes:
    received = bytearray()
    async with aclosing(client.stream_blob(registry.reference("app"), target)) as pieces:
        async for piece in pieces:
            received += piece
    return bytes(received)


def stream(registry: Registry, target: Descriptor | Digest, **options: object) -> bytes:
    return run(registry, lambda client: collect(client, registry, target), **options)


@pytest.mark.parametrize("data", [b"", b"x", DATA])
def test_a_stream_is_the_blob(start: StartRegistry, data: bytes) -> None:
    registry = start(auth=Ecr(), presigned_ttl=60.0)
    digest = registry.add_blob(data)
    assert stream(registry, digest) == data
    assert stream(registry, Descriptor("x", digest, len(data))) == data


@pytest.mark.parametrize(
    ("fault", "ranges"),
    [
        (lambda: Truncate(after=1_000_000), [None, (1_000_000, len(DATA))]),
        (lambda: Stall(after=1_000_000), [None, (1_000_000, len(DATA))]),
        (lambda: Truncate(after=len(DATA) - 1), [None, (len(DATA) - 1, len(DATA))]),
        (lambda: Truncate(after=0), [None, None]),
        (Drop, [None, None]),
        (lambda: Status(status=503), [None, None]),
    ],
)
def test_a_broken_stream_goes_on_where_it_broke(
    start: StartRegistry, fault: Callable[[], Fault], ranges: list[tuple[int, int] | None]
) -> None:
    registry = start()
    digest = registry.add_blob(DATA)
    registry.fault(fault())
    assert stream(registry, digest, timeouts=IMPATIENT) == DATA
    assert [request.range for request in registry.requests] == ranges


def test_credentials_and_urls_may_expire_in_the_middle(start: StartRegistry) -> None:
    registry = start(auth=Bearer(), presigned_ttl=60.0)
    digest = registry.add_blob(DATA)
    registry.fault(Truncate(path="/storage/", after=2_000_000))
    registry.fault(ExpireToken(path="/v2/", skip=2))
    registry.fault(ExpireUrl(path="/storage/", skip=1))
    assert stream(registry, digest) == DATA
    assert registry.matching(server="storage")[-1].range == (2_000_000, len(DATA))


def test_progress_renews_the_attempts(start: StartRegistry) -> None:
    registry = start()
    digest = registry.add_blob(DATA)
    for _ in range(2):
        registry.fault(Truncate(after=PROGRESS))
    assert stream(registry, digest, retry=RetryPolicy(attempts=2, first_wait=0.001)) == DATA
    assert len(registry.requests) == 3


def test_without_progress_the_attempts_run_out(start: StartRegistry) -> None:
    registry = start()
    digest = registry.add_blob(DATA)
    registry.fault(Truncate(after=1000, count=-1))
    error = failure(registry, ShortBody, lambda: stream(registry, digest))
    assert str(error) == f"blob {digest} of {registry.host}/app: {registry.host} ended the body early"
    assert [request.range and request.range[0] for request in registry.requests] == [None, 1000, 2000]


def test_a_damaged_stream_is_refused_at_its_end(start: StartRegistry) -> None:
    registry = start()
    digest = registry.add_blob(DATA)
    registry.fault(FlipByte(at=1_500_000))
    error = failure(registry, DigestMismatch, lambda: stream(registry, digest))
    assert str(error).startswith(f"blob {digest} of {registry.host}/app: ")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (IgnoreRange(skip=1, count=-1), "answers a range request with everything"),
        (WrongRange(skip=1, count=-1), "was sent [1001, "),
        (WrongRange(skip=1, header="", count=-1), "without a usable Content-Range"),
    ],
)
def test_a_rest_that_is_not_the_rest_is_refused(start: StartRegistry, fault: Fault, said: str) -> None:
    registry = start()
    digest = registry.add_blob(DATA)
    registry.fault(Truncate(after=1000))
    # Armed behind it: the first request is the truncated one's.
    fault.skip = 0
    registry.fault(fault)
    error = failure(registry, RangeNotHonoured, lambda: stream(registry, digest))
    assert said in str(error)


def test_more_than_the_descriptor_says_is_refused(start: StartRegistry) -> None:
    registry = start()
    target = Descriptor("x", registry.add_blob(DATA), 10)
    error = failure(registry, RegistryRefused, lambda: stream(registry, target))
    assert "sends more than 10 bytes" in str(error)


def test_less_than_the_descriptor_says_is_refused(start: StartRegistry) -> None:
    registry = start()
    target = Descriptor("x", registry.add_blob(DATA), len(DATA) + 1)
    failure(registry, DigestMismatch, lambda: stream(registry, target))


def test_without_a_size_a_broken_stream_cannot_go_on(start: StartRegistry) -> None:
    registry = start()
    body = b"5\r\nhello\r\n"
    digest = sha256_digest(b"hello")
    chunked = {"Transfer-Encoding": "chunked", "Connection": "close"}
    registry.fault(Status(status=200, headers=chunked, body=body))
    error = failure(registry, RegistryRefused, lambda: stream(registry, digest))
    assert "without its size it cannot be gone on with" in str(error)
    registry.fault(Status(status=200, headers=chunked, body=body + b"0\r\n\r\n"))
    assert stream(registry, digest) == b"hello"


def test_a_reader_may_stop_at_any_piece(start: StartRegistry) -> None:
    registry = start()
    digest = registry.add_blob(DATA)
    ref = registry.reference("app")

    async def work(client: RegistryClient) -> bytes:
        async with aclosing(client.stream_blob(ref, digest)) as pieces:
            async for piece in pieces:
                assert DATA.startswith(piece)
                break
        return await client.blob(ref, digest, max_size=len(DATA))

    assert run(registry, work) == DATA


def test_a_reader_may_be_cancelled_at_any_moment(start: StartRegistry) -> None:
    registry = start()
    digest = registry.add_blob(DATA)
    registry.fault(Stall(after=100_000, count=-1))

    async def work(client: RegistryClient) -> bytes:
        with trio.move_on_after(0.1) as scope:
            await collect(client, registry, digest)
        assert scope.cancelled_caught
        registry.clear_faults()
        return await collect(client, registry, digest)

    assert run(registry, work) == DATA


def test_a_registry_that_is_gone_is_named(start: StartRegistry) -> None:
    registry = start()
    digest = registry.add_blob(DATA)
    registry.close()
    error = failure(registry, RegistryUnavailable, lambda: stream(registry, digest))
    assert f"blob {digest} of {registry.host}/app: cannot reach {registry.host}" in str(error)
