"""Parallel pulls against a registry that misbehaves: what fails is left to containerd, once, and nothing is left behind."""

from __future__ import annotations

import gzip
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from snapshotter.daemon import parallelpull
from snapshotter.daemon.config import Config
from snapshotter.daemon.config.sources import DecompressorConfig
from snapshotter.daemon.parallelpull import settings_of
from snapshotter.download.downloads import Limits
from snapshotter.errors import ConfigError
from snapshotter.registry.hosts import named_host
from snapshotter.registry.hostsfile import HostsDirectories
from snapshotter.registry.mirrors import ConfiguredHosts
from snapshotter.registry.retry import DEFAULT_RETRY, DEFAULT_TIMEOUTS, RetryPolicy
from snapshotter.snapshot.layers import Deferred, Local, Provided
from snapshotter.units import sha256_digest
from tests.conftest import ExpectedLogs
from tests.support.images import directory, tar
from tests.support.indexed import IndexedImage, Layer, publish
from tests.support.providing import Options, Providing, providing
from tests.support.registry import Drop, Fault, FlipByte, IgnoreRange, Registry, Status, WrongRange

BIG = os.urandom(300_000)
LAYERS = [
    tar({"a/": directory(0o711, uid=5), "a/one": b"1"}),
    tar({"big": BIG}),
    tar({"a/two": b"2"}),  # on an `a` that only the layer below describes
]
USUAL = settings_of(Config(), DEFAULT_RETRY, DEFAULT_TIMEOUTS)
FEW = RetryPolicy(attempts=2, first_wait=0.01)
PARALLEL = replace(USUAL, keep_blobs=False, limits=Limits(connections=2, range_size=100_000, retry=FEW))
OPTIONS = Options(processes=False, parallel=PARALLEL)
pytestmark = pytest.mark.usefixtures("fuse")


def unindexed(registry: Registry) -> IndexedImage:
    return publish(registry, LAYERS, version=None)


async def pull(rig: Providing, image: IndexedImage, *layers: int) -> list[Provided]:
    """Prepare the layers as containerd does, one after another; all of them unless some are named."""
    return [
        await rig.prepare(image, number, parents=tuple(range(number, 0, -1)))
        for number in layers or range(len(image.layers))
    ]


async def nothing_left(rig: Providing) -> None:
    with trio.fail_after(60):
        while os.listdir(rig.root / "unpack") or os.listdir(rig.root / "scratch"):
            await trio.sleep(0.01)


