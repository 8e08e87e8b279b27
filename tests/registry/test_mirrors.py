"""Mirrors: asked in their order, for everything, and passed over when they do not do; real registries and a lying one."""

import gzip
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from snapshotter.errors import DigestMismatch, RegistryUnavailable
from snapshotter.oci.descriptor import Descriptor
from snapshotter.oci.manifest import ImageManifest, go_json
from snapshotter.oci.media_types import OCI_MANIFEST, SOCI_INDEX_V1
from snapshotter.oci.reference import Reference
from snapshotter.registry.client import RegistryClient
from snapshotter.registry.health import Outcome
from snapshotter.registry.hosts import EVERYTHING, PULL, PUSH, Host
from snapshotter.registry.hostsfile import HostsDirectories
from snapshotter.registry.keychain import Credentials, StaticKeychain
from snapshotter.registry.mirrors import ConfiguredHosts
from snapshotter.registry.ranges import RangeClient
from snapshotter.units import Digest
from tests.conftest import ExpectedLogs
from tests.registry.conftest import StartRegistry
from tests.support.dockerregistry import DockerRegistry
from tests.support.images import Image, ImageBuilder
from tests.support.registry import Basic, FlipByte, IgnoreRange, Registry, Stall, Status, Truncate
from tests.support.registry_clients import IMPATIENT, PATIENT, QUICK

Result = TypeVar("Result")
DATA = bytes(range(256)) * 40


class These:
    """Hosts given once, whatever the registry."""

    def __init__(self, *hosts: Host) -> None:
        self.hosts = hosts

    def of(self, registry: str) -> tuple[Host, ...]:
        return self.hosts


def mirror(registry: Registry, of: str, **options: object) -> Host:
    return Host(registry.host, "http", registry.host, namespace=of, **options)  # type: ignore[arg-type]


def own(registry: Registry) -> Host:
    return Host(registry.host, "http", registry.host)


def run(
    hosts: These | ConfiguredHosts, work: Callable[[RegistryClient], Awaitable[Result]], **options: object
) -> Result:
    defaults: dict[str, object] = {"keychain": StaticKeychain({}), "retry": QUICK, "timeouts": PATIENT}

    async def main() -> Result:
        async with RegistryClient(hosts=hosts, **(defaults | options)) as client:  # type: ignore[arg-type]
            return await work(client)

    return trio.run(main)


@pytest.fixture
def pair(start: StartRegistry) -> tuple[Registry, Registry]:
    """A mirror and a registry with the same content."""
    return start(), start()


def put(registries: tuple[Registry, ...]) -> Digest:
    return [registry.add_blob(DATA) for registry in registries][-1]


def test_the_mirror_is_asked_and_told_for_whom(pair: tuple[Registry, Registry]) -> None:
    near, far = pair
    digest = put(pair)
    hosts = These(mirror(near, "r.example", headers={"X-Mine": "yes"}), own(far))
    ref = far.reference("app")

    async def work(client: RegistryClient) -> bytes:
        source = await client.blob_source(ref, digest)
        assert source.mirror == near.host
        assert source.headers == {"X-Mine": "yes"}
        ranges = RangeClient(connections=1)
        assert ranges.read(source, 5, 500) == DATA[5:500]
        return await client.blob(ref, digest, max_size=1 << 20)

    assert run(hosts, work) == DATA
    assert far.requests == []
    assert {request.query["ns"] for request in near.requests} == {"r.example"}
    assert {request.headers["x-mine"] for request in near.requests} == {"yes"}


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [
        (Status(status=404, count=-1), Outcome.MISSING),
        (Status(status=403, count=-1), Outcome.REFUSED),
        (Status(status=401, count=-1), Outcome.REFUSED),
        (Status(status=503, count=-1), Outcome.FAILED),
        (FlipByte(at=7, count=-1), Outcome.LIED),
        (Truncate(after=10, count=-1), Outcome.FAILED),
        (Stall(count=-1), Outcome.FAILED),
    ],
    ids=["404", "403", "401", "503", "lie", "short", "hang"],
)
def test_whatever_is_wrong_with_a_mirror_the_registry_answers(
    pair: tuple[Registry, Registry],
    expected_logs: ExpectedLogs,
    fault: Status | FlipByte | Truncate | Stall,
    outcome: Outcome,
) -> None:
    near, far = pair
    digest = put(pair)
    near.fault(fault)
    if outcome is not Outcome.MISSING:
        expected_logs.allow("a mirror is passed over")

    async def work(client: RegistryClient) -> None:
        for _ in range(2):
            assert await client.blob(far.reference("app"), digest, max_size=1 << 20) == DATA
        counts = client.statistics().hosts[near.host].counts
        asked = 2 if outcome is Outcome.MISSING else 1
        assert {name: count for name, count in counts.items() if count} == {outcome: asked}
        assert client.statistics().retries == 0

    run(These(mirror(near, "r.example"), own(far)), work, timeouts=IMPATIENT)
    assert len(expected_logs.records) == (outcome is not Outcome.MISSING), "one line of log"


