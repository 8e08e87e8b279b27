"""Messages to a real datagram socket standing in for systemd's, and descriptors from a real environment."""

import array
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapshotter import sdnotify
from snapshotter.sdnotify import Notifier, listen_fds, watchdog_interval
from tests.conftest import ExpectedLogs


class Manager:
    """The end of the notification socket that systemd has."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address.replace("@", "\0", 1))
        self.socket.settimeout(60)

    def receive(self) -> tuple[list[str], list[int]]:
        """Return the lines of one message, and the descriptors with it, which the caller must close."""
        room = socket.CMSG_SPACE(253 * 4)
        data, ancillary, flags, _ = self.socket.recvmsg(65536, room)
        assert not flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC)
        fds = array.array("i")
        for level, kind, payload in ancillary:
            assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
            fds.frombytes(payload)
        return data.decode().split("\n"), list(fds)


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    name = (
        tmp_path / "notify" if request.param == "path" else f"@snapshotter-test-{os.getpid()}-{tmp_path.name}"
    )
    manager = Manager(str(name))
    yield manager
    manager.socket.close()


@pytest.fixture
def notifier(manager: Manager) -> Notifier:
    return Notifier.from_environ({"NOTIFY_SOCKET": manager.address})


@pytest.mark.parametrize(
    ("say", "heard"),
    [
        (lambda n: n.ready(), ["READY=1"]),
        (lambda n: n.ready("serving 3 mounts"), ["READY=1", "STATUS=serving 3 mounts"]),
        (lambda n: n.ready(main_pid=42), ["READY=1", "MAINPID=42"]),
        (lambda n: n.stopping(), ["STOPPING=1"]),
        (lambda n: n.stopping("waiting for readers"), ["STOPPING=1", "STATUS=waiting for readers"]),
        (lambda n: n.status("two\nlines\u00e4"), ["STATUS=two lines\u00e4"]),
        (lambda n: n.watchdog(), ["WATCHDOG=1"]),
        (lambda n: n.extend_timeout(1.5), ["EXTEND_TIMEOUT_USEC=1500000"]),
        (lambda n: n.forget("7"), ["FDSTOREREMOVE=1", "FDNAME=7"]),
    ],
)
def test_messages(
    manager: Manager, notifier: Notifier, say: Callable[[Notifier], bool], heard: list[str]
) -> None:
    assert notifier.is_active
    assert say(notifier)
    assert manager.receive() == (heard, [])


def test_a_reload_says_when_it_began(manager: Manager, notifier: Notifier) -> None:
    before = time.monotonic_ns() // 1000
    assert notifier.reloading()
    (reloading, when), _ = manager.receive()
    assert reloading == "RELOADING=1"
    assert before <= int(when.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000


class TestStore:
    """Descriptors for safe keeping."""

    def test_the_manager_gets_copies_that_work(self, manager: Manager, notifier: Notifier) -> None:
        reader, writer = os.pipe()
        assert notifier.store("layer-7", [writer])
        os.close(writer)
        lines, (copy,) = manager.receive()
        assert lines == ["FDSTORE=1", "FDNAME=layer-7"]
        os.write(copy, b"alive")
        os.close(copy)
        assert os.read(reader, 100) == b"alive"
        os.close(reader)

    def test_more_than_one_message_carries(self, manager: Manager, notifier: Notifier) -> None:
        with open("/dev/null", "rb") as null:
            assert notifier.store("many", [null.fileno()] * 254)
        counts = []
        for _ in range(2):
            lines, fds = manager.receive()
            assert lines == ["FDSTORE=1", "FDNAME=many"]
            counts.append(len(fds))
            for fd in fds:
                os.close(fd)
        assert counts == [253, 1]

    @pytest.mark.parametrize("name", ["", "a:b", "a\nb", "\u00e4", "x" * 256, "\x7f"])
    def test_names_that_systemd_would_not_take(self, notifier: Notifier, name: str) -> None:
        with pytest.raises(ValueError, match="not a name for stored descriptors"):
            notifier.store(name, [0])
        with pytest.raises(ValueError, match="not a name for stored descriptors"):
            notifier.forget(name)

    def test_a_closed_descriptor_is_not_stored(self, notifier: Notifier, expected_logs: ExpectedLogs) -> None:
        expected_logs.allow("service manager not reached")
        reader, writer = os.pipe()
        os.close(reader)
        os.close(writer)
        assert not notifier.store("gone", [writer])


class TestWithoutAManager:
    """Everywhere else than under systemd."""

    @pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}])
    def test_nothing_happens(self, environ: dict[str, str]) -> None:
        notifier = Notifier.from_environ(environ)
        assert not notifier.is_active
        assert not notifier.ready()
        assert not notifier.store("7", [0])

    def test_one_that_does_not_listen_is_logged(self, tmp_path: Path, expected_logs: ExpectedLogs) -> None:
        expected_logs.allow("service manager not reached")
        assert not Notifier(f"{tmp_path}/absent").ready()
        (record,) = expected_logs.records
        assert (record.levelno, vars(record)["about"]) == (logging.WARNING, "READY=1")

    def test_one_that_does_not_read_blocks_for_a_bounded_time(
        self,
        manager: Manager,
        notifier: Notifier,
        monkeypatch: pytest.MonkeyPatch,
        expected_logs: ExpectedLogs,
    ) -> None:
        expected_logs.allow("service manager not reached")
        monkeypatch.setattr(sdnotify, "_TIMEOUT", 0.05)
        assert any(not notifier.watchdog() for _ in range(10_000))


class TestWatchdog:
    """How often to say that all is well."""

    @pytest.mark.parametrize(
        ("environ", "seconds"),
        [
            ({}, None),
            ({"WATCHDOG_USEC": "30000000"}, 15.0),
            ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
            ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
            ({"WATCHDOG_USEC": "0"}, None),
            ({"WATCHDOG_USEC": "soon"}, None),
        ],
    )
    def test_interval(self, environ: dict[str, str], seconds: float | None) -> None:
        assert watchdog_interval(environ) == seconds


# Started as systemd would: descriptors from 3 on, and its own pid in the environment.
CHILD = """
import os, sys
os.environ["LISTEN_PID"] = str(os.getpid()) if sys.argv[1] == "own" else "1"
from snapshotter.sdnotify import listen_fds
for fd, name in listen_fds():
    print(fd, name, os.get_inheritable(fd), os.fstat(fd).st_ino)
