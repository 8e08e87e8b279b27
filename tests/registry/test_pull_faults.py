"""Every fault against the API client: it either passes and the bytes are right, or it ends in a named error."""

import time
from dataclasses import replace
from typing import Any

import pytest
import trio

from snapshotter.errors import (
    AuthenticationFailed,
    DigestMismatch,
    RegistryError,
    RegistryRefused,
    RegistryTimeout,
    RegistryUnavailable,
    ShortBody,
    SnapshotterError,
)
from snapshotter.oci.reference import Reference
from snapshotter.registry.client import RegistryClient
from snapshotter.registry.retry import RetryPolicy, Timeouts
from tests.registry.conftest import StartRegistry
from tests.support.registry import (
    Basic,
    Drop,
    ExpireToken,
    ExpireUrl,
    Fault,
    FlipByte,
    Redirect,
    Slow,
    Stall,
    Status,
    Truncate,
)
from tests.support.registry_clients import IMPATIENT, failure, run

DATA = bytes(range(256)) * 400

PASSING: dict[str, Fault] = {
    "500": Status(status=500),
    "a long 500": Status(status=500, body=b"x" * 1_000_000),
    "a 500 in crumbs": Status(
        status=500, body=b"14\r\nxxxxxxxxxxxxxxxxxxxx\r\n" * 1500, headers={"Transfer-Encoding": "chunked"}
    ),
    "close": Drop(politely=True),
    "429": Status(status=429, headers={"Retry-After": "0"}),
    "drop": Drop(),
    "nothing": Truncate(after=0),
    "half": Truncate(after=1000),
    "silence": Stall(),
    "silence in the body": Stall(after=1000),
    "damage": FlipByte(at=77),
    "expired token": ExpireToken(),
    "expired url": ExpireUrl(path="/storage/"),
    "expired session": ExpireUrl(path="/storage/", session=True),
    "storage 503": Status(status=503, path="/storage/"),
    "storage drop": Drop(path="/storage/"),
    "storage half": Truncate(after=5000, path="/storage/"),
    "slow": Slow(rate=1e6),
}


@pytest.mark.parametrize("what", ["manifest", "blob"])
@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_is_survived(start: StartRegistry, fault: str, what: str) -> None:
    registry = start(auth=Basic(), presigned_ttl=60.0)
    digest = registry.add_blob(DATA)
    manifest = b'{"schemaVersion":2,"x":"' + b"x" * 10_000 + b'"}'
    registry.add_manifest(manifest, tag="v1")
    ref = registry.reference("app", "v1")
    armed = registry.fault(replace(PASSING[fault]))

    async def work(client: RegistryClient) -> None:
        if what == "blob":
            assert await client.blob(ref, digest, max_size=len(DATA)) == DATA
        else:
            assert (await client.manifest(ref))[1] == manifest

    run(registry, work, timeouts=IMPATIENT)
    assert armed.hits == (0 if what == "manifest" and armed.path else 1)


LASTING: dict[str, tuple[Fault, type[SnapshotterError], str, int]] = {
    "500": (Status(status=500, count=-1), RegistryUnavailable, "answered 500 INJECTED", 3),
    "429": (Status(status=429, count=-1), RegistryUnavailable, "answered 429", 3),
    "501": (Status(status=501, count=-1), RegistryRefused, "answered 501", 1),
    "400": (Status(status=400, count=-1), RegistryRefused, "answered 400", 1),
    "drop": (Drop(count=-1), RegistryUnavailable, "ended the connection without a reply", 3),
    "half": (Truncate(after=1000, count=-1), ShortBody, "ended the body early", 3),
    "silence": (Stall(count=-1), RegistryTimeout, "too slow talking to", 3),
    "silence in the body": (Stall(after=1000, count=-1), RegistryTimeout, "too slow talking to", 3),
    "damage": (FlipByte(at=77, count=-1), DigestMismatch, "sent content of digest", 2),
    "loop": (Redirect(count=-1), RegistryRefused, "redirects in a loop", 1),
}


@pytest.mark.parametrize("name", LASTING)
def test_a_fault_that_lasts_ends_in_its_error(start: StartRegistry, name: str) -> None:
    fault, kind, said, requests = LASTING[name]
    registry = start()
    digest = registry.add_blob(DATA)
    ref = registry.reference("app")
    registry.fault(fault)
    error = failure(
        registry,
        kind,
        lambda: run(
            registry, lambda client: client.blob(ref, digest, max_size=len(DATA)), timeouts=IMPATIENT
        ),
    )
    assert str(error).startswith(f"blob {digest} of {registry.host}/app: ")
    assert said in str(error)
    assert registry.host in str(error)
    assert registry.count(path="/blobs/") == requests


