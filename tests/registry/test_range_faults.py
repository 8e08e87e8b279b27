"""Every fault against the range client: one attempt, one error of the right class, no wrong byte, no secret."""

import time
from dataclasses import replace
from typing import Any

import pytest

from snapshotter.errors import (
    AuthenticationFailed,
    BlobNotFound,
    RangeNotHonoured,
    RegistryError,
    RegistryRefused,
    RegistryTimeout,
    RegistryUnavailable,
    ShortBody,
)
from snapshotter.registry.ranges import RangeClient
from snapshotter.registry.retry import Timeouts
from snapshotter.registry.source import BlobSource
from snapshotter.units import Digest
from tests.registry.conftest import StartRegistry
from tests.support.registry import (
    Basic,
    Bearer,
    Drop,
    Ecr,
    ExpireToken,
    ExpireUrl,
    Fault,
    FlipByte,
    IgnoreRange,
    NoAuth,
    Redirect,
    Registry,
    Slow,
    Stall,
    Status,
    Truncate,
    WrongRange,
)
from tests.support.registry_clients import IMPATIENT, failure, ranges_for, run
from tests.support.tls import Certificate

DATA = bytes(range(256)) * 4000
END = 600_000


def find(registry: Registry, *, renew: bool = False) -> BlobSource:
    digest = registry.add_blob(DATA)
    ref = registry.reference("app")
    return run(registry, lambda client: client.blob_source(ref, digest, renew=renew))


FAULTS: dict[str, tuple[Fault, type[RegistryError], str]] = {
    "429": (Status(status=429, headers={"Retry-After": "7"}), RegistryUnavailable, "answered 429 INJECTED"),
    "500": (Status(status=500), RegistryUnavailable, "answered 500"),
    "503": (Status(status=503, body=b"x" * 100_000), RegistryUnavailable, "answered 503"),
    "501": (Status(status=501), RegistryRefused, "answered 501"),
    "400": (Status(status=400), RegistryRefused, "answered 400"),
    "404": (Status(status=404, code="BLOB_UNKNOWN"), BlobNotFound, "answered 404 BLOB_UNKNOWN"),
    "416": (Status(status=416), RangeNotHonoured, "answered 416"),
    "401": (Status(status=401), AuthenticationFailed, "answered 401"),
    "403": (Status(status=403), AuthenticationFailed, "answered 403"),
    "204": (Status(status=204, body=b""), RangeNotHonoured, "answers a range request with 204"),
    "moved": (Redirect(to="/elsewhere?signature=x"), AuthenticationFailed, "sends us elsewhere by 307"),
    "drop": (Drop(), RegistryUnavailable, "ended the connection without a reply"),
    "close": (Drop(politely=True), RegistryUnavailable, "ended the connection without a reply"),
    "nothing": (Truncate(after=0), ShortBody, "ended the body"),
    "half": (Truncate(after=300_000), ShortBody, "ended the body"),
    "all but one": (Truncate(after=END - 1), ShortBody, "ended the body"),
    "silence": (Stall(), RegistryTimeout, "too slow talking to"),
    "silence in the body": (Stall(after=300_000), RegistryTimeout, "too slow talking to"),
    "everything": (IgnoreRange(), RangeNotHonoured, "answers a range request with 200"),
    "moved range": (WrongRange(shift=1), RangeNotHonoured, "for bytes [0, 600000), was sent [1, 600001)"),
    "longer range": (WrongRange(shift=0, extra=5), RangeNotHonoured, "was sent [0, 600005)"),
    "shorter range": (WrongRange(shift=0, extra=-5), RangeNotHonoured, "was sent [0, 599995)"),
    "no header": (WrongRange(header=""), RangeNotHonoured, "without a usable Content-Range"),
    "lying header": (
        WrongRange(shift=0, extra=7, header="bytes 0-599999/*"),
        RangeNotHonoured,
        "of another length",
    ),
    "multipart": (WrongRange(header="bytes 0-9/99, bytes 20-29/99"), RangeNotHonoured, "without a usable"),
}


@pytest.mark.parametrize("presigned", [False, True])
@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_has_its_error_and_the_next_read_works(
    start: StartRegistry, name: str, presigned: bool
) -> None:
    template, kind, said = FAULTS[name]
    registry = start(auth=Basic(), presigned_ttl=60.0 if presigned else None)
    source = find(registry)
    fault = registry.fault(replace(template))
    registry.clear_requests()
    client = ranges_for(registry, timeouts=IMPATIENT)
    error = failure(registry, kind, lambda: client.read(source, 0, END))
    assert str(error).startswith(f"bytes [0, {END}) of {source.what}: ")
    assert said in str(error)
    assert registry.storage_host in str(error)
    assert (fault.hits, len(registry.requests)) == (1, 1)
    assert client.read(source, 0, END) == DATA[:END]
    client.close()


