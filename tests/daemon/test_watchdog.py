"""When systemd is told that all is well, and when it is not."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import trio
import trio.testing

from snapshotter.daemon import watchdog
from snapshotter.daemon.health import Health
from snapshotter.errors import ProcessFailed
from snapshotter.sdnotify import Notifier
from tests.conftest import ExpectedLogs


@dataclass
class Parts:
    """What else there is to a daemon."""

    pid: int | None = 7
    not_lazy: str = "no FUSE"


def find_trouble(address: Path, read: Callable[[], object] = lambda: None) -> str:
    async def main() -> str:
        with trio.fail_after(20):
            return await Health(address, read, Parts(), Parts()).find_trouble()

    return trio.run(main)


@contextmanager
def answering(path: Path, data: bytes) -> Iterator[None]:
    """Serve one connection that is sent `data` and closed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(1)

        def serve() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(100)
                peer.sendall(data)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join(20)


def test_a_real_grpc_server_is_well(tmp_path: Path) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_insecure_port(f"unix://{tmp_path}/grpc.sock")
    server.start()
    try:
        assert find_trouble(tmp_path / "grpc.sock") == ""
    finally:
        server.stop(grace=0).wait()


@pytest.mark.parametrize(
    ("data", "trouble"),
    [
        (b"", "gRPC closes new connections"),
        (b"\0\0\0", "gRPC closes new connections"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "gRPC does not speak HTTP/2"),
    ],
)
def test_what_does_not_greet_as_it_should(tmp_path: Path, data: bytes, trouble: str) -> None:
    with answering(tmp_path / "x.sock", data):
        assert find_trouble(tmp_path / "x.sock") == trouble


def test_nobody_listens(tmp_path: Path) -> None:
    assert find_trouble(tmp_path / "absent").startswith("gRPC does not answer")


def test_a_database_that_cannot_be_read(tmp_path: Path) -> None:
    def read() -> None:
        raise ProcessFailed("disk image is malformed")

    assert find_trouble(tmp_path, read) == "the database cannot be read: disk image is malformed"


def test_healthz_tells_the_same(tmp_path: Path) -> None:
    parts = Parts()
    broken = False

    def read() -> None:
        if broken:
            raise ProcessFailed("disk image is malformed")

    async def main() -> Health:
        nonlocal broken
        health = Health(tmp_path / "x.sock", read, parts, parts)
        with answering(tmp_path / "x.sock", b"\0\0\0\4\0\0\0\0\0"):
            well = await trio.to_thread.run_sync(health.report)
        assert well == {"ok": True, "trouble": "", "missing": [], "not_lazy_because": "no FUSE"}
        broken, parts.pid = True, None
        unwell = await trio.to_thread.run_sync(health.report)
        assert (unwell["ok"], unwell["missing"]) == (False, ["fetcher"])
        assert unwell["trouble"] == "the database cannot be read: disk image is malformed"
        return health

    health = trio.run(main)
    assert health.report()["trouble"] == "the daemon is ending"


class _Health(Health):
    """Answers from a list; None never answers."""

    def __init__(self, answers: list[str | None]) -> None:
        self.answers = answers

    async def find_trouble(self) -> str:
        answer = self.answers.pop(0)
        if answer is None:
            await trio.sleep_forever()
        assert answer is not None
        return answer


def test_only_a_daemon_that_is_well_reports(tmp_path: Path, expected_logs: ExpectedLogs) -> None:
    expected_logs.allow("not well; systemd will start another daemon")
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(str(tmp_path / "notify"))
    manager.setblocking(False)
    heard = []

    async def main() -> None:
        health = _Health(["", "broken", "broken", "", None, ""])
        with trio.move_on_after(62):  # at 0, 10, 20, 30, 40 (until 45), 55
            await watchdog.watch(health, Notifier(str(tmp_path / "notify")), 10)
        assert health.answers == []

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    with manager:
        while True:
            try:
                heard.append(manager.recv(100))
            except BlockingIOError:
                break
    assert heard == [b"WATCHDOG=1"] * 3
    reasons = [vars(record)["reason"] for record in expected_logs.records]
    assert reasons == ["broken", "no answer within 5 s"]


def test_nobody_wants_to_know() -> None:
    trio.run(watchdog.watch, _Health([]), Notifier(""), None)
