"""Files of a layer that are deleted or damaged under the running daemon: readers wait until they are there again."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
import trio

from snapshotter.fuse.mountpoint import State
from tests.conftest import ExpectedLogs
from tests.support import host
from tests.support.indexed import IndexedImage, publish
from tests.support.lazylayer import make_tar
from tests.support.providing import Providing, providing
from tests.support.registry import Registry, Status

CONTENT = random.Random(5).randbytes(300_000)
FILES = {"first": CONTENT, "second": CONTENT[::-1], "third": b"3" * 50_000}
SAID = "a tree is missing or damaged"
pytestmark = pytest.mark.usefixtures("fuse")


@pytest.fixture
def image(registry: Registry) -> IndexedImage:
    return publish(registry, [make_tar(FILES)])


def file_of(rig: Providing, image: IndexedImage, name: str) -> Path:
    path: Path = getattr(rig.layers.paths(image.layers[0].digest), name)
    return path


async def prepared(rig: Providing, image: IndexedImage) -> None:
    """Have the layer mounted, and all that is done ahead done, which would make a tree again, too."""
    await rig.prepare(image, 0)
    with trio.fail_after(30):
        while rig.provider._ahead.borrowed_tokens:
            await trio.sleep(0.01)


async def end_server(rig: Providing) -> None:
    """Kill the mount's server, so that the next request needs another one."""
    mountpoint = rig.keeper.mounts[1]
    with trio.fail_after(30):
        while mountpoint.state is not State.AWAKE:
            await trio.sleep(0.01)
        pid = mountpoint.pid
        os.kill(pid, signal.SIGKILL)
        while mountpoint.pid == pid:
            await trio.sleep(0.01)


@pytest.mark.parametrize(
    "names", [("tree",), ("data",), ("spans",), ("blob",), ("tree", "data", "spans", "blob")]
)
def test_files_that_are_deleted_are_made_again_without_a_restart(
    workdir: Path,
    registry: Registry,
    image: IndexedImage,
    names: tuple[str, ...],
    expected_logs: ExpectedLogs,
) -> None:
    if "tree" in names:
        expected_logs.allow(SAID)

    async def test(rig: Providing) -> None:
        await prepared(rig, image)
        assert await rig.read(1, "first") == CONTENT
        for name in names:
            file_of(rig, image, name).unlink()
        await end_server(rig)
        await read_all(rig)
        for name in names:
            assert file_of(rig, image, name).exists()
        await end_server(rig)
        await read_all(rig)

    providing(workdir, registry, test)


async def read_all(rig: Providing) -> None:
    await trio.to_thread.run_sync(host.drop_caches)
    for name, content in FILES.items():
        assert await rig.read(1, name) == content, name


def test_what_is_cached_needs_no_network_to_be_mended(
    workdir: Path, registry: Registry, image: IndexedImage, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow(SAID)

    async def test(rig: Providing) -> None:
        await prepared(rig, image)
        await read_all(rig)
        registry.fault(Status(status=500, count=-1))
        for name in ("tree", "data", "spans"):
            file_of(rig, image, name).unlink()
        await end_server(rig)
        await read_all(rig)

    providing(workdir, registry, test)


def test_a_tree_that_is_damaged_is_made_again_when_its_servers_end_young(
    workdir: Path, registry: Registry, image: IndexedImage, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow(SAID)

    async def test(rig: Providing) -> None:
        await prepared(rig, image)
        tree = file_of(rig, image, "tree")
        whole = tree.read_bytes()
        tree.unlink()
        tree.write_bytes(whole[:100])
        await end_server(rig)
        await read_all(rig)
        assert tree.read_bytes() == whole

    providing(workdir, registry, test)


def test_a_server_with_old_files_makes_way_for_one_with_the_new(
    workdir: Path, registry: Registry, image: IndexedImage
) -> None:
    """Nobody kills it: what it has it reads, and what it wants makes it look at its files."""

    async def test(rig: Providing) -> None:
        await prepared(rig, image)
        assert await rig.read(1, "third") == FILES["third"]
        pid = rig.keeper.mounts[1].pid
        for name in ("data", "spans"):
            file_of(rig, image, name).unlink()
        await rig.prepare(image, 0, snapshot_id=2)  # the same layer, mounted again
        assert await rig.read(2, "third") == FILES["third"]
        await read_all(rig)
        assert rig.keeper.mounts[1].pid != pid

    providing(workdir, registry, test)