def test_the_servers_wish_to_wait_is_carried_along(start: StartRegistry) -> None:
    registry = start()
    source = find(registry)
    registry.fault(Status(status=503, headers={"Retry-After": "12"}))
    error = failure(registry, RegistryUnavailable, lambda: ranges_for(registry).read(source, 0, 10))
    assert error.retry_after == 12.0


def test_a_flipped_byte_is_the_callers_to_find(start: StartRegistry) -> None:
    registry = start()
    source = find(registry)
    registry.fault(FlipByte(at=3))
    assert ranges_for(registry).read(source, 0, 5) == b"\x00\x01\x02\xfc\x04"


@pytest.mark.parametrize("mode", [Basic, Bearer, Ecr])
def test_an_expired_login_is_an_authentication_failure_that_renewing_cures(
    start: StartRegistry, mode: type[NoAuth]
) -> None:
    registry = start(auth=mode())
    source = find(registry)
    registry.fault(ExpireToken())
    client = ranges_for(registry)
    failure(registry, AuthenticationFailed, lambda: client.read(source, 0, 10))
    assert client.read(find(registry, renew=True), 0, 10) == DATA[:10]


def test_an_expired_presigned_url_is_an_authentication_failure_that_renewing_cures(
    start: StartRegistry,
) -> None:
    registry = start(auth=Ecr(), presigned_ttl=0.3)
    source = find(registry)
    client = ranges_for(registry)
    time.sleep(0.4)
    failure(registry, AuthenticationFailed, lambda: client.read(source, 0, 10))
    storage = registry._api.storage
    assert storage is not None
    storage.ttl = 60.0  # the next one is to be used in time
    assert client.read(find(registry, renew=True), 0, 10) == DATA[:10]


@pytest.mark.parametrize(("session", "said"), [(False, "403 AccessDenied"), (True, "400 ExpiredToken")])
def test_each_way_of_expiring_is_an_authentication_failure(
    start: StartRegistry, session: bool, said: str
) -> None:
    registry = start(presigned_ttl=60.0)
    source = find(registry)
    registry.fault(ExpireUrl(session=session))
    error = failure(registry, AuthenticationFailed, lambda: ranges_for(registry).read(source, 0, 10))
    assert str(error) == f"bytes [0, 10) of {source.what}: {source.host} answered {said}"


def test_a_read_beyond_the_blob_is_not_honoured(start: StartRegistry) -> None:
    registry = start()
    source = find(registry)
    client = ranges_for(registry)
    failure(registry, RangeNotHonoured, lambda: client.read(source, len(DATA), len(DATA) + 1))
    failure(registry, RangeNotHonoured, lambda: client.read(source, 0, len(DATA) + 1))
    assert client.read(source, len(DATA) - 1, len(DATA)) == DATA[-1:]


def test_a_body_without_a_length_is_read_to_its_end(start: StartRegistry) -> None:
    registry = start()
    source = find(registry)
    client = ranges_for(registry)

    def chunked(body: bytes) -> None:
        headers = {"Content-Range": "bytes 0-9/99", "Transfer-Encoding": "chunked"}
        registry.fault(Status(status=206, headers=headers, body=body))

    chunked(b"4\r\nabcd\r\n6\r\nefghij\r\n0\r\n\r\n")
    assert client.read(source, 0, 10) == b"abcdefghij"
    chunked(b"4\r\nabcd\r\n0\r\n\r\n")
    failure(registry, ShortBody, lambda: client.read(source, 0, 10))
    chunked(b"b\r\nabcdefghijk\r\n0\r\n\r\n")
    error = failure(registry, RangeNotHonoured, lambda: client.read(source, 0, 10))
    assert "sends more than that" in str(error)
    chunked(b"zz\r\n")
    failure(registry, ShortBody, lambda: client.read(source, 0, 10))
    assert client.read(source, 0, 10) == DATA[:10]


