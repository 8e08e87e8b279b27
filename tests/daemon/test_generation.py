"""One generation at a time: a new daemon waits for the last process of the former one, and no longer."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from snapshotter.daemon import generation
from snapshotter.errors import ProcessFailed
from tests.conftest import ExpectedLogs

WAITS = "import sys; print('ready', flush=True); sys.stdin.read()"


class Former:
    """A process of the former generation, by its inherited descriptor."""

    def __init__(self, path: Path, code: str = WAITS) -> None:
        lock = generation.begin(path)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], pass_fds=[lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        os.close(lock)  # the former daemon has ended; this process goes on
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"

    def end(self) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        with suppress(BrokenPipeError):
            self.end()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "generation"


@pytest.fixture
def former(path: Path) -> Iterator[Former]:
    former = Former(path)
    yield former
    former.close()


def test_the_first_generation_begins_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.delattr(time, "sleep")  # nothing to wait for
        lock = generation.begin(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert not os.get_inheritable(lock)
    os.close(lock)


def test_the_lock_ends_with_the_last_who_inherited_it(path: Path, former: Former) -> None:
    with open(path, "rb") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    former.close()
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_next_goes_on_as_soon_as_the_former_has_ended(
    path: Path, former: Former, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "_PATIENCE_S", 30.0)
    started = time.monotonic()
    ender = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill {former.process.pid}"])
    lock = generation.begin(path)
    waited = time.monotonic() - started
    assert 0.25 < waited < 25
    assert former.process.wait(60) == -signal.SIGTERM  # the lock was free a moment before its end
    os.close(lock)
    ender.wait()


def test_one_that_does_not_end_is_killed(
    path: Path, monkeypatch: pytest.MonkeyPatch, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("former daemon is killed")
    monkeypatch.setattr(generation, "_PATIENCE_S", 0.2)
    stubborn = Former(path, "import signal; signal.signal(15, signal.SIG_IGN); " + WAITS)
    stubborn.process.send_signal(signal.SIGSTOP)
    lock = generation.begin(path)
    assert stubborn.process.wait(60) == -signal.SIGKILL
    os.close(lock)
    stubborn.close()


def test_nobody_else_is_killed(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected_logs: ExpectedLogs
) -> None:
    """Not a process with another file of that name open, nor one with this directory, nor a reader of /proc."""
    expected_logs.allow("former daemon is killed")
    monkeypatch.setattr(generation, "_PATIENCE_S", 0.2)
    (tmp_path / "other").mkdir()
    bystander = Former(tmp_path / "other/generation")
    stubborn = Former(path)
    lock = generation.begin(path)
    assert bystander.process.poll() is None
    os.close(lock)
    stubborn.close()
    bystander.close()


def test_a_file_of_that_inode_on_another_file_system_is_another_file(path: Path) -> None:
    """Inode numbers are small and the name is ours: two fresh file systems have the same for it."""
    lock = generation.begin(path)
    inode = os.fstat(lock).st_ino
    assert generation._has_open(str(os.getpid()), str(path), inode)
    assert not generation._has_open(str(os.getpid()), f"/elsewhere{path}", inode)
    assert not generation._has_open(str(os.getpid()), str(path), inode + 1)
    os.close(lock)


def test_one_that_cannot_be_killed_is_an_error_that_names_the_file(
    path: Path, former: Former, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "_PATIENCE_S", 1000.0)  # it is not even tried
    monkeypatch.setattr(generation, "_LAST_WAIT_S", 0.3)
    with pytest.raises(ProcessFailed, match=str(path)):
        generation.begin(path)
    inode = path.stat().st_ino
    assert not generation._has_open(str(os.getpid()), str(path), inode), "the descriptor is closed"
    assert former.process.poll() is None


def test_the_daemon_itself_is_not_killed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the file open, too."""
    monkeypatch.setattr(generation, "_PATIENCE_S", 0.1)
    monkeypatch.setattr(generation, "_LAST_WAIT_S", 0.3)
    lock = generation.begin(path)
    with pytest.raises(ProcessFailed):
        generation.begin(path)
    os.close(lock)
