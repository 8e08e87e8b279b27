"""Bad input from every side: a clear word, the fallback where there is one, and never a wrong byte."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import trio

from snapshotter.api import snapshots_pb2, snapshots_pb2_grpc
from snapshotter.errors import InvalidZtoc
from snapshotter.snapshot.layers import Deferred, Lazy, Local
from snapshotter.ztoc.build import build as build_ztoc
from snapshotter.ztoc.model import Algorithm
from snapshotter.ztoc.parse import parse as parse_ztoc
from snapshotter.ztoc.serialize import serialize
from tests.conftest import ExpectedLogs
from tests.support import host
from tests.support.images import Entry, directory, symlink, tar
from tests.support.indexed import IndexedImage, make_indexed_layer, publish
from tests.support.lazylayer import make_tar
from tests.support.process import Daemon
from tests.support.providing import Options, Providing, providing
from tests.support.registry import Fault, FlipByte, IgnoreRange, Registry, Status, Truncate, WrongRange

CONTENT = random.Random(11).randbytes(300_000)
ONE = make_tar({"big": CONTENT, "small": b"S"})
TWO = make_tar({"other": b"O" * 1000})
pytestmark = pytest.mark.usefixtures("fuse")


def published_with(registry: Registry, ztoc: bytes) -> IndexedImage:
    """Publish an image whose first layer is said to have the zTOC `ztoc`; the second is as it should be."""
    image = publish(registry, [ONE, TWO], version=None)
    image.layers = (replace(image.layers[0], ztoc=ztoc), image.layers[1])
    image.add_v1()
    return image


async def unpacked_beside_a_lazy_one(rig: Providing, image: IndexedImage, reason: str) -> None:
    """Assert that the first layer is unpacked for this reason, right, and that the second is lazy above it."""
    assert isinstance(await rig.prepare(image, 0), Local)
    assert (rig.directory(1) / "big").read_bytes() == CONTENT
    assert isinstance(await rig.prepare(image, 1, parents=(1,)), Lazy)
    assert await rig.read(2, "other") == b"O" * 1000
    assert rig.provider.fallbacks == {reason: 1}


# --- zTOCs


def changed(number: int, value: int) -> bytes:
    """Return the zTOC of an uncompressed layer in which the first byte `number` that matters so is `value`."""
    ztoc = build_ztoc([ONE], algorithm=Algorithm.UNCOMPRESSED).data
    for position, byte in enumerate(ztoc):
        if byte == number:
            candidate = ztoc[:position] + bytes([value]) + ztoc[position + 1 :]
            try:
                parse_ztoc(candidate)
            except InvalidZtoc as error:
                if "unknown compression algorithm" in str(error):
                    return candidate
    raise AssertionError("no such byte")


def swapped_spans() -> bytes:
    """Return a zTOC that is well formed and has the digests of two spans exchanged."""
    layer = make_indexed_layer(ONE)
    ztoc = parse_ztoc(layer.ztoc)
    digests = list(ztoc.compression.span_digests)
    digests[1], digests[2] = digests[2], digests[1]
    return serialize(replace(ztoc, compression=replace(ztoc.compression, span_digests=tuple(digests))))


def test_an_unknown_algorithm(workdir: Path, registry: Registry, expected_logs: ExpectedLogs) -> None:
    expected_logs.allow("layer cannot be lazy")
    image = published_with(registry, changed(Algorithm.UNCOMPRESSED, 77))

    async def test(rig: Providing) -> None:
        await unpacked_beside_a_lazy_one(rig, image, "corrupt-data")

    providing(workdir, registry, test)


def test_a_ztoc_that_is_none(workdir: Path, registry: Registry, expected_logs: ExpectedLogs) -> None:
    expected_logs.allow("layer cannot be lazy")
    tars = [make_tar({"number": bytes([number])}) for number in range(3)]
    image = publish(registry, tars, version=None)
    rubbish = (b"", b"not a zTOC" * 50, make_indexed_layer(tars[2]).ztoc[:-500])
    image.layers = tuple(replace(layer, ztoc=data) for layer, data in zip(image.layers, rubbish, strict=True))
    image.add_v1()

    async def test(rig: Providing) -> None:
        for number in range(3):
            assert isinstance(await rig.prepare(image, number), Local)
            assert (rig.directory(number + 1) / "number").read_bytes() == bytes([number])
        assert rig.provider.fallbacks == {"corrupt-data": 3}

    providing(workdir, registry, test)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(Status(status=404, count=-1), "registry-failed"), (FlipByte(at=99, count=-1), "corrupt-data")],
)
def test_a_ztoc_that_is_missing_or_comes_damaged(
    workdir: Path, registry: Registry, fault: Fault, reason: str, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("layer cannot be lazy")
    image = publish(registry, [ONE, TWO])
    fault.path = image.layers[0].ztoc_digest
    registry.fault(fault)

    async def test(rig: Providing) -> None:
        await unpacked_beside_a_lazy_one(rig, image, reason)

    providing(workdir, registry, test)


def test_a_layer_that_another_image_has_with_another_ztoc(
    workdir: Path, registry: Registry, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("layer cannot be lazy")
    first = publish(registry, [ONE])
    second = publish(registry, [ONE, TWO], repository="second", version=None)
    second.layers = (make_indexed_layer(ONE, tool="another builder"), second.layers[1])
    second.add_v1()

    async def test(rig: Providing) -> None:
        assert isinstance(await rig.prepare(first, 0, snapshot_id=9), Lazy)
        await unpacked_beside_a_lazy_one(rig, second, "unsupported-layer")
        assert await rig.read(9, "big") == CONTENT

    providing(workdir, registry, test)


def test_a_ztoc_of_another_layer_never_gives_a_wrong_byte(workdir: Path, registry: Registry) -> None:
    """It is well formed, and the index vouches for it; every span and every header says that it is wrong."""
    other = make_tar({"big": random.Random(12).randbytes(300_000), "small": b"T"})
    image = published_with(registry, make_indexed_layer(other).ztoc)

    async def test(rig: Providing) -> None:
        assert isinstance(await rig.prepare(image, 0), Lazy)
        for name in ("big", "small"):
            assert "Input/output error" in await rig.failure(1, name)

    providing(workdir, registry, test, Options(read_budget=5.0))


def test_spans_whose_digests_are_wrong_are_errors_and_the_others_are_read(
    workdir: Path, registry: Registry
) -> None:
    image = published_with(registry, swapped_spans())

    async def test(rig: Providing) -> None:
        await rig.prepare(image, 0)
        target = rig.directory(1) / "big"
        assert await read_at(target, 0, 1000) == CONTENT[:1000]
        assert await read_at(target, 100_000, 1000) is None  # of span 1
        assert await read_at(target, 250_000, 1000) == CONTENT[250_000:251_000]
        assert rig.keeper.counters(1)["failures_read"] > 0
        assert rig.fetcher.counters()["digest_mismatches"] > 0

    providing(workdir, registry, test, Options(read_budget=5.0))


async def read_at(path: Path, offset: int, size: int) -> bytes | None:
    """Return a range of a file as a child without read-ahead sees it; None for EIO."""
    code = (
        "import os, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDONLY)\n"
        "os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)\n"
        "sys.stdout.buffer.write(os.pread(fd, int(sys.argv[3]), int(sys.argv[2])))\n"
    )
    result = await trio.run_process(
        [sys.executable, "-c", code, str(path), str(offset), str(size)],
        capture_stdout=True, capture_stderr=True, check=False,
    )  # fmt: skip
    if result.returncode:
        assert b"Input/output error" in result.stderr
        return None
    return bytes(result.stdout)


# --- a registry that lies about the blob


LIES: list[Fault] = [
    FlipByte(count=-1, at=99),  # a layer's first bytes, before span 0, are no file's
    WrongRange(count=-1, shift=512),
    IgnoreRange(count=-1),
    Truncate(count=-1, after=10),
    Status(count=-1, status=404),
    Status(count=-1, status=200, body=b"<html>welcome to the portal</html>"),
]


def test_a_registry_that_lies_is_an_error_while_it_does(workdir: Path, registry: Registry) -> None:
    layers = [make_tar({"big": CONTENT, "small": bytes([number])}) for number in range(len(LIES))]
    image = publish(registry, layers)

    async def test(rig: Providing) -> None:
        for number, fault in enumerate(LIES):
            await rig.prepare(image, number)
            assert await read_in_time(rig, number + 1, "small") == bytes([number])
            fault.path = f"/blobs/{image.layers[number].digest}"
            registry.fault(fault)
            assert "Input/output error" in await rig.failure(number + 1, "big"), fault
            registry.clear_faults()
            assert await read_in_time(rig, number + 1, "big") == CONTENT

    providing(workdir, registry, test, Options(read_budget=2.0))


async def read_in_time(rig: Providing, snapshot_id: int, name: str) -> bytes:
    """Return a file's content; the read budget is short for the sake of those that fail, so again when it was over."""
    for _ in range(5):
        with suppress(subprocess.CalledProcessError):
            return await rig.read(snapshot_id, name)
    return await rig.read(snapshot_id, name)


