"""The holder: descriptors that outlive whoever put them there."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from snapshotter import messages
from snapshotter.errors import ProcessFailed
from snapshotter.fuse.holding import HolderClient
from tests.chaos.manager import HolderUnit
from tests.support.process import wait_until


@pytest.fixture
def client(tmp_path: Path) -> Iterator[HolderClient]:
    client = HolderClient(str(tmp_path / "h.sock"))
    client.connect()
    yield client
    pid = client.pid
    client.close()
    os.kill(pid, signal.SIGKILL)


def pipe_with(data: bytes) -> int:
    reading, writing = os.pipe()
    os.write(writing, data)
    os.close(writing)
    return reading


def file_with(data: bytes) -> int:
    """Return a descriptor that poll finds nothing wrong with; a pipe without a writer would be dropped as dead."""
    fd = os.memfd_create("held")
    os.write(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def kept(client: HolderClient) -> dict[str, bytes]:
    """Return the names and what the pipes behind them hold (which reading takes away)."""
    found = {}
    for name, fd in client.kept().items():
        found[name] = os.read(fd, 100)
        os.close(fd)
    return found


def test_a_descriptor_outlives_its_owner_and_the_connection(client: HolderClient, tmp_path: Path) -> None:
    fd = pipe_with(b"hello")
    client.put("7.init", fd)
    os.close(fd)
    client.close()
    again = HolderClient(str(tmp_path / "h.sock"))
    assert kept(again) == {"7.init": b"hello"}
    again.close()
    client.connect()


def test_a_name_can_be_replaced_and_dropped(client: HolderClient) -> None:
    for data in (b"first", b"second"):
        fd = pipe_with(data)
        client.put("name", fd)
        os.close(fd)
    assert kept(client) == {"name": b"second"}
    client.drop("name")
    client.drop("name")
    assert kept(client) == {}


def test_the_holder_is_nobodys_child_and_its_socket_is_private(client: HolderClient, tmp_path: Path) -> None:
    with open(f"/proc/{client.pid}/stat", encoding="ascii") as stat:
        fields = stat.read().rpartition(")")[2].split()
    assert int(fields[1]) != os.getpid()  # parent
    assert int(fields[3]) != os.getsid(0)  # session
    assert (tmp_path / "h.sock").stat().st_mode & 0o777 == 0o600


def test_many_descriptors_come_back(client: HolderClient) -> None:
    for number in range(300):
        fd = pipe_with(str(number).encode())
        client.put(f"n{number}", fd)
        os.close(fd)
    assert kept(client) == {f"n{n}": str(n).encode() for n in range(300)}


def test_a_dead_holder_is_replaced_at_the_next_call(client: HolderClient) -> None:
    fd = pipe_with(b"lost with the first")
    client.put("name", fd)
    old = client.pid
    os.kill(old, signal.SIGKILL)
    client.put("other", fd)
    assert client.pid != old
    assert kept(client) == {"other": b"lost with the first"}
    os.close(fd)


def test_nonsense_ends_only_its_own_connection(client: HolderClient, tmp_path: Path) -> None:
    for packet in (b"{}", b'{"op":"put","name":"x"}', b'{"op":"list"', b'{"op":"drop"}'):
        bad = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        bad.connect(str(tmp_path / "h.sock"))
        bad.send(packet)
        assert messages.receive(bad) is None
        bad.close()
    assert kept(client) == {}


def test_a_stopped_holder_is_an_error_not_a_hang(
    client: HolderClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.close()
    monkeypatch.setattr("snapshotter.fuse.holding._CALL_TIMEOUT_S", 0.2)
    client.connect()
    os.kill(client.pid, signal.SIGSTOP)
    with pytest.raises(ProcessFailed, match="does not answer"):
        client.kept()
    os.kill(client.pid, signal.SIGCONT)
    client.connect()


def test_under_systemd_descriptors_go_to_its_store_and_come_back(tmp_path: Path) -> None:
    """A stand-in for systemd's store: a datagram socket that receives FDSTORE, and LISTEN_FDS at the start."""
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(str(tmp_path / "notify"))
    manager.settimeout(60)
    path = str(tmp_path / "held.sock")
    process = subprocess.Popen(
        [sys.executable, "-m", "snapshotter.fuse.holder", path],
        env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")},
    )
    try:
        assert manager.recv(4096).startswith(b"READY=1")
        client = HolderClient(path)
        fd = pipe_with(b"stored")
        client.put("3.45-1-2", fd)
        os.close(fd)
        data, fds, _flags, _address = socket.recv_fds(manager, 4096, 4)
        assert data == b"FDSTORE=1\nFDNAME=3.45-1-2"
        assert os.read(fds[0], 10) == b"stored"
        client.drop("3.45-1-2")
        assert manager.recv(4096) == b"FDSTOREREMOVE=1\nFDNAME=3.45-1-2"
        client.close()
    finally:
        process.kill()
        process.wait()
        manager.close()
    returned = start_with_stored(path, pipe_with(b"again"), "9.45-1-2")
    try:
        client = HolderClient(path)
        assert kept(client) == {"9.45-1-2": b"again"}
        client.close()
    finally:
        returned.kill()
        returned.wait()
        os.close(fds[0])