def test_layers_are_pulled_ahead_and_fit_together(workdir: Path, registry: Registry) -> None:
    image = unindexed(registry)

    async def test(rig: Providing) -> None:
        assert [type(each) for each in await pull(rig, image)] == [Local] * 3
        assert (rig.directory(2) / "big").read_bytes() == BIG
        found = (rig.directory(3) / "a").stat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o711, 5)
        assert rig.provider.fallbacks == {"no-index": 3}
        ranges = registry.matching(path=f"/blobs/{image.layers[1].digest}", method="GET")
        assert len(ranges) == 1 + -(-len(image.layers[1].blob) // 100_000)
        await nothing_left(rig)

    providing(workdir, registry, test, OPTIONS)


def test_a_pull_that_begins_above_layers_that_are_there(workdir: Path, registry: Registry) -> None:
    image = unindexed(registry)

    async def test(rig: Providing) -> None:
        (rig.directory(1) / "a").mkdir(parents=True)
        assert [type(each) for each in await pull(rig, image, 1, 2)] == [Local] * 2
        assert registry.count(path=f"/blobs/{image.layers[0].digest}") == 0
        await nothing_left(rig)

    providing(workdir, registry, test, OPTIONS)


@pytest.mark.parametrize(
    "fault", [Drop(skip=2, count=1), IgnoreRange(count=-1)], ids=["dropped", "no ranges"]
)
def test_what_passes_is_survived(workdir: Path, registry: Registry, fault: Drop | IgnoreRange) -> None:
    image = unindexed(registry)
    fault.path = f"/blobs/{image.layers[1].digest}"
    registry.fault(fault)

    async def test(rig: Providing) -> None:
        assert [type(each) for each in await pull(rig, image)] == [Local] * 3
        await nothing_left(rig)

    providing(workdir, registry, test, OPTIONS)


@pytest.mark.parametrize(
    "fault", [FlipByte(at=50, count=-1), Status(status=404, count=-1), Status(status=503, count=-1)]
)
def test_what_fails_is_left_to_containerd(
    workdir: Path, registry: Registry, expected_logs: ExpectedLogs, fault: FlipByte | Status
) -> None:
    expected_logs.allow("layer is left to the client")
    image = unindexed(registry)
    fault.path = f"/blobs/{image.layers[1].digest}"
    registry.fault(fault)

    async def test(rig: Providing) -> None:
        with trio.fail_after(60):
            last = (await pull(rig, image))[1:]
            assert last == [Deferred("parallel-failed")] * 2
            asked = rig.client.statistics().requests
            assert await rig.prepare(image, 2, snapshot_id=9, parents=(2, 1)) == Deferred("parallel-failed")
            assert rig.client.statistics().requests == asked, "containerd is pulling it, not we"
        await nothing_left(rig)

    providing(workdir, registry, test, OPTIONS)


def mirrored(registry: Registry, *mirrors: Registry) -> Options:
    """The options under which `mirrors` are asked before `registry`."""
    named = [
        named_host(registry.host, f"http://{each.host}/v2", plain_http=False, timeout=None)
        for each in mirrors
    ]
    return replace(OPTIONS, hosts=ConfiguredHosts({registry.host: named}, HostsDirectories([])))


LIES: dict[str, tuple[Fault, str]] = {
    "a byte": (FlipByte(at=50, skip=1, count=-1), "lied"),
    "a byte of one range": (FlipByte(at=50, skip=3, count=1), "lied"),
    "another range": (WrongRange(skip=1, count=-1), "refused"),
    "no entry, once it is asked for data": (Status(status=403, skip=1, count=-1), "refused"),
}


def said(logs: ExpectedLogs) -> set[tuple[str, str]]:
    """The mirrors that were passed over, and why; not that none lists referrers."""
    told = {(record.__dict__["mirror"], record.__dict__["outcome"]) for record in logs.records}
    return {(mirror, outcome) for mirror, outcome in told if outcome != "missing"}


@pytest.mark.parametrize("has_ranges", [True, False])
@pytest.mark.parametrize("lie", LIES)
def test_a_mirror_that_lies_is_followed_by_the_registry(
    workdir: Path, registry: Registry, expected_logs: ExpectedLogs, lie: str, has_ranges: bool
) -> None:
    expected_logs.allow("a mirror is passed over")
    image = unindexed(registry)
    blob = f"/blobs/{image.layers[1].digest}"
    with Registry() as near:
        unindexed(near)
        fault, outcome = LIES[lie]
        options = {name: value for name, value in vars(fault).items() if name != "hits"}
        near.fault(type(fault)(**(options | {"path": blob})))
        if not has_ranges:
            registry.fault(IgnoreRange(path=blob, count=-1))

        async def test(rig: Providing) -> None:
            assert [type(each) for each in await pull(rig, image)] == [Local] * 3
            assert (rig.directory(2) / "big").read_bytes() == BIG
            assert near.count(path=blob)
            assert registry.count(path=blob)
            await nothing_left(rig)

        providing(workdir, registry, test, mirrored(registry, near))
    assert said(expected_logs) == {(near.host, outcome)}


def test_every_mirror_lies(workdir: Path, registry: Registry, expected_logs: ExpectedLogs) -> None:
    expected_logs.allow("a mirror is passed over")
    image = unindexed(registry)
    with Registry() as one, Registry() as two:
        for each in (one, two):
            unindexed(each)
            each.fault(FlipByte(path=f"/blobs/{image.layers[1].digest}", at=50, count=-1))

        async def test(rig: Providing) -> None:
            assert [type(each) for each in await pull(rig, image)] == [Local] * 3
            assert (rig.directory(2) / "big").read_bytes() == BIG
            await nothing_left(rig)

        providing(workdir, registry, test, mirrored(registry, one, two))
    assert said(expected_logs) == {(one.host, "lied"), (two.host, "lied")}


@pytest.mark.parametrize(
    ("blob", "diff_id"), [(gzip.compress(LAYERS[0]), b"other"), (gzip.compress(b"rubbish"), b"rubbish")]
)
def test_a_layer_that_is_not_what_it_should_be(
    workdir: Path, registry: Registry, expected_logs: ExpectedLogs, blob: bytes, diff_id: bytes
) -> None:
    expected_logs.allow("layer is left to the client")
    made = registry.add_image([blob], diff_ids=[sha256_digest(diff_id)])
    image = IndexedImage(registry, made, (Layer(b"", blob, b"", sha256_digest(blob)),))

    async def test(rig: Providing) -> None:
        assert await pull(rig, image, 0) == [Deferred("parallel-failed")]
        assert os.listdir(rig.directory(1)) == []
        await nothing_left(rig)

    providing(workdir, registry, test, OPTIONS)


def test_a_client_that_does_not_come_back(
    workdir: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallelpull, "_ABANDONED_S", 0.5)
    image = unindexed(registry)

    async def test(rig: Providing) -> None:
        assert [type(each) for each in await pull(rig, image, 0)] == [Local]
        await nothing_left(rig)

    providing(workdir, registry, test, OPTIONS)


def test_remains_of_another_daemon_go(workdir: Path, registry: Registry) -> None:
    (workdir / "unpack/old/fs/deep").mkdir(parents=True)

    async def test(rig: Providing) -> None:
        await nothing_left(rig)

    providing(workdir, registry, test, OPTIONS)


def test_two_clients_that_pull_one_image(
    workdir: Path, registry: Registry, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("layer is left to the client")
    image = unindexed(registry)

    async def test(rig: Providing) -> None:
        first = await pull(rig, image, 0)
        second = await rig.prepare(image, 0, snapshot_id=7)
        assert (type(first[0]), second) == (Local, Deferred("no-index"))
        assert [type(each) for each in await pull(rig, image, 1, 2)] == [Local] * 2
        await nothing_left(rig)

    providing(workdir, registry, test, OPTIONS)


@pytest.mark.parametrize(
    ("text", "connections", "size"), [(-1, 32, 32 << 20), (0, 1, 32 << 20), (7, 7, 32 << 20)]
)
def test_limits_are_bounded(text: int, connections: int, size: int) -> None:
    modes = Config().pull_modes
    pulls = replace(
        modes.parallel_pull_unpack,
        max_concurrent_downloads_per_image=text,
        concurrent_download_chunk_size="1gb",
        max_concurrent_unpacks=0,
    )
    config = replace(Config(), pull_modes=replace(modes, parallel_pull_unpack=pulls))
    settings = settings_of(config, DEFAULT_RETRY, DEFAULT_TIMEOUTS)
    assert (settings.limits.connections, settings.limits.range_size) == (connections, size)
    assert (settings.downloads, settings.unpacks) == (None, 1)


def test_a_program_that_is_none_is_named_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no program")
    for path in (tmp_path / "absent", tmp_path / "text", tmp_path):
        modes = Config().pull_modes
        pulls = replace(
            modes.parallel_pull_unpack, decompress_streams={"gzip": DecompressorConfig(str(path), ())}
        )
        config = replace(Config(), pull_modes=replace(modes, parallel_pull_unpack=pulls))
        with pytest.raises(ConfigError, match=r"decompress_streams\.gzip\] path: .*is not a program"):
            settings_of(config, DEFAULT_RETRY, DEFAULT_TIMEOUTS)
