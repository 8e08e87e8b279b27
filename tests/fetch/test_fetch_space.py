"""Little room: a cap, a minimum of free disk, and a disk that is full. Readers notice none of it but the time."""

from __future__ import annotations

import gc
import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from snapshotter.fetch import eviction
from snapshotter.layer.spans import SpanState
from tests.conftest import ExpectedLogs
from tests.fetch.rig import Layer, Rig, Server, make_layer
from tests.support.process import wait_until
from tests.support.registry import Registry

KIB = 1 << 10
MIB = 1 << 20


@pytest.fixture(autouse=True)
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read a moment ago may be evicted: tests do not wait."""
    monkeypatch.setattr(eviction, "GRACE_SECONDS", 0.0)


@pytest.fixture
def small_disk(workdir: Path) -> Iterator[Path]:
    """An ext4 of 16 MiB, with blocks of 4 KiB."""
    image = workdir / "image"
    image.touch()
    os.truncate(image, 16 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-b", "4096", "-m", "0", "-O", "^has_journal", image], check=True)
    place = workdir / "disk"
    place.mkdir()
    subprocess.run(["mount", "-o", "loop", image, place], check=True)
    yield place

    def is_off() -> bool:
        gc.collect()  # what is open below it may be garbage; a worker of the fetcher may still be writing
        return subprocess.run(["umount", place], check=False).returncode == 0

    wait_until(is_off, timeout=60, what="nobody uses the small disk")


def fixed(*layers: Layer) -> int:
    """Return what the files that hold no spans occupy: the zTOC has a window of 32 KiB for each."""
    return sum(len(layer.ztoc) + len(layer.tree) + 48 * KIB for layer in layers)


def fill(disk: Path) -> Path:
    """Leave nothing free on `disk`; return the file that takes it all."""
    ballast = disk / "ballast"
    ballast.touch()
    size = -1
    while (
        size < ballast.stat().st_size
    ):  # what was set aside for blocks that were not allocated yet comes back
        size = ballast.stat().st_size
        for piece in (64 * KIB, 512):
            with suppress(OSError), ballast.open("ab", buffering=0) as file:
                while True:
                    file.write(bytes(piece))
        with ballast.open("ab", buffering=0) as file:
            os.fsync(file)
    return ballast


def read_all(server: Server, layer: Layer) -> None:
    for span in range(len(layer.spans)):
        assert server.read(span) == layer.content(span)


def occupied(rig: Rig, layer: Layer) -> int:
    """Return what the layer's files take up on disk."""
    directory = rig.store.paths(layer.digest).directory
    inodes = {path.stat().st_ino: path.stat().st_blocks for path in directory.iterdir()}
    return sum(inodes.values()) * 512


def read_twice_within(rig: Rig, layer: Layer, cap: int) -> None:
    """Read every span twice, each right, with no more than `cap` bytes on disk at any time."""
    server = rig.connect(layer)
    for _ in range(2):
        for span in range(len(layer.spans)):
            assert server.read(span) == layer.content(span)
            assert occupied(rig, layer) <= cap


def test_a_layer_larger_than_the_cap_is_read_whole_and_the_cap_holds(
    tmp_path: Path, registry: Registry
) -> None:
    layer = make_layer(size=4 * MIB)
    cap = fixed(layer) + 2 * MIB
    with Rig(tmp_path, registry, options={"cache_max_bytes": cap}) as rig:
        read_twice_within(rig, rig.add(layer), cap)
        assert rig.count("evicted_data_spans") > 0
        assert rig.count("evicted_blob_spans") > 0


def test_inflated_bytes_go_before_compressed_ones(tmp_path: Path, registry: Registry) -> None:
    layer = make_layer(size=4 * MIB)
    with Rig(
        tmp_path, registry, options={"cache_max_bytes": fixed(layer) + len(layer.blob) + 2 * MIB}
    ) as rig:
        rig.add(layer)
        server = rig.connect(layer)
        read_all(server, layer)
        registry.clear_requests()
        read_all(server, layer)
        assert rig.ranges() == [], "everything was inflated again from what is there"
        assert rig.count("evicted_data_spans") > 0
        assert rig.count("evicted_blob_spans") == 0


def test_what_was_used_last_stays(tmp_path: Path, registry: Registry) -> None:
    layer = make_layer(size=4 * MIB)
    with Rig(
        tmp_path, registry, options={"cache_max_bytes": fixed(layer) + len(layer.blob) + 2 * MIB}
    ) as rig:
        rig.add(layer)
        server = rig.connect(layer)
        for span in range(len(layer.spans)):
            assert server.read(span) == layer.content(span)
            assert server.read(0) == layer.content(0)
            if not rig.count("evicted_data_spans"):
                last = span
        assert rig.states(layer)[0] is SpanState.INFLATED
        assert rig.states(layer)[1] is SpanState.FETCHED, "the first to go"
        assert last > 2


def test_the_background_stops_below_the_cap_and_goes_on_when_another_layer_goes(
    tmp_path: Path, registry: Registry
) -> None:
    first, second = (make_layer(size=4 * MIB, span_size=128 * KIB, seed=seed) for seed in (1, 2))
    cap = fixed(first, second) + len(first.blob) * 3 // 2
    with Rig(tmp_path, registry, options={"cache_max_bytes": cap, "range_max_bytes": 64 * KIB}) as rig:
        rig.add(first)
        rig.add(second)
        rig.open(first)
        rig.open(second, background=True)
        rig.wait_verified(second)
        rig.open(first, background=True)
        rig.wait_for(lambda: occupied(rig, first) + occupied(rig, second) > cap * 0.7, "the cap to come near")
        assert rig.count("evicted_data_spans") == rig.count("evicted_blob_spans") == 0
        assert SpanState.MISSING in rig.states(first)
        rig.send_close(second)
        rig.wait_verified(first)