def test_a_name_is_replaced_without_a_moment_in_which_nothing_is_stored(tmp_path: Path) -> None:
    """However much of what the holder says systemd gets before a crash, the next holder has one of the two."""
    notify, path = tmp_path / "notify", tmp_path / "held.sock"
    with HolderUnit(path, notify, tag="") as unit:
        client = HolderClient(str(path))
        opened = [file_with(data) for data in (b"first", b"second")]
        for fd in opened:
            client.put("name", fd)
        client.put("name", opened[1])  # a new daemon says it again: not stored twice
        client.put("other", opened[0])
        client.close()
        wait_until(lambda: "other" in unit.stored(), timeout=60, what="all was said")
        assert unit.stored() == {"name": 2, "other": 1}
        assert unit.forgotten == 0
        restarts = unit.restarts
        unit.kill()
        wait_until(lambda: unit.restarts > restarts, timeout=60, what="there is another holder")
        wait_until(lambda: answers(path), timeout=60, what="it answers")
        client = HolderClient(str(path))
        assert kept(client) == {"name": b"second", "other": b"first"}
        client.drop("name")
        wait_until(lambda: "name" not in unit.stored(), timeout=60, what="it is forgotten")
        client.close()
        for fd in opened:
            os.close(fd)


def answers(path: Path) -> bool:
    """Tell whether a holder listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        return probe.connect_ex(str(path)) == 0


def start_with_stored(path: str, fd: int, name: str) -> subprocess.Popen[bytes]:
    """Start a holder as systemd does, with one stored descriptor."""
    code = (
        "import os, sys\n"
        "os.dup2(int(sys.argv[1]), 3)\n"
        "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1', LISTEN_FDNAMES=sys.argv[2])\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'snapshotter.fuse.holder', sys.argv[3]])\n"
    )
    os.unlink(path)
    process = subprocess.Popen([sys.executable, "-c", code, str(fd), name, path], pass_fds=[fd])
    os.close(fd)
    wait_until(
        lambda: answers(Path(path)), timeout=60, what="it answers: its socket is bound before it listens"
    )
    return process


def test_a_second_holder_takes_over_from_the_first_and_ends_it(tmp_path: Path) -> None:
    """The unit's holder may start when a daemon, tired of waiting, has started one of its own."""
    path = str(tmp_path / "held.sock")
    client = HolderClient(path)
    client.connect()
    first = client.pid
    fd = pipe_with(b"kept")
    client.put("4.45-1-2", fd)
    os.close(fd)
    client.close()
    ended = os.pidfd_open(first)
    second = subprocess.Popen([sys.executable, "-m", "snapshotter.fuse.holder", path])
    try:
        assert select.select([ended], [], [], 60)[0], "the first holder is ended"
        wait_until(lambda: answers(Path(path)), timeout=60, what="the second holder listens")
        client.connect()
        assert client.pid == second.pid
        assert kept(client) == {"4.45-1-2": b"kept"}
        client.close()
    finally:
        second.kill()
        second.wait()
        os.close(ended)


def test_under_a_service_manager_the_holder_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setattr("snapshotter.fuse.holding._UNIT_PATIENCE_S", 60.0)
    path = str(tmp_path / "held.sock")
    client = HolderClient(path)
    with ThreadPoolExecutor(1) as pool:
        connecting = pool.submit(client.connect)
        unit = subprocess.Popen(
            [sys.executable, "-m", "snapshotter.fuse.holder", path],
            env={name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"},
        )
        try:
            connecting.result(60)
            assert client.pid == unit.pid
            client.close()
        finally:
            unit.kill()
            unit.wait()
