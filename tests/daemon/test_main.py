"""The program `soci-snapshotter-grpc`: its commands, and what it says when it cannot start."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from snapshotter.api import snapshots_pb2, snapshots_pb2_grpc
from snapshotter.daemon import main as program
from snapshotter.errors import ConfigError, NoIndex, ProcessFailed
from tests.support import host
from tests.support.process import Daemon, Service, is_alive, wait_until

pytestmark = pytest.mark.usefixtures("fuse")


@pytest.fixture(scope="module")
def daemon(module_workdir: Path) -> Iterator[Daemon]:
    daemon = Daemon(module_workdir / "d", {"log_level": "info"})
    daemon.start()
    yield daemon
    daemon.cleanup()


def refused(daemon: Daemon) -> str:
    """Start a daemon that must refuse to; return exit code and what it says: one line, and no traceback."""
    Service.start(daemon)
    wait_until(lambda: not daemon.alive, timeout=60, what="the daemon has refused")
    code = daemon.stop()
    lines = [line for line in daemon.log_text().splitlines() if not line.startswith("{")]
    daemon.cleanup()
    assert len(lines) == 1, daemon.log_text()
    assert lines[0].startswith("soci-snapshotter-grpc: ")
    return f"{code}: {lines[0].removeprefix('soci-snapshotter-grpc: ')}"


# --- a daemon that runs


def test_it_answers_containerd(daemon: Daemon) -> None:
    with grpc.insecure_channel(f"unix://{daemon.address}") as channel:
        stub = snapshots_pb2_grpc.SnapshotsStub(channel)
        stub.Prepare(snapshots_pb2.PrepareSnapshotRequest(snapshotter="soci", key="k"), timeout=60)
        (mount,) = stub.Mounts(snapshots_pb2.MountsRequest(snapshotter="soci", key="k"), timeout=60).mounts
        assert mount.type == "bind"
        stub.Remove(snapshots_pb2.RemoveSnapshotRequest(snapshotter="soci", key="k"), timeout=60)


def test_its_files_are_private(daemon: Daemon) -> None:
    assert daemon.root.stat().st_mode & 0o777 == 0o700
    assert daemon.address.stat().st_mode & 0o777 == 0o660


def test_status_in_words_and_as_json(daemon: Daemon) -> None:
    report = daemon.status()
    assert report["lazy"] is True
    assert report["pids"]["daemon"] == daemon.pid
    assert all(is_alive(pid) for pid in report["pids"].values())
    assert len({*report["pids"].values()}) == 4
    assert f"daemon {daemon.pid}" in daemon.command_line("status")


def test_metrics_are_served(daemon: Daemon) -> None:
    daemon.status()  # the start-up test is over
    found = daemon.metrics()
    assert found['soci_lazy_mounts{state="awake"}'] == 0
    assert found["soci_serve_adoptions_total"] >= 1  # the start-up test's


def test_the_start_up_test_leaves_nothing(daemon: Daemon) -> None:
    assert daemon.status()["mounts"] == []
    assert host.mounts_below(daemon.directory) == []


def test_a_second_daemon_on_the_root_is_refused_and_harms_nothing(daemon: Daemon) -> None:
    second = Daemon(daemon.directory / "second")
    second.command[second.command.index("--root") + 1] = str(daemon.root)
    said = refused(second)
    assert said.startswith(
        f"78: root directory {daemon.root} is in use by another snapshotter (pid {daemon.pid})"
    )
    assert daemon.status()["pids"]["daemon"] == daemon.pid


def test_a_second_daemon_on_the_address_is_refused_and_harms_nothing(daemon: Daemon) -> None:
    second = Daemon(daemon.directory / "third")
    second.command[second.command.index("--address") + 1] = str(daemon.address)
    said = refused(second)
    assert said.startswith(f"78: --address: another process listens on {daemon.address}")
    test_it_answers_containerd(daemon)


def test_a_holder_that_dies_is_replaced(daemon: Daemon) -> None:
    old = daemon.status()["pids"]["holder"]
    os.kill(old, signal.SIGKILL)
    wait_until(
        lambda: daemon.status()["pids"]["holder"] not in {old, 0}, timeout=60, what="another holder is known"
    )
    assert is_alive(daemon.status()["pids"]["holder"])
    assert daemon.alive


def test_a_restart_keeps_the_holder_and_replaces_the_rest(daemon: Daemon) -> None:
    before = daemon.status()["pids"]
    assert daemon.stop(timeout=60) == 0
    assert not any("Traceback" in str(record) for record in daemon.records())
    daemon.start()
    after = daemon.status()["pids"]
    assert after["holder"] == before["holder"]
    assert not {after[role] for role in ("daemon", "zygote", "fetcher")} & set(before.values())
    wait_until(
        lambda: not any(is_alive(before[role]) for role in ("daemon", "zygote", "fetcher")),
        timeout=60,
        what="the former ones have ended",
    )


def test_a_killed_daemon_takes_its_generation_along(daemon: Daemon) -> None:
    before = daemon.status()["pids"]
    daemon.kill()
    wait_until(
        lambda: not any(is_alive(before[role]) for role in ("zygote", "fetcher")),
        timeout=60,
        what="zygote and fetcher have ended",
    )
    assert is_alive(before["holder"])
    daemon.start()
    assert daemon.status()["lazy"] is True


# --- one that cannot start


Spoil = Callable[[Daemon], None]


def long_root(daemon: Daemon) -> None:
    daemon.command[daemon.command.index("--root") + 1] = str(daemon.directory / ("r" * 120))


def root_in_a_file(daemon: Daemon) -> None:
    daemon.root.write_text("a file")


def root_read_only(daemon: Daemon) -> None:
    daemon.command[daemon.command.index("--root") + 1] = "/proc/soci"


def address_is_a_file(daemon: Daemon) -> None:
    daemon.address.write_text("precious")


def damaged_database(daemon: Daemon) -> None:
    database = daemon.root / "snapshotter/metadata.sqlite"
    database.parent.mkdir(parents=True)
    database.write_bytes(b"no database" * 1000)


def systemd_socket(daemon: Daemon) -> None:
    daemon.command[daemon.command.index("--address") + 1] = "fd://"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (long_root, "78: --root: its path is too long"),
        (root_in_a_file, "78: root directory "),
        (root_read_only, "78: root directory /proc/soci cannot be used"),
        (address_is_a_file, "78: --address: there is something at "),
        (damaged_database, "78: snapshot database "),
        (systemd_socket, "78: --address fd://: systemd must hand over one unix stream socket, got 0"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(workdir: Path, spoil: Spoil, said: str) -> None:
    daemon = Daemon(workdir / "d")
    spoil(daemon)
    assert refused(daemon).startswith(said)
    if spoil is address_is_a_file:
        assert daemon.address.read_text() == "precious"


def test_a_metrics_address_that_is_taken_is_named(workdir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        daemon = Daemon(workdir / "d", {"metrics_address": address})
        assert refused(daemon) == f"78: metrics_address: cannot listen on {address}: Address already in use"


MISTAKES = [
    ("log_level = 'info'\n[fuse]\nidle_timeot_sec = 3\n", "3: [fuse] idle_timeot_sec: "),
    ("\n[fuse]\nidle_timeout_sec = 'soon'\n", "3: [fuse] idle_timeout_sec: must be a number"),
    ("[fuse\n", "1: "),
]


def test_a_mistake_in_the_configuration_is_exit_78(workdir: Path) -> None:
    """Key and line are named, and nothing was touched."""
    daemon = Daemon(workdir / "d", MISTAKES[0][0])
    assert refused(daemon).startswith(f"78: {daemon.config}:{MISTAKES[0][1]}")
    assert not daemon.root.exists()


# --- the program in this process, as far as it touches nothing


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Run the program and return its exit code and all that it prints."""
    capsys.readouterr()
    code = program.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_a_service_with_a_mistake_does_not_end_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(program, "_MISTAKE_PAUSE_S", 0.125)
    real = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: (pauses.append(seconds), real(seconds)))
    path = tmp_path / "config.toml"
    path.write_text(MISTAKES[0][0])
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        code, text = said(capsys, "--config", str(path), "--root", str(tmp_path / "root"))
        assert (code, pauses.count(0.125)) == (78, 1)
        assert manager.recv(4096).decode() == f"STATUS={text.strip().partition(': ')[2]}"
    monkeypatch.delenv("NOTIFY_SOCKET")
    assert said(capsys, "--config", str(path), "--root", str(tmp_path / "root"))[0] == 78
    assert pauses.count(0.125) == 1  # nobody starts it again


