"""The layers of a lazy image that are not lazy themselves, small ones most of all: pulled ahead, all at once."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import trio

from snapshotter.daemon import parallelpull
from snapshotter.snapshot.layers import Deferred, Lazy, Local, Provided
from tests.conftest import ExpectedLogs
from tests.daemon.test_parallelpull import PARALLEL, nothing_left, pull
from tests.support.images import directory, tar
from tests.support.indexed import IndexedImage, publish
from tests.support.lazylayer import make_tar
from tests.support.providing import Options, Providing, providing
from tests.support.registry import Registry, Status

LAYERS = [
    make_tar({"lazy/one": b"1" * 1000}),
    tar({"a/": directory(0o711, uid=5), "a/one": b"1"}),
    make_tar({"lazy/two": b"2" * 1000}),
    tar({"a/two": b"2"}),  # on an `a` that only the packed layer below describes
    tar({"b/.wh.gone": b"", "b/three": b"3"}),
]
LAZY = (0, 2)
KINDS: list[type[Provided]] = [Lazy, Local, Lazy, Local, Local]
OPTIONS = Options(parallel=PARALLEL)
ONCE = 2
"""Requests for a blob: where it is, and for its bytes."""

pytestmark = pytest.mark.usefixtures("fuse")


def fetches(registry: Registry, image: IndexedImage, layer: int) -> int:
    """Count the requests for a layer's blob."""
    return registry.count(path=f"/blobs/{image.layers[layer].digest}", method="GET")


def test_they_come_before_they_are_asked_for_and_fit_together(workdir: Path, registry: Registry) -> None:
    image = publish(registry, LAYERS, indexed=LAZY)

    async def test(rig: Providing) -> None:
        assert isinstance((await pull(rig, image, 0))[0], Lazy)
        with trio.fail_after(60):
            while not all(fetches(registry, image, layer) for layer in (1, 3, 4)):
                await trio.sleep(0.01)
        assert [type(each) for each in await pull(rig, image, 1, 2, 3, 4)] == KINDS[1:]
        found = (rig.directory(4) / "a").stat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o711, 5)
        assert stat.S_ISCHR((rig.directory(5) / "b/gone").lstat().st_mode)
        assert await rig.read(3, "lazy/two") == b"2" * 1000
        assert rig.provider.fallbacks == {"no-ztoc": 3}
        assert [fetches(registry, image, layer) for layer in (1, 3, 4)] == [ONCE] * 3
        await nothing_left(rig)

    providing(workdir, registry, test, OPTIONS)


def test_above_layers_that_are_there(workdir: Path, registry: Registry) -> None:
    image = publish(registry, LAYERS, indexed=LAZY)

    async def test(rig: Providing) -> None:
        for snapshot_id in (1, 2):
            (rig.directory(snapshot_id) / "a").mkdir(parents=True)
        assert [type(each) for each in await pull(rig, image, 2, 3, 4)] == KINDS[2:]
        assert fetches(registry, image, 1) == 0
        await nothing_left(rig)

    providing(workdir, registry, test, OPTIONS)


def test_one_that_cannot_be_had_ahead_is_pulled_alone(workdir: Path, registry: Registry) -> None:
    image = publish(registry, LAYERS, indexed=LAZY)
    fault = registry.fault(Status(path=f"/blobs/{image.layers[1].digest}", status=404, count=1))

    async def test(rig: Providing) -> None:
        assert [type(each) for each in await pull(rig, image)] == KINDS
        assert fault.hits == 1
        assert (rig.directory(2) / "a/one").read_bytes() == b"1"
        await nothing_left(rig)

    providing(workdir, registry, test, OPTIONS)


def test_one_that_cannot_be_had_at_all_is_left_to_the_client(
    workdir: Path, registry: Registry, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("layer is left to the client")
    image = publish(registry, LAYERS, indexed=LAZY)
    registry.fault(Status(path=f"/blobs/{image.layers[1].digest}", status=404, count=-1))

    async def test(rig: Providing) -> None:
        assert [type(each) for each in await pull(rig, image, 0, 1)] == [Lazy, Deferred]
        assert os.listdir(rig.directory(2)) == []
        await nothing_left(rig)

    providing(workdir, registry, test, OPTIONS)


def test_two_clients_that_pull_one_image(workdir: Path, registry: Registry) -> None:
    image = publish(registry, LAYERS[:2], indexed=[0])

    async def test(rig: Providing) -> None:
        assert [type(each) for each in await pull(rig, image)] == [Lazy, Local]
        again = (
            await rig.prepare(image, 0, snapshot_id=7),
            await rig.prepare(image, 1, snapshot_id=8, parents=(7,)),
        )
        assert [type(each) for each in again] == [Lazy, Local]
        assert (rig.directory(8) / "a/one").read_bytes() == b"1"
        await nothing_left(rig)

    providing(workdir, registry, test, OPTIONS)


def test_a_client_that_does_not_come_back(
    workdir: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallelpull, "_ABANDONED_S", 0.5)
    image = publish(registry, LAYERS, indexed=LAZY)

    async def test(rig: Providing) -> None:
        await pull(rig, image, 0)
        await nothing_left(rig)
        assert [type(each) for each in await pull(rig, image, 1)] == [Local]

    providing(workdir, registry, test, OPTIONS)


@pytest.mark.parametrize("indexed", [(0,), None], ids=["lazy", "not lazy"])
def test_a_layer_that_an_image_has_twice(
    workdir: Path, registry: Registry, indexed: tuple[int, ...] | None
) -> None:
    twice = tar({"twice": b"2"})
    tars = [make_tar({"lazy/one": b"1" * 1000}), twice, tar({".wh.twice": b""}), twice]
    image = (
        publish(registry, tars, version=None) if indexed is None else publish(registry, tars, indexed=indexed)
    )

    async def test(rig: Providing) -> None:
        kinds = [type(each) for each in await pull(rig, image)]
        assert kinds == [Local if indexed is None else Lazy, Local, Local, Local]
        for snapshot_id in (2, 4):
            assert (rig.directory(snapshot_id) / "twice").read_bytes() == b"2"
        assert fetches(registry, image, 1) == ONCE
        await nothing_left(rig)

    providing(workdir, registry, test, OPTIONS)