def test_an_index_that_comes_damaged_is_left_to_the_client(
    workdir: Path, registry: Registry, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("cannot be used")
    expected_logs.allow("layer is left to the client")
    image = publish(registry, [ONE])
    registry.fault(FlipByte(path=image.indices[0].digest, at=40, count=-1))

    async def test(rig: Providing) -> None:
        assert await rig.prepare(image, 0) == Deferred("no-index")

    providing(workdir, registry, test, Options(processes=False))


# --- layers


def test_names_that_lead_out_and_links_that_loop(workdir: Path, registry: Registry) -> None:
    entries = [
        ("../../escaped", b"1"),
        ("a/../../../b/../climbing", b"2"),
        ("/absolute", b"3"),
        ("loop", symlink("loop")),
        ("there", symlink("back")),
        ("back", symlink("there")),
        ("up", symlink("../../../../etc/shadow")),
    ]
    image = publish(registry, [tar(entries)])

    async def test(rig: Providing) -> None:
        assert isinstance(await rig.prepare(image, 0), Lazy)
        for name, content in (("escaped", b"1"), ("climbing", b"2"), ("absolute", b"3")):
            assert await rig.read(1, name) == content
        for name in ("loop", "there"):
            assert "Too many levels" in await rig.failure(1, name)
        names = await trio.run_process(["ls", str(rig.directory(1))], capture_stdout=True)
        assert names.stdout.split() == [
            b"absolute", b"back", b"climbing", b"escaped", b"loop", b"there", b"up",
        ]  # fmt: skip

    providing(workdir, registry, test)


def test_a_directory_of_very_many_entries(workdir: Path, registry: Registry) -> None:
    count = 10_000
    image = publish(registry, [tar((f"d/{number}", b"") for number in range(count))], span_size=1 << 20)

    async def test(rig: Providing) -> None:
        await rig.prepare(image, 0)
        listed = await trio.run_process(
            ["sh", "-c", f"ls -U {rig.directory(1)}/d | sort -u | wc -l"], capture_stdout=True
        )
        assert int(listed.stdout) == count
        assert await rig.read(1, f"d/{count - 1}") == b""

    providing(workdir, registry, test)


REFUSED: list[list[tuple[str, Entry | bytes]]] = [
    [("d/link", Entry(type=b"1", target="d/missing"))],
    [("f", b"x"), ("f/below", b"y")],
    [("a", b"x"), (".wh.a", b"")],
    [("x" * 256, b"")],
]


def test_what_containerd_refuses_is_left_to_it(
    workdir: Path, registry: Registry, expected_logs: ExpectedLogs
) -> None:
    """It has the last word, and will say what is wrong with the image."""
    expected_logs.allow("layer cannot be lazy")
    expected_logs.allow("layer is left to the client")
    image = publish(registry, [tar({"d/": directory()}), *map(tar, REFUSED)])

    async def test(rig: Providing) -> None:
        await rig.prepare(image, 0)
        for number in range(1, len(REFUSED) + 1):
            assert await rig.prepare(image, number, parents=(1,)) == Deferred("unpack-failed"), number
        assert rig.provider.fallbacks == {"unsupported-layer": 4, "unpack-failed": 4}

    providing(workdir, registry, test)


# --- files of our own that are damaged over a restart


def test_cache_files_that_are_damaged_are_noticed_at_the_next_boot(workdir: Path, registry: Registry) -> None:
    damaged = ("spans", "data", "blob")
    image = publish(registry, [make_tar({"big": CONTENT, "which": name.encode()}) for name in damaged])

    async def first(rig: Providing) -> None:
        for number in range(3):
            await rig.prepare(image, number)
            assert await rig.read(number + 1, "big") == CONTENT

    async def second(rig: Providing) -> None:
        for layer, name in zip(image.layers, damaged, strict=True):
            damage(getattr(rig.layers.paths(layer.digest), name), name)
            forget_the_boot(rig.layers.paths(layer.digest).spans)
        await rig.provider.restore()
        await trio.to_thread.run_sync(host.drop_caches)
        for number, name in enumerate(damaged):
            assert await rig.read(number + 1, "big") == CONTENT, name
            assert await rig.read(number + 1, "which") == name.encode()

    providing(workdir, registry, first, Options(leave=True))
    providing(workdir, registry, second)


def damage(path: Path, name: str) -> None:
    """Overwrite the second half of a file with rubbish, or a span file's magic."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        if name != "spans":
            file.seek(size // 2)
            file.write(os.urandom(size - size // 2))
        else:
            file.write(b"RUBBISH!")


def forget_the_boot(spans: Path) -> None:
    """Make a span file one of another boot."""
    data = spans.read_bytes()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip().encode()
    with spans.open("r+b") as file:
        position = data.find(boot)
        if position >= 0:
            file.seek(position)
            file.write(b"0" * len(boot))


# --- a host that cannot be lazy


def test_on_a_kernel_that_is_too_old_nothing_is_lazy_and_the_reason_is_named(
    workdir: Path, registry: Registry
) -> None:
    """The daemon works all the same: containerd gets ordinary mounts, and the operator is told why."""
    image = publish(registry, [ONE])
    daemon = Daemon(workdir / "d")
    program = (
        "import sys\n"
        "from snapshotter.fuse import kernel\n"
        "kernel.OLDEST_MINOR = 1000\n"
        "from snapshotter.daemon.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    daemon.command[1:3] = ["-c", program]
    try:
        daemon.start()
        report = daemon.status()
        assert report["lazy"] is False
        assert "7.1000 or newer is needed" in report["not_lazy_because"]
        with grpc.insecure_channel(f"unix://{daemon.address}") as channel:
            stub = snapshots_pb2_grpc.SnapshotsStub(channel)
            request = snapshots_pb2.PrepareSnapshotRequest(
                snapshotter="soci", key="k", labels=image.labels(0)
            )
            (mount,) = stub.Prepare(request, timeout=60).mounts
        assert mount.type == "bind"
        assert registry.requests == []
        assert daemon.metrics()['soci_not_lazy_layers_total{reason="not-lazy"}'] == 1
        (said,) = [
            r
            for r in daemon.records()
            if r.get("msg") == "nothing is lazy on this host; images are pulled in full"
        ]
        assert "7.1000" in said["reason"]
    finally:
        daemon.cleanup()
