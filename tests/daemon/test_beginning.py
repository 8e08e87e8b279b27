"""The beginning of a daemon: the root is its own, its predecessor has ended, a zygote is on its way; all before the rest."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from snapshotter.daemon import beginning, generation
from snapshotter.errors import ConfigError
from tests.support.process import is_alive

pytestmark = pytest.mark.usefixtures("root")


def test_a_zygote_is_on_its_way_and_ends_with_the_rest(workdir: Path) -> None:
    root = workdir / "root"
    with ExitStack() as cleanup:
        begun = beginning.begin(root, "error", cleanup)
        assert begun.zygote is not None
        pid = begun.zygote.process.pid
        assert is_alive(pid)
        assert os.readlink(f"/proc/{pid}/fd/{begun.generation}") == str(root / "generation")
        assert root.stat().st_mode & 0o777 == 0o700
    assert not is_alive(pid)
    os.close(generation.begin(root / "generation"))


def test_a_root_in_use_is_refused_before_anything_is_started(workdir: Path) -> None:
    with ExitStack() as cleanup:
        beginning.begin(workdir, "error", cleanup)
        with ExitStack() as second, pytest.raises(ConfigError, match=f"in use by .*{os.getpid()}"):
            beginning.begin(workdir, "error", second)


def test_without_a_zygote_the_daemon_begins(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snapshotter.fuse.spawning.sys.executable", "/nonexistent/python")
    with ExitStack() as cleanup:
        assert beginning.begin(workdir, "error", cleanup).zygote is None


def test_it_comes_before_what_takes_long_to_import() -> None:
    code = "import sys, snapshotter.daemon.main; print(*({'trio', 'grpc', 'httpx', 'urllib3'} & sys.modules.keys()))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.split() == []
