"""The daemon's handle on the zygote: children come, or an error does, whatever happens to the zygote."""

from __future__ import annotations

import itertools
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio
import trio.testing

from snapshotter import messages
from snapshotter.errors import ProcessFailed
from snapshotter.fuse import forker as forker_module
from snapshotter.fuse.compiling import inherited_memfd
from snapshotter.fuse.forker import Child, Forker
from snapshotter.fuse.spawning import Zygote, spawn
from tests.conftest import ExpectedLogs
from tests.support.background import background
from tests.support.process import is_alive, open_descriptors, wait_until

UID = 0x6E00_0009
LIMITS = {"memory_max_bytes": 1 << 30, "cpu_max_s": 10}
_LARGE = 16_000
"""Bytes of padding: a socket holds a dozen such messages."""
pytestmark = pytest.mark.usefixtures("root")


@asynccontextmanager
async def forking(root: Path, **options: object) -> AsyncIterator[Forker]:
    """Run a forker with an empty root below `root`."""
    forker = Forker(str(root / "empty"), log_level="error", **options)  # type: ignore[arg-type]
    async with background() as nursery:
        nursery.start_soon(forker.run)
        yield forker


def with_forker(root: Path, test: Callable[[Forker], Awaitable[None]], **options: object) -> None:
    async def main() -> None:
        async with forking(root, **options) as forker:
            with trio.fail_after(60):
                await test(forker)

    trio.run(main)


async def fork_compiling(forker: Forker, answer: socket.socket) -> Child:
    """Fork the compilation of an empty zTOC, which is an error that it says on `answer`."""
    empty = inherited_memfd({})
    fds = {"ztoc": empty, "tree": empty, "inherited": empty, "answer": answer.fileno()}
    arguments = {"digest": "sha256:" + "0" * 64, "base": False, **LIMITS}
    try:
        return await forker.fork("compile", uid=UID, arguments=arguments, fds=fds)
    finally:
        os.close(empty)


async def compile_nothing(forker: Forker) -> messages.Message:
    """Fork the compilation of an empty zTOC and return its answer; its end is waited for."""
    near, far = messages.pair()
    with near:
        with far:
            child = await fork_compiling(forker, far)
        await trio.lowlevel.wait_readable(child.pidfd)
        os.close(child.pidfd)
        received = messages.receive(near)
    assert received is not None
    return received[0]


async def fork_failing(forker: Forker, padding: int = 0) -> Child:
    """Fork a child that fails at once (it is given nothing), by a message of some size."""
    return await forker.fork("compile", uid=UID, arguments={"padding": "x" * padding}, fds={})


async def running(forker: Forker) -> int:
    """Return the pid of a zygote that answers."""
    while True:
        with suppress(ProcessFailed):  # another was just dying
            os.close((await fork_failing(forker)).pidfd)
            assert forker.pid is not None
            return forker.pid


def test_children_do_their_jobs(workdir: Path) -> None:
    async def test(forker: Forker) -> None:
        await running(forker)
        before = open_descriptors()
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(expect_refusal, forker)
        assert open_descriptors() == before

    async def expect_refusal(forker: Forker) -> None:
        assert "error" in await compile_nothing(forker)

    with_forker(workdir, test)


def test_hundreds_of_requests_at_once_are_all_answered(workdir: Path) -> None:
    """More than the socket holds: a host that starts wakes all its layers."""

    async def test(forker: Forker) -> None:
        async def one() -> None:
            child = await fork_failing(forker, _LARGE)
            os.close(child.pidfd)
            answered.append(child.pid)

        answered: list[int] = []
        await running(forker)
        assert forker.pid is not None
        os.kill(forker.pid, signal.SIGSTOP)
        async with trio.open_nursery() as nursery:
            for _ in range(40):
                nursery.start_soon(one)
            await trio.testing.wait_all_tasks_blocked()
            os.kill(forker.pid, signal.SIGCONT)
        assert len(set(answered)) == 40

    with_forker(workdir, test)


def test_who_is_cancelled_leaves_no_child_behind(workdir: Path) -> None:
    async def test(forker: Forker) -> None:
        pid = await running(forker)
        before = open_descriptors()
        os.kill(pid, signal.SIGSTOP)
        with trio.move_on_after(0.05) as scope:
            await fork_failing(forker)
        os.kill(pid, signal.SIGCONT)
        assert scope.cancelled_caught
        await running(forker)  # answered in order: the other's answer has come
        assert open_descriptors() == before

    with_forker(workdir, test)