def test_a_layer_whose_blob_cannot_be_fetched_again_keeps_it(
    tmp_path: Path, registry: Registry, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("no room in the cache")
    layer = make_layer(size=4 * MIB)
    with Rig(tmp_path, registry) as rig:
        rig.add(layer)
        rig.open(layer, background=True)
        rig.wait_verified(layer)
    with Rig(tmp_path, registry, options={"cache_max_bytes": fixed(layer) + MIB}) as rig:
        rig.source = lambda _: None
        rig.open(layer)
        read_all(rig.connect(layer), layer)
        assert rig.count("evicted_blob_spans") == 0
        assert rig.count("spans_lent") > 0
        assert SpanState.MISSING not in rig.states(layer)


def test_the_disk_keeps_what_is_for_others(
    small_disk: Path, registry: Registry, expected_logs: ExpectedLogs
) -> None:
    layer = make_layer(size=8 * MIB)
    (small_disk / "ballast").write_bytes(bytes(4 * MIB))
    with Rig(small_disk, registry, options={"cache_min_free_bytes": 4 * MIB}) as rig:
        rig.add(layer)
        server = rig.connect(layer)
        for span in range(len(layer.spans)):
            assert server.read(span) == layer.content(span)
            disk = os.statvfs(small_disk)
            assert disk.f_bavail * disk.f_frsize >= 4 * MIB - 64 * KIB, "but for the rounding of blocks"
        assert rig.count("evicted_data_spans") > 0
    expected_logs.records.clear()


def test_a_full_disk_is_said_once_and_reads_go_on_from_memory(
    small_disk: Path, registry: Registry, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("the disk takes nothing")
    layer = make_layer()
    with Rig(small_disk, registry) as rig:
        rig.add(layer)
        rig.open(layer)
        ballast = fill(small_disk)
        server = rig.connect(layer)
        for _ in range(2):
            read_all(server, layer)
        assert rig.count("disk_full") > 0
        assert rig.count("failures") == 0
        assert rig.count("spans_lent") == 2 * len(layer.spans)
        said = [one for one in expected_logs.records if "takes nothing" in one.getMessage()]
        assert len(said) == 1
        ballast.unlink()
        assert server.read(4) == layer.content(4)
        rig.wait_for(lambda: rig.states(layer)[4] is SpanState.INFLATED, "the disk to be used again")
    expected_logs.records[:] = said  # the trace may not have been written either


def test_a_full_disk_with_something_to_evict_makes_room(
    small_disk: Path, registry: Registry, expected_logs: ExpectedLogs
) -> None:
    layer = make_layer(size=2 * MIB)
    with Rig(small_disk, registry) as rig:
        rig.add(layer)
        server = rig.connect(layer)
        half = len(layer.spans) // 2
        for span in range(half):
            assert server.read(span) == layer.content(span)
        fill(small_disk)
        for span in range(half, len(layer.spans)):
            assert server.read(span) == layer.content(span)
        assert rig.count("evicted_data_spans") > 0

        def stored() -> bool:
            assert server.read(half) == layer.content(half)
            return rig.states(layer)[half] is SpanState.INFLATED

        rig.wait_for(stored, "the room that was made to be used")
        assert rig.count("failures") == 0
    expected_logs.records.clear()


def test_an_uncompressed_layer_is_stored_once(tmp_path: Path, registry: Registry) -> None:
    layer = make_layer(size=2 * MIB, compression="none")
    with Rig(tmp_path, registry) as rig:
        rig.add(layer)
        read_all(rig.connect(layer), layer)
        rig.open(layer, background=True)
        rig.wait_verified(layer)
        paths = rig.store.paths(layer.digest)
        assert paths.blob.samefile(paths.data)
        assert occupied(rig, layer) < len(layer.blob) + fixed(layer)
    with Rig(tmp_path, registry, options={"boot_id": "another"}) as rig:
        rig.source = lambda _: None
        rig.open(layer)
        read_all(rig.connect(layer), layer)
        assert rig.count("spans_checked") == len(layer.spans)
        assert rig.count("spans_damaged") == 0


def test_an_uncompressed_layer_larger_than_the_cap_is_read_whole(tmp_path: Path, registry: Registry) -> None:
    layer = make_layer(size=4 * MIB, compression="none")
    cap = fixed(layer) + 2 * MIB
    with Rig(tmp_path, registry, options={"cache_max_bytes": cap}) as rig:
        read_twice_within(rig, rig.add(layer), cap)


def test_readers_beside_constant_eviction_get_right_bytes(
    tmp_path: Path, registry: Registry, expected_logs: ExpectedLogs
) -> None:
    layer = make_layer(size=4 * MIB)
    with Rig(tmp_path, registry, options={"cache_max_bytes": fixed(layer) + MIB}) as rig:
        rig.add(layer)
        servers = [rig.connect(layer) for _ in range(4)]
        for offset in range(0, len(layer.spans), 3):
            for number, server in enumerate(servers):
                server.want((offset + 17 * number) % len(layer.spans))
            for number, server in enumerate(servers):
                server.wait((offset + 17 * number) % len(layer.spans))
        assert rig.count("failures") == 0
        assert rig.count("evicted_data_spans") > 0
        expected_logs.records.clear()  # at moments there is nothing left to evict
