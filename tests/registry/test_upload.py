"""Blobs that are uploaded while they are made: what broke is gone on with, or begun anew; nothing is half there."""

from collections.abc import Iterator

import pytest

from snapshotter.errors import (
    AuthenticationFailed,
    BlobNotFound,
    InvalidTar,
    RegistryRefused,
    RegistryTimeout,
    RegistryUnavailable,
    SnapshotterError,
)
from snapshotter.oci.descriptor import Descriptor
from snapshotter.registry.client import RegistryClient
from snapshotter.units import sha256_digest
from tests.registry.conftest import StartRegistry
from tests.support.registry import (
    Basic,
    Bearer,
    Drop,
    Ecr,
    ExpireToken,
    LoseReply,
    NoAuth,
    Registry,
    Stall,
    Status,
)
from tests.support.registry_clients import IMPATIENT, QUICK, failure, run

DATA = bytes(range(256)) * 8000
DIGEST = sha256_digest(DATA)
BLOB = Descriptor("application/octet-stream", DIGEST, len(DATA))
PIECE = 300_000
UPLOADS = "/blobs/uploads/"


class Source:
    """The blob, in pieces, and from where on it was asked for."""

    def __init__(self, error: SnapshotterError | None = None) -> None:
        self.asked: list[int] = []
        self._error = error

    def __call__(self, start: int) -> Iterator[bytes]:
        self.asked.append(start)
        for at in range(start, len(DATA), PIECE):
            yield DATA[at : at + PIECE]
            if self._error is not None:
                raise self._error


def upload(registry: Registry, source: Source, **options: object) -> None:
    async def send(client: RegistryClient) -> None:
        await client.upload(registry.reference("app"), BLOB, source).run()

    run(registry, send, **options)
    assert registry.blob(DIGEST) == DATA
    assert registry.has_blob("app", DIGEST)


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("mode", [NoAuth, Basic, Bearer, Ecr])
def test_a_blob_is_sent_by_one_request(start: StartRegistry, mode: type[NoAuth], relative: bool) -> None:
    registry, source = start(auth=mode(), relative_locations=relative), Source()
    upload(registry, source)
    assert source.asked == [0]
    (put,) = registry.matching(method="PUT")
    assert put.headers["content-length"] == str(len(DATA))
    assert "content-range" not in put.headers


def test_what_broke_is_gone_on_with_where_the_registry_has_got_to(start: StartRegistry) -> None:
    registry, source = start(), Source()
    registry.fault(LoseReply(method="PUT", after=1_234_567))
    upload(registry, source)
    assert source.asked == [0, 1_234_567]
    assert registry.matching(method="PUT")[-1].headers["content-range"] == f"1234567-{len(DATA) - 1}"


def test_what_came_whole_is_not_sent_again_when_the_reply_was_lost(start: StartRegistry) -> None:
    registry, source = start(), Source()
    registry.fault(LoseReply(method="PUT"))
    upload(registry, source)
    assert source.asked == [0]
    assert registry.count(method="POST") == 1


def test_an_upload_that_the_registry_forgot_is_begun_anew(start: StartRegistry) -> None:
    registry, source = start(), Source()
    registry.fault(LoseReply(method="PUT", after=1_000_000))
    registry.fault(Status(method="GET", path=UPLOADS, status=404, code="BLOB_UPLOAD_UNKNOWN"))
    upload(registry, source)
    assert source.asked == [0, 0]
    assert registry.count(method="POST") == 2


def test_where_no_upload_can_be_gone_on_with_it_is_begun_anew(start: StartRegistry) -> None:
    registry, source = start(), Source()
    registry.fault(LoseReply(method="PUT", after=1_000_000))
    registry.fault(Status(method="PUT", status=400, code="UNSUPPORTED"))
    upload(registry, source)
    assert source.asked == [0, 1_000_000, 0]


def test_attempts_count_from_the_last_progress(start: StartRegistry) -> None:
    registry, source = start(), Source()
    registry.fault(LoseReply(method="PUT", after=1 << 20))
    registry.fault(Drop(method="PUT", count=QUICK.attempts - 1))
    upload(registry, source)
    assert len(source.asked) == QUICK.attempts + 1


def test_a_token_that_expires_is_renewed(start: StartRegistry) -> None:
    registry, source = start(auth=Bearer()), Source()
    registry.fault(ExpireToken(method="PUT"))
    upload(registry, source)
    assert registry.count(server="token") == 2


@pytest.mark.parametrize(
    ("fault", "error", "text"),
    [
        (
            Status(method="PUT", status=403, code="DENIED", count=-1),
            AuthenticationFailed,
            "answered 403 DENIED",
        ),
        (Status(method="PUT", status=413, count=-1), RegistryRefused, "answered 413"),
        (Status(method="PUT", status=307, count=-1), RegistryRefused, "sends us elsewhere"),
        (Drop(method="PUT", count=-1), RegistryUnavailable, "without a reply"),
        (Status(status=202, method="POST", count=-1), RegistryRefused, "without a Location"),
    ],
)
def test_an_upload_that_cannot_work_is_named_and_taken_back(
    start: StartRegistry, fault: Status | Drop, error: type[SnapshotterError], text: str
) -> None:
    registry = start()
    registry.fault(fault)
    raised = str(failure(registry, error, lambda: upload(registry, Source())))
    assert str(DIGEST) in raised
    assert registry.host in raised
    assert text in raised
    assert registry.count(method="DELETE") == (0 if fault.method == "POST" else 1)


def test_a_registry_that_says_nothing_is_given_up(start: StartRegistry) -> None:
    registry = start()
    registry.fault(Stall(method="PUT", count=-1))
    error = failure(registry, RegistryTimeout, lambda: upload(registry, Source(), timeouts=IMPATIENT))
    assert "too slow" in str(error)


@pytest.mark.parametrize("error", [InvalidTar("no tar"), RegistryUnavailable("the source is away")])
def test_an_error_of_the_source_is_its_own(start: StartRegistry, error: SnapshotterError) -> None:
    registry, source = start(), Source(error)
    with pytest.raises(type(error)) as raised:
        upload(registry, source)
    assert raised.value is error
    assert source.asked == [0]
    assert registry.count(method="DELETE") == 1


def test_credentials_do_not_follow_an_upload_to_another_host(start: StartRegistry) -> None:
    registry, other = start(auth=Basic()), start()
    registry.fault(Status(status=202, method="POST", headers={"Location": f"{other.url}/v2/app/upload?a=1"}))
    error = failure(registry, BlobNotFound, lambda: upload(registry, Source()))
    assert other.host in str(error)
    assert other.count() > 0
    assert all("authorization" not in request.headers for request in other.matching())