@pytest.mark.parametrize(("config", "about"), MISTAKES)
def test_every_mistake_is_exit_78(
    workdir: Path, capsys: pytest.CaptureFixture[str], config: str, about: str
) -> None:
    path = workdir / "c.toml"
    path.write_text(config)
    for command in ([], ["config", "check"]):
        code, text = said(capsys, "--config", str(path), "--root", str(workdir / "root"), *command)
        assert code == 78
        assert f"{path}:{about}" in text
    assert not (workdir / "root").exists()


def test_a_configuration_that_is_named_must_exist(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = said(capsys, "--config", str(workdir / "missing.toml"), "--root", str(workdir / "root"))
    assert code == 78
    assert "missing.toml" in text


def test_status_without_a_daemon(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = said(capsys, "--root", str(workdir), "status")
    assert code == 1
    assert "is it running, with this --root" in text


def test_config_default_is_a_configuration(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workdir / "c.toml").write_text(said(capsys, "config", "default")[1])
    assert said(capsys, "--config", str(workdir / "c.toml"), "config", "check")[0] == 0


def test_an_unknown_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as info:
        program.main(["frobnicate"])
    assert info.value.code == 2


def test_the_holder_is_a_command(workdir: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "snapshotter.daemon.main", "--root", str(workdir / "root"), "holder"]
    )
    try:
        wait_until((workdir / "root/holder.sock").exists, timeout=60, what="the holder listens")
        assert (workdir / "root").stat().st_mode & 0o777 == 0o700
    finally:
        process.kill()
        process.wait()


# --- errors out of nurseries


def group(*errors: Exception) -> ExceptionGroup[Exception]:
    return ExceptionGroup("outer", [ExceptionGroup("inner", list(errors))])


def test_one_known_error_is_taken_out_of_its_groups() -> None:
    error = ConfigError("x")
    assert program._known_cause(group(error)) is error
    failed = ProcessFailed("y")
    assert program._known_cause(ExceptionGroup("one", [failed])) is failed


@pytest.mark.parametrize("errors", [[ValueError("a bug")], [NoIndex("a"), NoIndex("b")]])
def test_a_surprise_stays_a_traceback(errors: list[Exception]) -> None:
    assert program._known_cause(group(*errors)) is None


def test_the_exit_code_of_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(error: Exception) -> Callable[[Any], None]:
        def daemon(_settings: Any) -> None:
            raise error

        return daemon

    for error, code in ((ConfigError("c"), 78), (ProcessFailed("p"), 1), (OSError(28, "full"), 1)):
        monkeypatch.setattr(program, "_daemon", fail(error))
        assert program.main([]) == code
        assert str(error) in capsys.readouterr().err


def test_a_start_up_test_that_failed_is_repeated(workdir: Path) -> None:
    daemon = Daemon(workdir / "d")
    (workdir / "d/root").mkdir()
    obstacle = workdir / "d/root/selftest"
    obstacle.write_text("in the way")
    daemon.start()
    try:
        report = daemon.status()
        assert not report["lazy"]
        assert "selftest" in report["not_lazy_because"]
        obstacle.unlink()
        wait_until(lambda: daemon.status()["lazy"], timeout=60, what="the host is lazy")
    finally:
        daemon.cleanup()