"""


class TestListenFds:
    """Sockets and stored descriptors that systemd hands to a starting process."""

    @staticmethod
    def run(files: list[int], whose: str, **environ: str) -> list[str]:
        """Return what a process prints that finds `files` at descriptors 3 and up."""

        def arrange() -> None:
            high = [os.dup2(fd, 100 + i) for i, fd in enumerate(files)]
            for i, fd in enumerate(high):
                os.dup2(fd, 3 + i)

        child = subprocess.run(
            [sys.executable, "-c", CHILD, whose],
            env={**environ, "PYTHONPATH": str(Path(sdnotify.__file__).parents[1])},
            preexec_fn=arrange,
            pass_fds=range(3, 3 + len(files)),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return child.stdout.splitlines()

    def test_with_names(self, tmp_path: Path) -> None:
        with open(tmp_path / "a", "w") as first, open(tmp_path / "b", "w") as second:
            files = [first.fileno(), second.fileno()]
            inodes = [os.fstat(fd).st_ino for fd in files]
            found = self.run(files, "own", LISTEN_FDS="2", LISTEN_FDNAMES="grpc.socket:layer-7")
        assert found == [f"3 grpc.socket False {inodes[0]}", f"4 layer-7 False {inodes[1]}"]

    def test_without_names(self, tmp_path: Path) -> None:
        with open(tmp_path / "a", "w") as file:
            found = self.run([file.fileno()], "own", LISTEN_FDS="1")
        assert found[0].startswith("3 unknown False ")

    def test_meant_for_another_process(self, tmp_path: Path) -> None:
        with open(tmp_path / "a", "w") as file:
            assert self.run([file.fileno()], "another", LISTEN_FDS="1") == []

    def test_fewer_open_than_promised(self, tmp_path: Path) -> None:
        with open(tmp_path / "a", "w") as file:
            assert len(self.run([file.fileno()], "own", LISTEN_FDS="3")) == 1

    @pytest.mark.parametrize("count", ["", "0", "-1", "x", "\u0663"])
    def test_a_count_that_is_none(self, count: str) -> None:
        assert listen_fds({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": count}) == []

    def test_nothing_handed_over(self) -> None:
        assert listen_fds({}) == []