@pytest.mark.parametrize("fault", [Slow(rate=10_000.0), Stall(), Stall(after=100)])
def test_a_deadline_ends_any_wait(start: StartRegistry, fault: Fault) -> None:
    registry = start()
    source = find(registry)
    registry.fault(replace(fault))
    started = time.monotonic()
    error = failure(
        registry,
        RegistryTimeout,
        lambda: ranges_for(registry).read(source, 0, END, deadline=time.monotonic() + 0.3),
    )
    assert 0.25 < time.monotonic() - started < 30
    assert registry.host in str(error)


def test_a_deadline_does_not_stay_with_the_connection(start: StartRegistry) -> None:
    registry = start()
    source = find(registry)
    client = ranges_for(registry, connections=1)
    client.read(source, 0, END, deadline=time.monotonic() + 3.0)
    registry.fault(Stall(seconds=3.2))
    assert client.read(source, 0, END) == DATA[:END]
    assert len({request.connection for request in registry.requests[1:]}) == 1


def test_a_deadline_counts_the_time_that_the_caller_takes(start: StartRegistry) -> None:
    registry = start()
    source = find(registry)
    failure(
        registry,
        RegistryTimeout,
        lambda: ranges_for(registry).read(
            source, 0, END, deadline=time.monotonic() + 0.3, on_progress=lambda _: time.sleep(0.35)
        ),
    )


def test_a_deadline_in_the_past_is_a_timeout(start: StartRegistry) -> None:
    registry = start()
    source = find(registry)
    failure(
        registry,
        RegistryTimeout,
        lambda: ranges_for(registry).read(source, 0, END, deadline=time.monotonic() - 1),
    )


def test_the_total_is_a_deadline_too(start: StartRegistry) -> None:
    registry = start()
    source = find(registry)
    registry.fault(Slow(rate=10_000.0))
    client = ranges_for(registry, timeouts=Timeouts(read=5.0, total=0.3))
    started = time.monotonic()
    failure(registry, RegistryTimeout, lambda: client.read(source, 0, END))
    assert time.monotonic() - started < 30


def test_a_server_that_is_gone_is_unavailable(start: StartRegistry) -> None:
    registry = start(auth=Bearer())
    source = find(registry)
    registry.close()
    error = failure(registry, RegistryUnavailable, lambda: ranges_for(registry).read(source, 0, 10))
    assert str(error).endswith(f"cannot reach {registry.host}: Connection refused")


def test_an_unknown_host_is_unavailable(start: StartRegistry) -> None:
    source = BlobSource("https://store.invalid/x?sig=hidden", {}, "store.invalid")
    error = failure(start(), RegistryUnavailable, lambda: RangeClient(connections=1).read(source, 0, 1))
    assert str(error).startswith("bytes [0, 1) of a blob: cannot reach store.invalid: ")
    assert "hidden" not in str(error)


def test_a_certificate_that_is_not_trusted_is_final(start: StartRegistry, certificate: Certificate) -> None:
    registry = start(certificate=certificate)
    source = find(registry)
    client = ranges_for(registry, ca_file=None)
    error = failure(registry, RegistryRefused, lambda: client.read(source, 0, 10))
    assert f"certificate of {registry.host} is not trusted: self-signed certificate" in str(error)


@pytest.mark.parametrize("url", ["", "nonsense", "http://", "http://[::1", "ftp://x/y"])
def test_a_source_that_is_no_url_is_refused(start: StartRegistry, url: str) -> None:
    source = BlobSource(url, {}, "somewhere")
    error = failure(start(), RegistryRefused, lambda: RangeClient(connections=1).read(source, 0, 10))
    assert "no URL" in str(error)


def test_a_header_that_is_none_is_refused_without_being_shown(start: StartRegistry) -> None:
    registry = start()
    found = find(registry)
    source = BlobSource(found.url, {"Authorization": "Bearer hidden\r\nX: y"}, found.host)
    error = failure(registry, RegistryRefused, lambda: ranges_for(registry).read(source, 0, 10))
    assert str(error).endswith(f"the request to {registry.host} cannot be written as HTTP")


def test_an_absent_blob_is_named(start: StartRegistry) -> None:
    registry = start(presigned_ttl=60.0)
    source = find(registry)
    other: Any = Digest("sha256:" + "00" * 32)
    moved = BlobSource(registry._api.storage.presign(other), {}, source.host, f"blob {other} of somewhere")
    error = failure(registry, BlobNotFound, lambda: ranges_for(registry).read(moved, 0, 10))
    assert str(error) == f"bytes [0, 10) of blob {other} of somewhere: {source.host} answered 404 NoSuchKey"
