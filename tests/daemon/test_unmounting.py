"""`unmount --all`: whom it finds on lazy layers, and when it refuses. (With real mounts: tests/systemd.)"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from snapshotter.daemon.unmounting import overlays_on, unmount_all
from snapshotter.errors import ConfigError, UsageError
from snapshotter.snapshot.lock import RootLock
from tests.support import host


@pytest.fixture
def overlay(workdir: Path, root: None) -> Path:
    """An overlay on a "snapshot" of the root `workdir/root`, as containerd makes them; unmounted by `workdir`."""
    for name in ("root/snapshots/1/fs", "root/snapshots/2/fs", "root/snapshots/2/work", "rootfs"):
        (workdir / name).mkdir(parents=True)
    snapshots = workdir / "root/snapshots"
    options = f"lowerdir={snapshots}/1/fs,upperdir={snapshots}/2/fs,workdir={snapshots}/2/work"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", workdir / "rootfs"], check=True)
    return workdir / "rootfs"


def test_overlays_are_found_by_what_they_are_built_on(overlay: Path, workdir: Path) -> None:
    try:
        assert overlays_on(workdir / "root") == [str(overlay)]
        assert overlays_on(workdir / "roo") == []
        with pytest.raises(UsageError, match=rf"\(1, one of them at {overlay}\)"):
            unmount_all(workdir / "root", workdir / "root/holder.sock")
        assert unmount_all(workdir / "root", workdir / "root/holder.sock", force=True) == 0
    finally:
        host.detach(overlay)
    assert unmount_all(workdir / "root", workdir / "root/holder.sock") == 0


def test_a_root_that_is_not_there(tmp_path: Path) -> None:
    assert unmount_all(tmp_path / "none", tmp_path / "none/holder.sock") == 0
    assert not (tmp_path / "none").exists()


def test_a_daemon_that_runs_keeps_its_mounts(tmp_path: Path) -> None:
    with RootLock(tmp_path), pytest.raises(ConfigError, match="in use by another snapshotter"):
        unmount_all(tmp_path, tmp_path / "holder.sock", force=True)