def test_a_zygote_that_dies_fails_who_waits_and_is_replaced(
    workdir: Path, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("zygote ended")

    async def test(forker: Forker) -> None:
        pid = await running(forker)
        os.kill(pid, signal.SIGSTOP)
        failures = []

        async def one() -> None:
            with pytest.raises(ProcessFailed, match="zygote"):
                await fork_failing(forker, _LARGE)
            failures.append(1)

        async with trio.open_nursery() as nursery:
            for _ in range(40):  # more than the socket holds: some wait to be sent
                nursery.start_soon(one)
            await trio.testing.wait_all_tasks_blocked()
            os.kill(pid, signal.SIGKILL)
        assert len(failures) == 40
        assert await running(forker) != pid

    with_forker(workdir, test)


def test_one_that_was_started_before_is_the_first(workdir: Path, expected_logs: ExpectedLogs) -> None:
    expected_logs.allow("zygote ended")
    first = spawn(str(workdir / "empty"), [], "error")

    async def test(forker: Forker) -> None:
        assert await running(forker) == first.process.pid
        first.process.kill()
        first.process.wait()
        while await running(forker) == first.process.pid:
            await trio.sleep(0.01)

    with_forker(workdir, test, first=first)
    first.end()  # once more, as who started it does


def test_children_outlive_their_zygote(workdir: Path, expected_logs: ExpectedLogs) -> None:
    expected_logs.allow("zygote ended")

    async def test(forker: Forker) -> None:
        pid = await running(forker)
        near, far = messages.pair()
        with near:
            with far:
                fill(far)  # so that the child cannot say yet that it was given nothing to compile
                child = await fork_compiling(forker, far)
            os.kill(pid, signal.SIGKILL)
            await running(forker)
            assert is_alive(child.pid)
            answers = b"".join(iter(lambda: near.recv(1 << 16), b""))
            assert b"DigestMismatch" in answers
            await trio.lowlevel.wait_readable(child.pidfd)
            os.close(child.pidfd)

    with_forker(workdir, test)


def fill(sock: socket.socket) -> None:
    """Send until there is no room."""
    sock.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            sock.send(b"x")
    sock.setblocking(True)


def test_a_zygote_that_cannot_live_is_an_error_not_a_hang(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("zygote ended")
    monkeypatch.setattr("snapshotter.fuse.spawning.sys.executable", "/bin/false")

    async def test(forker: Forker) -> None:
        for _ in range(2):
            with pytest.raises(ProcessFailed, match="zygote"):
                await fork_failing(forker)

    with_forker(workdir, test)


@pytest.mark.parametrize("obstacle", ["program", "root"])
def test_a_zygote_that_cannot_be_started_is_an_error_not_a_hang(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, expected_logs: ExpectedLogs, obstacle: str
) -> None:
    expected_logs.allow("zygote ended")
    monkeypatch.setattr(forker_module, "_PATIENCE_S", 0.5)
    if obstacle == "program":
        monkeypatch.setattr("snapshotter.fuse.spawning.sys.executable", "/nonexistent/python")
    else:
        (workdir / "empty").write_text("a file")

    async def test(forker: Forker) -> None:
        with pytest.raises(ProcessFailed, match="no zygote within"):
            await fork_failing(forker)
        assert forker.pid is None

    with_forker(workdir, test)


def test_it_is_not_started_again_and_again_without_pause(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("zygote ended")
    monkeypatch.setattr("snapshotter.fuse.spawning.sys.executable", "/nonexistent/python")
    clock = trio.testing.MockClock(autojump_threshold=0.02)
    times: list[float] = []
    original = Forker._start

    def start(self: Forker) -> Zygote:
        times.append(trio.current_time())
        return original(self)

    monkeypatch.setattr(Forker, "_start", start)

    async def main() -> None:
        async with forking(workdir):
            await trio.sleep(60)

    trio.run(main, clock=clock)
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert pauses[0] == pytest.approx(0.2)
    assert pauses == sorted(pauses)
    assert pauses[-1] == pytest.approx(10)


def test_the_zygote_has_no_secret_of_the_daemon(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-of-the-daemon")

    async def test(forker: Forker) -> None:
        pid = await running(forker)
        assert b"a-secret-of-the-daemon" not in Path(f"/proc/{pid}/environ").read_bytes()

    with_forker(workdir, test)


def test_it_keeps_the_lock_of_its_generation_and_nothing_else(workdir: Path) -> None:
    lock = os.open(workdir / "generation", os.O_RDWR | os.O_CREAT)
    other = os.open(workdir / "other", os.O_RDWR | os.O_CREAT)

    async def test(forker: Forker) -> None:
        pid = await running(forker)
        names = []
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with suppress(FileNotFoundError):  # it still closes those of its last child
                names.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
        assert names.count(str(workdir / "generation")) == 1
        assert str(workdir / "other") not in names

    try:
        with_forker(workdir, test, inherited_fds=[lock])
    finally:
        os.close(lock)
        os.close(other)


def test_the_zygote_ends_with_its_forker(workdir: Path) -> None:
    pids: list[int] = []

    async def test(forker: Forker) -> None:
        pids.append(await running(forker))

    with_forker(workdir, test)
    wait_until(lambda: not is_alive(pids[0]), timeout=60, what="the zygote has ended")