def test_a_mirror_with_a_wrong_path_is_mentioned_once(
    pair: tuple[Registry, Registry], expected_logs: ExpectedLogs
) -> None:
    near, far = pair
    digest = put(pair)
    expected_logs.allow("a mirror is passed over")

    async def work(client: RegistryClient) -> None:
        for _ in range(6):
            await client.blob(far.reference("app"), digest, max_size=1 << 20)

    run(These(mirror(near, "r.example", path="/wrong/v2"), own(far)), work)
    assert [record.__dict__["outcome"] for record in expected_logs.records] == ["missing"]


def test_mirrors_follow_each_other(start: StartRegistry, expected_logs: ExpectedLogs) -> None:
    expected_logs.allow("a mirror is passed over")
    one, two, far = start(), start(), start()
    digest = put((one, two, far))
    one.fault(Status(status=503, count=-1))
    hosts = These(mirror(one, "r"), mirror(two, "r"), own(far))

    async def work(client: RegistryClient) -> None:
        source = await client.blob_source(far.reference("app"), digest)
        assert source.mirror == two.host
        client.blame(two.host, RegistryUnavailable("gone"))
        source = await client.blob_source(far.reference("app"), digest, renew=True)
        assert source.mirror == ""

    run(hosts, work)


def test_a_mirror_without_ranges_gives_no_source(
    pair: tuple[Registry, Registry], expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("a mirror is passed over")
    near, far = pair
    digest = put(pair)
    near.fault(IgnoreRange(count=-1))
    source = run(
        These(mirror(near, "r"), own(far)), lambda client: client.blob_source(far.reference("app"), digest)
    )
    assert source.host == far.host


def test_a_stream_goes_on_elsewhere_where_a_mirror_broke_off(
    pair: tuple[Registry, Registry], expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("a mirror is passed over")
    near, far = pair
    digest = put(pair)
    near.fault(Truncate(after=1000, count=-1))

    async def work(client: RegistryClient) -> bytes:
        pieces = [piece async for piece in client.stream_blob(far.reference("app"), digest)]
        return b"".join(pieces)

    assert run(These(mirror(near, "r"), own(far)), work) == DATA
    assert [request.range for request in far.requests] == [(1000, len(DATA))]


def test_a_stream_that_a_mirror_gave_wrong_comes_from_elsewhere_next_time(
    pair: tuple[Registry, Registry], expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("a mirror is passed over")
    near, far = pair
    digest = put(pair)
    for registry in pair:
        registry.fault(FlipByte(at=77))

    async def work(client: RegistryClient) -> None:
        for elsewhere in (True, False):
            with pytest.raises(DigestMismatch) as caught:
                [piece async for piece in client.stream_blob(far.reference("app"), digest)]
            assert caught.value.elsewhere is elsewhere
        pieces = [piece async for piece in client.stream_blob(far.reference("app"), digest)]
        assert b"".join(pieces) == DATA

    run(These(mirror(near, "r"), own(far)), work)
    assert (near.count(), far.count()) == (1, 2)


def test_tags_are_resolved_only_where_that_is_allowed(pair: tuple[Registry, Registry]) -> None:
    near, far = pair
    image = [registry.add_image([gzip.compress(DATA, mtime=0)], tag="v1") for registry in pair][-1]
    hosts = These(mirror(near, "r", capabilities=frozenset({PULL})), own(far))

    async def work(client: RegistryClient) -> None:
        found = await client.resolve(far.reference("app", "v1"))
        assert near.requests == []
        await client.manifest(far.reference("app").with_digest(found.digest))
        assert found.digest == image.digest
        assert len(far.requests) == 1
        assert len(near.requests) == 1

    run(hosts, work)


def test_a_mirror_that_lists_no_referrers_is_not_believed(pair: tuple[Registry, Registry]) -> None:
    near, far = pair
    image = [registry.add_image([gzip.compress(DATA, mtime=0)], tag="v1") for registry in pair][-1]
    subject = Descriptor(OCI_MANIFEST, image.digest, len(image.manifest))
    referrer = ImageManifest(
        OCI_MANIFEST,
        config=Descriptor(SOCI_INDEX_V1, far.add_blob(b"{}"), 2),
        layers=(),
        subject=subject,
        artifact_type=SOCI_INDEX_V1,
    )
    far.add_manifest(go_json(referrer.to_json()))
    found = run(
        These(mirror(near, "r"), own(far)),
        lambda client: client.referrers(far.reference("app").with_digest(image.digest), SOCI_INDEX_V1),
    )
    assert len(found) == 1


def test_content_is_pushed_to_the_registry_alone(pair: tuple[Registry, Registry]) -> None:
    near, far = pair
    hosts = These(mirror(near, "r", capabilities=EVERYTHING - {PUSH}), own(far))
    run(hosts, lambda client: client.push_blob(far.reference("app"), DATA))
    assert near.requests == []


def test_credentials_of_the_registry_are_not_for_its_mirror(
    start: StartRegistry, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("a mirror is passed over")
    near, far = start(auth=Basic()), start(auth=Basic())
    digest = put((near, far))
    keychain = StaticKeychain({far.host: Credentials(far.auth.username, far.auth.password)})
    hosts = These(mirror(near, "r"), own(far))
    get = lambda client: client.blob(far.reference("app"), digest, max_size=1 << 20)  # noqa: E731
    assert run(hosts, get, keychain=keychain) == DATA
    assert all("authorization" not in request.headers for request in near.requests)
    both = {host.host: Credentials(host.auth.username, host.auth.password) for host in (near, far)}
    far.clear_requests()
    assert run(hosts, get, keychain=StaticKeychain(both)) == DATA
    assert far.requests == []


@pytest.mark.parametrize("content", [None, "not a certificate"])
def test_a_ca_that_does_not_parse_leaves_the_registry(
    tmp_path: Path, start: StartRegistry, expected_logs: ExpectedLogs, content: str | None
) -> None:
    expected_logs.allow("a mirror is passed over")
    far = start()
    digest = far.add_blob(DATA)
    directory = tmp_path / far.host
    directory.mkdir()
    (directory / "hosts.toml").write_text('[host."https://127.0.0.1:1"]\nca = "ca.pem"\n')
    if content is not None:
        (directory / "ca.pem").write_text(content)
    hosts = ConfiguredHosts({}, HostsDirectories([tmp_path]))

    async def work(client: RegistryClient) -> None:
        assert await client.blob(far.reference("app"), digest, max_size=1 << 20) == DATA
        assert client.statistics().hosts["127.0.0.1:1"].counts[Outcome.MISCONFIGURED] == 1

    run(hosts, work)
    assert f"CA file {directory / 'ca.pem'}: cannot be used" in expected_logs.records[0].__dict__["error"]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return ImageBuilder(tmp_path_factory.mktemp("image")).layer({"file": b"content" * 1000}).build()


@pytest.fixture
def real(workdir: Path, image: Image) -> Iterator[tuple[DockerRegistry, DockerRegistry]]:
    """A mirror with a certificate of its own, and a registry, both with the image."""
    near = DockerRegistry(workdir / "near", tls=True)
    far = DockerRegistry(workdir / "far")
    try:
        for each in (near, far):
            each.start().push(image, "app")
        yield near, far
    finally:
        near.cleanup()
        far.cleanup()


def test_real_registries_with_a_ca_of_their_own(
    workdir: Path, real: tuple[DockerRegistry, DockerRegistry], expected_logs: ExpectedLogs
) -> None:
    near, far = real
    directory = workdir / "certs.d" / f"127.0.0.1_{far.port}_"
    directory.mkdir(parents=True)
    (directory / "hosts.toml").write_text(f'[host."{near.url}"]\nca = "{near.ca}"\n')
    marks = near.mark(), far.mark()
    ref = Reference.parse(f"{far.name}/app:latest")

    async def pull(client: RegistryClient) -> None:
        descriptor, data = await client.manifest(ref)
        digest = Digest(json.loads(data)["layers"][0]["digest"])
        size = json.loads(data)["layers"][0]["size"]
        source = await client.blob_source(ref, digest, renew=True)
        body = await trio.to_thread.run_sync(RangeClient(connections=1).read, source, 0, size)
        assert bytes(body) == near.blob_path(digest).read_bytes()
        assert descriptor.digest

    async def work(client: RegistryClient) -> None:
        await pull(client)
        assert len(near.requests(marks[0])) >= 3
        assert far.requests(marks[1]) == []
        near.stop()
        expected_logs.allow("a mirror is passed over")
        await pull(client)
        assert len(far.requests(marks[1])) >= 3

    run(ConfiguredHosts({}, HostsDirectories([workdir / "certs.d"])), work)
