"""One daemon per root."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from snapshotter.errors import ConfigError
from snapshotter.snapshot.lock import RootLock

HOLD = """
import sys, time
from pathlib import Path
from snapshotter.snapshot.lock import RootLock
lock = RootLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_daemon_is_told_who_has_the_root(tmp_path: Path) -> None:
    root = tmp_path / "new" / "root"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(root)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match=rf"{root} is in use .*pid {holder.pid}\)"):
            RootLock(root)
        holder.send_signal(signal.SIGKILL)
    with RootLock(root):
        assert (root / "lock").read_text() == f"{os.getpid()}\n"


def test_it_is_free_after_close(tmp_path: Path) -> None:
    lock = RootLock(tmp_path)
    with pytest.raises(ConfigError):
        RootLock(tmp_path)
    lock.close()
    lock.close()
    RootLock(tmp_path).close()


def test_a_program_that_is_started_does_not_keep_it(tmp_path: Path) -> None:
    lock = RootLock(tmp_path)
    with subprocess.Popen(["sleep", "60"], close_fds=False) as child:
        lock.close()
        RootLock(tmp_path).close()
        child.kill()


def test_an_unreadable_pid_is_left_out(tmp_path: Path) -> None:
    with RootLock(tmp_path):
        (tmp_path / "lock").write_text("what is this")
        with pytest.raises(ConfigError, match="by another snapshotter: stop"):
            RootLock(tmp_path)


def test_a_root_that_cannot_be_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"{tmp_path}/file cannot be used"):
        RootLock(tmp_path / "file")


def test_a_planted_symlink_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError):
        RootLock(tmp_path)
    assert not (tmp_path / "elsewhere").exists()
