"""Ranges: exactly the bytes asked for, into any buffer, from any number of threads, over few connections."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snapshotter import __version__
from snapshotter.registry.source import BlobSource
from snapshotter.units import sha256_digest
from tests.registry.conftest import StartRegistry
from tests.support.registry import Ecr, Registry
from tests.support.registry_clients import ranges_for, run
from tests.support.tls import Certificate

DATA = b"".join(sha256_digest(number.to_bytes(4)).encode() for number in range(20_000))


def source_of(registry: Registry, data: bytes = DATA) -> BlobSource:
    digest = registry.add_blob(data)
    return run(registry, lambda client: client.blob_source(registry.reference("app"), digest))


@pytest.fixture
def served(start: StartRegistry) -> tuple[Registry, BlobSource]:
    registry = start(auth=Ecr())
    return registry, source_of(registry)


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(first=st.integers(0, len(DATA) - 1), length=st.integers(1, 900_000))
def test_any_range_is_that_range(served: tuple[Registry, BlobSource], first: int, length: int) -> None:
    registry, source = served
    end = min(first + length, len(DATA))
    client = ranges_for(registry)
    assert client.read(source, first, end) == DATA[first:end]
    client.close()


def test_the_request_is_one_range_and_nothing_fancy(served: tuple[Registry, BlobSource]) -> None:
    registry, source = served
    registry.clear_requests()
    ranges_for(registry).read(source, 10, 20)
    (request,) = registry.requests
    assert request.method == "GET"
    assert request.headers["range"] == "bytes=10-19"
    assert request.headers["accept-encoding"] == "identity"
    assert request.headers["user-agent"] == f"soci-snapshotter/{__version__}"
    assert request.headers["authorization"] == source.headers["Authorization"]


def test_bytes_go_into_the_buffer_that_is_given(served: tuple[Registry, BlobSource]) -> None:
    registry, source = served
    buffer = bytearray(300_000)
    view = memoryview(buffer)[1000:201_000]
    assert ranges_for(registry).read(source, 5, 200_005, into=view) is view
    assert buffer == bytes(1000) + DATA[5:200_005] + bytes(99_000)


@pytest.mark.parametrize(
    "arguments", [(5, 5), (6, 5), (-1, 5), (0, 10, bytearray(9)), (0, 10, bytearray(11))]
)
def test_a_range_that_cannot_be_is_refused_before_it_is_sent(
    served: tuple[Registry, BlobSource], arguments: tuple[Any, ...]
) -> None:
    registry, source = served
    registry.clear_requests()
    start, end, *buffers = arguments
    with pytest.raises(ValueError, match="cannot be read"):
        ranges_for(registry).read(source, start, end, into=memoryview(buffers[0]) if buffers else None)
    assert registry.requests == []


def test_progress_adds_up_to_the_range(served: tuple[Registry, BlobSource]) -> None:
    registry, source = served
    pieces: list[int] = []
    ranges_for(registry).read(source, 0, 1_000_000, on_progress=pieces.append)
    assert sum(pieces) == 1_000_000
    assert len(pieces) > 1
    assert min(pieces) > 0


def test_progress_may_stop_the_read(served: tuple[Registry, BlobSource]) -> None:
    registry, source = served
    client = ranges_for(registry)

    def stop(count: int) -> None:
        raise InterruptedError(count)

    with pytest.raises(InterruptedError):
        client.read(source, 0, 1_000_000, on_progress=stop)
    assert client.read(source, 0, 1_000_000) == DATA[:1_000_000]


def test_one_thread_needs_one_connection(served: tuple[Registry, BlobSource]) -> None:
    registry, source = served
    registry.clear_requests()
    client = ranges_for(registry, connections=4)
    for start in range(0, 1_000_000, 100_000):
        client.read(source, start, start + 100_000)
    assert len({request.connection for request in registry.requests}) == 1


@pytest.mark.parametrize("tls", [False, True])
def test_threads_share_a_client(start: StartRegistry, certificate: Certificate, tls: bool) -> None:
    registry = start(presigned_ttl=60.0, certificate=certificate if tls else None)
    source = source_of(registry)
    registry.clear_requests()
    client = ranges_for(registry, connections=4)

    def read(number: int) -> bool:
        start_at = number * 12_345 % 1_000_000
        return client.read(source, start_at, start_at + 100_000) == DATA[start_at : start_at + 100_000]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(80)))
    assert len({request.connection for request in registry.requests}) <= 4
    client.close()


def test_a_connection_that_the_server_closed_is_replaced(served: tuple[Registry, BlobSource]) -> None:
    registry, source = served
    client = ranges_for(registry)
    client.read(source, 0, 10)
    with registry._server.lock:
        connections = list(registry._server._open)
    for connection in connections:
        connection.shutdown(2)
    time.sleep(0.05)
    assert client.read(source, 0, 10) == DATA[:10]


def test_other_threads_run_while_one_waits(start: StartRegistry) -> None:
    registry = start()
    source = source_of(registry)
    client = ranges_for(registry)
    done = threading.Event()

    def read() -> None:
        try:
            for _ in range(20):
                client.read(source, 0, 1_000_000)
        finally:
            done.set()

    thread = threading.Thread(target=read)
    thread.start()
    ticks = 0
    while not done.wait(0.001):
        ticks += 1
    thread.join()
    assert ticks > 0
