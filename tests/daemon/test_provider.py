"""The layer provider: which layer becomes lazy, which is unpacked, which is left to containerd, and why."""

from __future__ import annotations

import os
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from snapshotter.daemon import catalog
from snapshotter.daemon.asked import Asked
from snapshotter.daemon.discovery import Modes
from snapshotter.errors import Unavailable
from snapshotter.snapshot.layers import Deferred, Lazy, Local
from snapshotter.snapshot.model import LazyMount
from tests.conftest import ExpectedLogs
from tests.support import host
from tests.support.images import directory, tar
from tests.support.indexed import IndexedImage, publish
from tests.support.lazylayer import make_tar
from tests.support.providing import Options, Providing, providing
from tests.support.registry import Registry, Stall, Status

ONE = make_tar({"one": b"1" * 100_000, "etc/a": b"A"})
TWO = make_tar({"two": b"2" * 100_000, "etc/b": b"B"})
THREE = make_tar({"three": b"3" * 100_000})
QUIET = Options(processes=False)
pytestmark = pytest.mark.usefixtures("fuse")


# --- what labels say


def labels_of(registry: Registry) -> dict[str, str]:
    return publish(registry, [ONE]).labels()


@pytest.mark.parametrize("key", ["cri.image-ref", "cri.manifest-digest", "cri.layer-digest"])
@pytest.mark.parametrize("value", [None, "", "not well formed: %"])
def test_labels_that_are_missing_or_damaged_ask_for_nothing(
    registry: Registry, key: str, value: str | None
) -> None:
    labels = labels_of(registry)
    assert Asked.from_labels(labels) is not None
    if value is None:
        del labels[f"containerd.io/snapshot/{key}"]
    else:
        labels[f"containerd.io/snapshot/{key}"] = value
    assert Asked.from_labels(labels) is None


def test_a_named_index_is_asked_for_by_its_digest(registry: Registry) -> None:
    labels = labels_of(registry)
    digest = "sha256:" + "1" * 64
    asked = Asked.from_labels(labels | {"containerd.io/snapshot/remote/soci.index.digest": digest})
    assert asked is not None
    assert asked.index == digest
    asked = Asked.from_labels(labels | {"containerd.io/snapshot/remote/soci.index.digest": ""})
    assert asked is not None
    assert asked.index is None


