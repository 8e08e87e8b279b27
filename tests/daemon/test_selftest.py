"""The start-up test: what works is found to work, and what does not is named."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from snapshotter.daemon import selftest
from snapshotter.errors import ProcessFailed
from snapshotter.fuse import kernel, mounting
from snapshotter.fuse.mountpoint import make_mount
from tests.conftest import ExpectedLogs
from tests.support import host, oldkernel
from tests.support.keeping import Kept, keeping

pytestmark = pytest.mark.usefixtures("fuse")


def with_keeper(root: Path, test: Callable[[Kept], Awaitable[None]]) -> None:
    async def main() -> None:
        async with keeping(root) as kept:
            await test(kept)
            with trio.fail_after(60):
                while kept.keeper.mounts:
                    await trio.sleep(0.01)

    trio.run(main)
    assert host.mounts_below(root) == []


def test_nothing_is_in_the_way_here(workdir: Path) -> None:
    async def test(kept: Kept) -> None:
        for _ in range(2):
            assert await selftest.find_obstacle(kept.keeper, workdir / "selftest") == ""

    with_keeper(workdir, test)


def test_a_kernel_that_sends_requests_once_is_lazy_too(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "parse_init", oldkernel.parse_init)

    async def test(kept: Kept) -> None:
        assert await selftest.find_obstacle(kept.keeper, workdir / "selftest") == ""

    with_keeper(workdir, test)


def test_a_kernel_that_is_too_old_is_named(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "OLDEST_MINOR", 1000)

    async def test(kept: Kept) -> None:
        obstacle = await selftest.find_obstacle(kept.keeper, workdir / "selftest")
        assert obstacle.startswith("cannot mount: ")
        assert "7.1000 or newer is needed" in obstacle

    with_keeper(workdir, test)


def test_a_device_that_is_missing_is_named(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_device() -> int:
        return os.open("/dev/fuse-is-not-here", os.O_RDWR)

    monkeypatch.setattr(mounting, "open_device", open_device)

    async def test(kept: Kept) -> None:
        obstacle = await selftest.find_obstacle(kept.keeper, workdir / "selftest")
        assert "/dev/fuse-is-not-here" in obstacle

    with_keeper(workdir, test)


def test_a_holder_that_does_not_answer_is_named(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(kept: Kept) -> None:
        def put(name: str, fd: int) -> None:
            raise ProcessFailed("the holder does not answer")

        monkeypatch.setattr(kept.holder, "put", put)
        obstacle = await selftest.find_obstacle(kept.keeper, workdir / "selftest")
        assert "holder does not answer" in obstacle

    with_keeper(workdir, test)


def test_a_zygote_that_cannot_start_is_named_in_time(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("zygote ended")
    expected_logs.allow("no layer server could be started")
    monkeypatch.setattr(selftest, "_TIMEOUT_S", 1.0)

    async def test(kept: Kept) -> None:
        monkeypatch.setattr("snapshotter.fuse.spawning.sys.executable", "/bin/false")
        assert kept.forker.pid is not None
        os.kill(kept.forker.pid, signal.SIGKILL)
        started = trio.current_time()
        # Once, unless the time was over before anybody had begun to read.
        while not any("no layer server" in record.getMessage() for record in expected_logs.records):
            assert trio.current_time() - started < 60
            obstacle = await selftest.find_obstacle(kept.keeper, workdir / "selftest")
            assert "no layer server adopts its mount" in obstacle
            with trio.fail_after(60):
                while kept.keeper.mounts:
                    await trio.sleep(0.01)

    with_keeper(workdir, test)


def test_wrong_bytes_are_noticed(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(kept: Kept) -> None:
        original = selftest._make_layer

        def make_layer(directory: Path) -> object:
            spec = original(directory)
            data = bytearray(Path(spec.data).read_bytes())
            data[data.index(b"lazy loading")] ^= 1
            Path(spec.data).write_bytes(data)
            return spec

        monkeypatch.setattr(selftest, "_make_layer", make_layer)
        assert "read wrong" in await selftest.find_obstacle(kept.keeper, workdir / "selftest")

    with_keeper(workdir, test)


def test_a_reader_that_is_missing_is_named(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")

    async def test(kept: Kept) -> None:
        assert "cannot read a lazy file" in await selftest.find_obstacle(kept.keeper, workdir / "selftest")

    with_keeper(workdir, test)


@pytest.mark.parametrize("times", [1, 2])
def test_what_an_interrupted_test_left_mounted_is_cleared(workdir: Path, times: int) -> None:
    """A daemon that is killed during its start must not leave the host without lazy layers for good."""
    target = workdir / "selftest/mount"
    target.mkdir(parents=True)
    for _ in range(times):
        device, _unique = make_mount(str(target))
        device.close()  # nobody serves it any more

    async def test(kept: Kept) -> None:
        assert await selftest.find_obstacle(kept.keeper, workdir / "selftest") == ""

    with_keeper(workdir, test)


def test_a_place_that_cannot_be_written_is_named(workdir: Path) -> None:
    (workdir / "selftest").write_text("a file")

    async def test(kept: Kept) -> None:
        obstacle = await selftest.find_obstacle(kept.keeper, workdir / "selftest")
        assert obstacle.startswith("cannot mount: ")
        assert str(workdir / "selftest") in obstacle

    with_keeper(workdir, test)