@pytest.mark.parametrize("session", [False, True])
def test_presigned_urls_that_never_work_are_given_up(start: StartRegistry, session: bool) -> None:
    registry = start(auth=Basic(), presigned_ttl=60.0)
    digest = registry.add_blob(DATA)
    registry.fault(ExpireUrl(path="/storage/", session=session, count=-1))
    ref = registry.reference("app")
    error = failure(
        registry,
        AuthenticationFailed,
        lambda: run(registry, lambda client: client.blob(ref, digest, max_size=1 << 20)),
    )
    assert f"{registry.storage_host} answered {'400 ExpiredToken' if session else '403 AccessDenied'}" in str(
        error
    )
    assert registry.count(server="storage") <= 3


def test_an_unreachable_registry_is_named_with_the_systems_reason(start: StartRegistry) -> None:
    registry = start()
    ref = registry.reference("app")
    registry.close()
    error = failure(registry, RegistryUnavailable, lambda: run(registry, lambda client: client.manifest(ref)))
    assert str(error) == f"manifest latest of {ref.locator}: cannot reach {registry.host}: Connection refused"


def test_an_unknown_host_is_named(start: StartRegistry) -> None:
    registry = start()
    ref = Reference.parse("registry.invalid/app:v1")
    error = failure(registry, RegistryUnavailable, lambda: run(registry, lambda client: client.manifest(ref)))
    assert "cannot reach registry.invalid: " in str(error)


def test_a_request_that_is_none_is_final(start: StartRegistry) -> None:
    registry = start()
    ref = registry.reference("app")
    error = failure(
        registry,
        RegistryRefused,
        lambda: run(registry, lambda client: client.manifest(ref), user_agent="two\r\nlines"),
    )
    assert str(error).endswith(f"the request to {registry.host} cannot be written as HTTP")


def test_the_server_decides_how_long_to_wait(start: StartRegistry) -> None:
    registry = start()
    digest = registry.add_blob(DATA)
    registry.fault(Status(status=429, headers={"Retry-After": "1"}))
    started = time.monotonic()
    run(
        registry,
        lambda client: client.blob(registry.reference("app"), digest, max_size=1 << 20),
        retry=RetryPolicy(first_wait=0.001, jitter=0.0),
    )
    assert time.monotonic() - started >= 1.0


def test_the_total_limits_a_body_that_keeps_coming(start: StartRegistry) -> None:
    registry = start()
    digest = registry.add_blob(DATA)
    registry.fault(Slow(rate=1_000.0, count=-1))
    started = time.monotonic()
    error = failure(
        registry,
        RegistryTimeout,
        lambda: run(
            registry,
            lambda client: client.blob(registry.reference("app"), digest, max_size=1 << 20),
            timeouts=Timeouts(read=5.0, total=0.3),
            retry=RetryPolicy(attempts=1),
        ),
    )
    assert time.monotonic() - started < 30, "the body would take 100 s"
    assert "too slow" in str(error)


@pytest.mark.parametrize("fault", [Stall(count=-1), Stall(after=1000, count=-1), Slow(rate=1000.0, count=-1)])
def test_a_cancelled_call_leaves_nothing_behind(start: StartRegistry, fault: Fault) -> None:
    registry = start()
    digest = registry.add_blob(DATA)
    ref = registry.reference("app")
    registry.fault(fault)

    async def work(client: RegistryClient) -> bytes:
        with trio.move_on_after(0.2) as scope:
            await client.blob(ref, digest, max_size=1 << 20)
        assert scope.cancelled_caught
        registry.clear_faults()
        # More than the pool has room for, had the cancelled ones kept their places.
        return await client.blob(ref, digest, max_size=1 << 20)

    assert run(registry, work) == DATA


def test_all_errors_of_the_client_are_ours(start: StartRegistry) -> None:
    registry = start()
    nonsense: list[dict[str, Any]] = [
        {"status": 200, "headers": {"Content-Length": "-5"}},
        {"status": 200, "headers": {"Transfer-Encoding": "chunked"}, "body": b"zz\r\n"},
        {"status": 307, "headers": {"Location": "http://["}},
        {"status": 307, "headers": {"Location": "gopher://x/"}},
        {"status": 307, "headers": {"Location": "//"}},
        {"status": 307},
        {"status": 999},
        {"status": 204},
    ]
    for index, options in enumerate(nonsense):
        registry.clear_faults()
        registry.fault(Status(count=-1, path=f"/r{index}/", **options))
        with pytest.raises(RegistryError):
            run(registry, lambda client, name=f"r{index}": client.manifest(registry.reference(name)))