def test_missing_labels_are_left_to_the_client(
    workdir: Path, registry: Registry, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("layer is left to the client")
    image = publish(registry, [ONE])

    async def test(rig: Providing) -> None:
        assert await rig.prepare(image, labels={}) == Deferred("missing-labels")
        assert rig.provider.fallbacks == {"missing-labels": 1}
        assert registry.requests == []

    providing(workdir, registry, test, QUIET)


# --- lazy


def test_an_indexed_image_is_lazy_layer_by_layer(workdir: Path, registry: Registry) -> None:
    image = publish(registry, [ONE, TWO])

    async def test(rig: Providing) -> None:
        lower = await rig.prepare(image, 0)
        upper = await rig.prepare(image, 1, parents=(1,))
        assert isinstance(lower, Lazy)
        assert isinstance(upper, Lazy)
        assert (lower.layer, upper.layer) == tuple(layer.digest for layer in image.layers)
        assert upper.usage.inodes == len(os.listdir(rig.layers.paths(upper.layer).directory)) + 1
        assert await rig.read(1, "one") == b"1" * 100_000
        assert await rig.read(2, "etc/b") == b"B"
        assert [mount.snapshot_id for mount in rig.store.lazy_mounts()] == [1, 2]
        rig.provider.check([1, 2])
        assert rig.provider.fallbacks == {}

    providing(workdir, registry, test)


def test_all_ztocs_of_the_index_come_with_the_first_layer(workdir: Path, registry: Registry) -> None:
    image = publish(registry, [ONE, TWO, THREE])

    async def test(rig: Providing) -> None:
        await rig.prepare(image, 0)
        with trio.fail_after(60):
            while not all(rig.layers.has_tree(layer.digest) for layer in image.layers):
                await trio.sleep(0.01)
        registry.clear_requests()
        await rig.prepare(image, 1, parents=(1,))
        assert registry.count(path="/manifests/|/referrers/") == 0
        assert registry.count(path=image.layers[1].ztoc_digest) == 0

    providing(workdir, registry, test)


def test_layers_prepared_at_once_do_not_disturb_each_other(workdir: Path, registry: Registry) -> None:
    image = publish(registry, [ONE])

    async def test(rig: Providing) -> None:
        async with trio.open_nursery() as nursery:
            for number in range(1, 9):
                nursery.start_soon(lambda number=number: rig.prepare(image, 0, snapshot_id=number))
        assert set(rig.keeper.mounts) == set(range(1, 9))
        assert registry.count(path=image.layers[0].ztoc_digest) == 1
        for number in (1, 8):
            assert await rig.read(number, "etc/a") == b"A"

    providing(workdir, registry, test)


def test_usage_is_what_the_cache_occupies(workdir: Path, registry: Registry) -> None:
    image = publish(registry, [make_tar({"big": os.urandom(1 << 20)})])

    async def test(rig: Providing) -> None:
        await rig.prepare(image, 0)
        before = await trio.to_thread.run_sync(rig.provider.usage, 1)
        await rig.read(1, "big")
        after = await trio.to_thread.run_sync(rig.provider.usage, 1)
        assert before is not None
        assert after is not None
        assert before.size < 1_000_000  # zTOC and tree
        assert after.size > before.size + 2_000_000  # the blob and the inflated data
        files = {"ztoc", "tree", "blob", "data", "spans", "trace"}
        assert set(os.listdir(rig.layers.paths(image.layers[0].digest).directory)) <= files
        assert 6 <= before.inodes <= after.inodes <= 7, "the files and their directory"
        assert rig.provider.usage(77) is None

    providing(workdir, registry, test)


def test_the_background_makes_a_layer_whole(workdir: Path, registry: Registry) -> None:
    image = publish(registry, [ONE])

    async def test(rig: Providing) -> None:
        await rig.prepare(image, 0)
        with trio.fail_after(60):
            while rig.fetcher.counters()["layers_verified"] == 0:
                await trio.sleep(0.02)
        registry.fault(Status(status=500, count=-1))
        assert await rig.read(1, "one") == b"1" * 100_000

    providing(workdir, registry, test, Options(background=True))


# --- the last use of a layer


def test_the_last_mount_of_a_layer_takes_its_files_along(workdir: Path, registry: Registry) -> None:
    image = publish(registry, [ONE])
    (layer,) = image.layers

    async def test(rig: Providing) -> None:
        for number in (1, 2):
            await rig.prepare(image, 0, snapshot_id=number)
        assert await rig.release(1)
        with trio.fail_after(60):
            while 1 in rig.keeper.mounts:
                await trio.sleep(0.01)
        assert await rig.read(2, "etc/a") == b"A"
        assert rig.cached() == [layer.digest]
        assert await rig.release(2)
        with trio.fail_after(60):
            while rig.cached():
                await trio.sleep(0.01)
        assert rig.store.lazy_mounts() == []
        assert not await rig.release(2)
        assert isinstance(await rig.prepare(image, 0, snapshot_id=3), Lazy)
        assert await rig.read(3, "etc/a") == b"A"

    providing(workdir, registry, test)


def test_files_that_cannot_be_removed_stay_and_the_daemon_goes_on(
    workdir: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("files of a layer stay")
    image = publish(registry, [ONE])

    async def test(rig: Providing) -> None:
        def remove(digest: str) -> None:
            raise OSError(30, "Read-only file system")

        await rig.prepare(image, 0)
        monkeypatch.setattr(rig.layers, "remove", remove)
        await rig.release(1)
        with trio.fail_after(60):
            while rig.keeper.mounts:
                await trio.sleep(0.01)
        assert isinstance(await rig.prepare(image, 0, snapshot_id=2), Lazy)

    providing(workdir, registry, test)


# --- unpacked


def test_a_layer_that_is_not_indexed_is_unpacked_between_lazy_ones(workdir: Path, registry: Registry) -> None:
    middle = tar({"etc/": directory(0o700), "etc/.wh.a": b"", "mid/x": b"M"})
    image = publish(registry, [ONE, middle, THREE], indexed=[0, 2])

    async def test(rig: Providing) -> None:
        assert isinstance(await rig.prepare(image, 0), Lazy)
        assert isinstance(await rig.prepare(image, 1, parents=(1,)), Local)
        assert isinstance(await rig.prepare(image, 2, parents=(2, 1)), Lazy)
        assert stat.S_ISCHR((rig.directory(2) / "etc/a").lstat().st_mode)
        assert (rig.directory(2) / "mid/x").read_bytes() == b"M"
        assert rig.provider.fallbacks == {"no-ztoc": 1}

    providing(workdir, registry, test)


def test_implied_directories_are_as_below_lazy_or_not(workdir: Path, registry: Registry) -> None:
    bottom = tar({"tmp/": directory(0o1777), "srv/": directory(0o700)})
    image = publish(registry, [bottom, make_tar({"tmp/x": b"", "srv/x": b""})])
    unpacked = publish(
        registry, [bottom, make_tar({"tmp/x": b"", "srv/x": b""})], repository="o", indexed=[1]
    )

    async def test(rig: Providing) -> None:
        for offset, each in ((0, image), (10, unpacked)):
            await rig.prepare(each, 0, snapshot_id=offset + 1)
            provided = await rig.prepare(each, 1, snapshot_id=offset + 2, parents=(offset + 1,))
            assert isinstance(provided, Lazy)
            modes = await trio.run_process(
                [
                    "stat",
                    "-c",
                    "%a",
                    str(rig.directory(offset + 2) / "tmp"),
                    str(rig.directory(offset + 2) / "srv"),
                ],
                capture_stdout=True,
            )
            assert modes.stdout.split() == [b"1777", b"700"]

    providing(workdir, registry, test)


def test_small_layers_are_unpacked_when_the_size_is_told(workdir: Path, registry: Registry) -> None:
    image = publish(registry, [ONE])
    size = "containerd.io/snapshot/remote/soci.size"

    async def test(rig: Providing) -> None:
        small = image.labels(0) | {size: "999"}
        assert isinstance(await rig.prepare(image, 0, labels=small), Local)
        large = image.labels(0) | {size: "1000"}
        assert isinstance(await rig.prepare(image, 0, snapshot_id=2, labels=large), Lazy)
        odd = image.labels(0) | {size: "a lot"}
        assert isinstance(await rig.prepare(image, 0, snapshot_id=3, labels=odd), Lazy)

    providing(workdir, registry, test, Options(min_layer_size=1000))


# --- left to the client


def test_no_index_is_left_to_the_client(
    workdir: Path, registry: Registry, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("layer is left to the client")
    image = publish(registry, [ONE, TWO], version=None)

    async def test(rig: Providing) -> None:
        assert await rig.prepare(image, 0) == Deferred("no-index")
        asked = len(registry.requests)
        assert await rig.prepare(image, 1, parents=(1,)) == Deferred("no-index")
        assert len(registry.requests) == asked
        assert rig.provider.fallbacks == {"no-index": 2}
        assert list(rig.directory(1).iterdir()) == []

    providing(workdir, registry, test, QUIET)


def test_modes_that_are_off(workdir: Path, registry: Registry, expected_logs: ExpectedLogs) -> None:
    expected_logs.allow("layer is left to the client")
    image = publish(registry, [ONE])

    async def test(rig: Providing) -> None:
        assert await rig.prepare(image, 0) == Deferred("no-index")
        assert registry.requests == []

    providing(workdir, registry, test, replace(QUIET, modes=Modes(v1=False, v2=False)))


def test_a_registry_that_fails_is_left_to_the_client(
    workdir: Path, registry: Registry, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("layer is left to the client")
    image = publish(registry, [ONE])
    registry.fault(Status(status=403, count=-1))

    async def test(rig: Providing) -> None:
        assert await rig.prepare(image, 0) == Deferred("index-failed")

    providing(workdir, registry, test, QUIET)


def test_a_registry_that_says_nothing_costs_the_mount_timeout(
    workdir: Path, registry: Registry, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("layer is left to the client")
    image = publish(registry, [ONE])
    registry.fault(Stall(path="/manifests/", count=-1, seconds=30))

    async def test(rig: Providing) -> None:
        started = trio.current_time()
        assert await rig.prepare(image, 0) == Deferred("timeout")
        assert trio.current_time() - started < 25

    providing(workdir, registry, test, replace(QUIET, mount_timeout=0.5))


def test_the_end_of_the_daemon_ends_what_waits(workdir: Path, registry: Registry) -> None:
    """A Prepare in that moment is told to ask again, and leaves nothing; so is one that still comes."""
    image = publish(registry, [ONE])
    registry.fault(Stall(path="/manifests/", count=-1, seconds=30))

    async def test(rig: Providing) -> None:
        outcomes: list[str] = []

        async def prepare() -> None:
            with pytest.raises(Unavailable, match="is ending") as raised:
                await rig.prepare(image, 0)
            outcomes.append(str(raised.value))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(prepare)
            while not registry.requests:
                await trio.sleep(0.01)
            rig.provider.end()
        await prepare()
        assert len(outcomes) == 2
        assert not rig.keeper.mounts

    providing(workdir, registry, test, QUIET)


def test_a_host_that_cannot_be_lazy_asks_nobody(
    workdir: Path, registry: Registry, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("layer is left to the client")
    image = publish(registry, [ONE])

    async def test(rig: Providing) -> None:
        rig.provider.not_lazy = "no /dev/fuse"
        assert await rig.prepare(image, 0) == Deferred("not-lazy")
        assert registry.requests == []
        assert rig.provider.fallbacks == {"not-lazy": 1}

    providing(workdir, registry, test, QUIET)


def test_what_can_neither_be_lazy_nor_be_unpacked(
    workdir: Path, registry: Registry, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("layer cannot be lazy")
    expected_logs.allow("layer is left to the client")
    image = publish(registry, [ONE])
    registry.fault(Status(path=image.layers[0].ztoc_digest, status=404, count=-1))
    registry.fault(Status(path=f"/blobs/{image.layers[0].digest}", status=404, count=-1))

    async def test(rig: Providing) -> None:
        assert await rig.prepare(image, 0) == Deferred("unpack-failed")
        assert rig.provider.fallbacks == {"registry-failed": 1, "unpack-failed": 1}
        assert list(rig.directory(1).iterdir()) == []
        assert rig.store.lazy_mounts() == []

    providing(workdir, registry, test, QUIET)


# --- a fetcher or a mount that fails


def test_a_fetcher_that_never_answers_costs_the_mount_timeout(
    workdir: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch, expected_logs: ExpectedLogs
) -> None:
    """And nobody who comes later for the same layer."""
    expected_logs.allow("layer cannot be lazy")
    image = publish(registry, [ONE])

    async def test(rig: Providing) -> None:
        usual = rig.provider.settings

        async def never(layer: str, *, background: bool, image: str) -> None:
            await trio.sleep_forever()

        with monkeypatch.context() as patch:
            patch.setattr(rig.fetcher, "open", never)
            # The image is known then: it is the layer for which the time runs out.
            await rig.provider._catalog.resolve(image.reference, None)
            rig.provider.settings = replace(usual, mount_timeout_s=1.5)
            assert isinstance(await rig.prepare(image, 0), Local)
        rig.provider.settings = usual
        assert rig.provider.fallbacks == {"timeout": 1}
        assert isinstance(await rig.prepare(image, 0, snapshot_id=2), Lazy)
        assert await rig.read(2, "etc/a") == b"A"

    providing(workdir, registry, test)


def test_a_mount_that_fails_leaves_nothing(
    workdir: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("layer cannot be lazy")
    image = publish(registry, [ONE])

    async def test(rig: Providing) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("snapshotter.fuse.mounting.open_device", lambda: os.open("/dev/no-fuse", os.O_RDWR))
            assert isinstance(await rig.prepare(image, 0), Local)
        assert rig.provider.fallbacks == {"mount-failed": 1}
        assert rig.store.lazy_mounts() == []
        with trio.fail_after(60):
            while rig.cached():
                await trio.sleep(0.01)
        assert host.mounts_below(workdir) == []

    providing(workdir, registry, test)


def test_a_fetcher_that_dies_is_not_noticed_by_readers(
    workdir: Path, registry: Registry, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("fetcher ended")
    image = publish(registry, [ONE, TWO])

    async def test(rig: Providing) -> None:
        await rig.prepare(image, 0)
        assert await rig.read(1, "etc/a") == b"A"
        assert rig.fetcher.pid is not None
        os.kill(rig.fetcher.pid, 9)
        assert await rig.read(1, "one") == b"1" * 100_000
        await rig.prepare(image, 1, parents=(1,))
        assert await rig.read(2, "two") == b"2" * 100_000

    providing(workdir, registry, test)


# --- restarts


def prepared(workdir: Path, registry: Registry, image: IndexedImage) -> None:
    """Prepare every layer, read nothing, and stop as a daemon does."""

    async def test(rig: Providing) -> None:
        for number in range(len(image.layers)):
            await rig.prepare(image, number, parents=tuple(range(number, 0, -1)))
        rig.store.record_mount(LazyMount(99, image.layers[0].digest, "", "no reference: %", "d", "n"))

    providing(workdir, registry, test, Options(leave=True))


def test_a_restart_needs_no_network(workdir: Path, registry: Registry, expected_logs: ExpectedLogs) -> None:
    expected_logs.allow("image of a layer is not known")
    expected_logs.allow("could not be restored")
    image = publish(registry, [ONE, TWO])
    prepared(workdir, registry, image)
    registry.fault(Status(status=500, count=-1))
    registry.clear_requests()

    async def test(rig: Providing) -> None:
        await rig.provider.restore()
        assert set(rig.keeper.mounts) == {1, 2}
        assert registry.requests == []
        registry.clear_faults()
        assert await rig.read(1, "one") == b"1" * 100_000  # where its blob is had to be found out again
        with pytest.raises(Unavailable, match="snapshot 99 is not mounted"):
            rig.provider.check([1, 99])
        assert await rig.release(99)  # it can go, though it never came
        for number in (2, 1):
            await rig.release(number)
        with trio.fail_after(60):
            while rig.cached():
                await trio.sleep(0.01)
        assert rig.store.lazy_mounts() == []

    providing(workdir, registry, test)


def test_the_space_of_a_removed_image_is_free_at_once(
    workdir: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "_YOUNG_S", 0.0)
    image = publish(registry, [make_tar({"big": os.urandom(8 << 20)})])
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", workdir], check=True)

    def free() -> int:
        disk = os.statvfs(workdir)
        return disk.f_bavail * disk.f_frsize

    async def test(rig: Providing) -> None:
        before = free()
        await rig.prepare(image, 0)
        await rig.read(1, "big")
        assert free() < before - (16 << 20), "the blob and what it inflates to"
        await rig.release(1)
        with trio.fail_after(60):
            while free() < before - (1 << 20) or os.listdir(rig.root / "images"):
                await trio.sleep(0.02)

    try:
        providing(workdir, registry, test)
    finally:
        subprocess.run(["umount", "-l", workdir], check=True)


def test_layers_that_nobody_uses_are_removed_at_the_start(workdir: Path, registry: Registry) -> None:
    """What was prepared ahead for a pull that never came this far, or was left by a crash."""
    image = publish(registry, [ONE, TWO])

    async def first(rig: Providing) -> None:
        await rig.prepare(image, 0)
        with trio.fail_after(60):
            while len(rig.cached()) < 2 or not rig.layers.has_tree(image.layers[1].digest):
                await trio.sleep(0.01)

    async def second(rig: Providing) -> None:
        await rig.provider.restore()
        assert rig.cached() == [image.layers[0].digest]
        assert await rig.read(1, "etc/a") == b"A"

    providing(workdir, registry, first, Options(leave=True))
    providing(workdir, registry, second)


def test_a_start_without_a_fetcher_goes_on(
    workdir: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("fetcher ended")
    expected_logs.allow("no fetcher yet")
    monkeypatch.setattr("snapshotter.daemon.provider._RESTORE_PATIENCE_S", 0.5)
    monkeypatch.setattr("snapshotter.daemon.provider.boot_id", lambda: "another")
    image = publish(registry, [ONE])

    async def first(rig: Providing) -> None:
        await rig.prepare(image, 0)
        assert await rig.read(1, "etc/a") == b"A"

    async def second(rig: Providing) -> None:
        await rig.provider.restore()
        assert set(rig.keeper.mounts) == {1}
        assert await rig.read(1, "etc/a") == b"A"  # it is there

    providing(workdir, registry, first, Options(leave=True))
    monkeypatch.setattr("snapshotter.daemon.fetching.FetcherProcess._start", lambda _self: os.open("/no", 0))
    providing(workdir, registry, second)


def test_a_layer_above_one_that_is_not_mounted_is_left_alone(
    workdir: Path, registry: Registry, expected_logs: ExpectedLogs
) -> None:
    """Its parent's directory may be a dead mount, or one that waits for this very process: nobody looks."""
    expected_logs.allow("layer cannot be lazy")
    expected_logs.allow("layer is left to the client")
    expected_logs.allow("image of a layer is not known")
    expected_logs.allow("could not be restored")
    image = publish(registry, [ONE, TWO])
    prepared(workdir, registry, image)

    async def test(rig: Providing) -> None:
        await rig.provider.restore()
        before = rig.provider.fallbacks.copy()
        assert await rig.prepare(image, 1, snapshot_id=5, parents=(99, 1)) == Deferred("unpack-failed")
        assert rig.provider.fallbacks == before | {"mount-failed": 1, "unpack-failed": 1}

    providing(workdir, registry, test)
