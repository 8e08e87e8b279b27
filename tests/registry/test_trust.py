"""What both clients need of TLS: a CA file that is one, and a handshake that does not last for ever, or fails."""

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from snapshotter.errors import ConfigError, RegistryTimeout, RegistryUnavailable
from snapshotter.oci.reference import Reference
from snapshotter.registry.client import RegistryClient
from snapshotter.registry.keychain import StaticKeychain
from snapshotter.registry.ranges import RangeClient
from snapshotter.registry.retry import RetryPolicy, Timeouts
from snapshotter.registry.source import BlobSource
from snapshotter.registry.tls import system_reason
from tests.registry.conftest import StartRegistry
from tests.support.registry_clients import failure, ranges_for, run

SHORT = Timeouts(connect=0.2, read=60.0, total=120.0)


@pytest.fixture
def mute() -> Iterator[str]:
    """Host and port of a server whose kernel takes connections, and which says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("content", [None, "", "not a certificate"])
def test_a_ca_file_that_is_none_is_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=f"CA file {path}: cannot be used"):
        RangeClient(connections=1, ca_file=path)
    with pytest.raises(ConfigError, match=f"CA file {path}: cannot be used"):
        RegistryClient(keychain=StaticKeychain({}), ca_file=path)


def test_a_handshake_without_an_answer_is_a_timeout_of_the_api(mute: str) -> None:
    async def main() -> None:
        async with RegistryClient(
            keychain=StaticKeychain({}), plain_http=False, timeouts=SHORT, retry=RetryPolicy(attempts=1)
        ) as client:
            await client.manifest(Reference.parse(f"{mute}/app:v1"))

    started = time.monotonic()
    with pytest.raises(RegistryTimeout, match=f"manifest v1 of {mute}/app: too slow connecting to {mute}"):
        trio.run(main)
    assert time.monotonic() - started < 30, "not the time of a read"


def test_a_handshake_without_an_answer_is_a_timeout_of_a_range(mute: str) -> None:
    client = RangeClient(connections=1, timeouts=SHORT)
    started = time.monotonic()
    with pytest.raises(RegistryTimeout, match=f"bytes .* of a blob: too slow talking to {mute}"):
        client.read(BlobSource(f"https://{mute}/x?sig=1", {}, mute), 0, 10)
    assert time.monotonic() - started < 30, "not the time of a read"


@pytest.fixture
def full() -> Iterator[str]:
    """Host and port of a server whose queue of connections is full: the kernel ignores another one."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_a_connection_that_is_not_taken_is_a_timeout(full: str) -> None:
    async def main() -> None:
        options = {"timeouts": SHORT, "retry": RetryPolicy(attempts=1)}
        async with RegistryClient(keychain=StaticKeychain({}), **options) as client:
            await client.manifest(Reference.parse(f"{full}/app:v1"))

    with pytest.raises(RegistryTimeout, match=f"too slow connecting to {full}"):
        trio.run(main)
    with pytest.raises(RegistryTimeout, match=f"too slow connecting to {full}"):
        RangeClient(connections=1, timeouts=SHORT).read(BlobSource(f"http://{full}/x?sig=1", {}, full), 0, 10)


def test_tls_with_a_server_that_speaks_plain_http_is_named(start: StartRegistry) -> None:
    registry = start()
    ref = registry.reference("app")
    error = failure(
        registry,
        RegistryUnavailable,
        lambda: run(registry, lambda client: client.manifest(ref), plain_http=False),
    )
    assert "cannot reach" in str(error)
    assert "TLS error" in str(error)
    source = BlobSource(f"https://{registry.host}/x?sig=hidden", {}, registry.host)
    error = failure(registry, RegistryUnavailable, lambda: ranges_for(registry).read(source, 0, 10))
    assert "TLS error" in str(error)
    assert "hidden" not in str(error)


def test_a_reason_that_is_not_the_systems_is_a_class() -> None:
    assert system_reason(ValueError("secret")) == "ValueError"
