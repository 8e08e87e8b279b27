"""kill -9 at any moment: what was acknowledged is there, one call may or may not have happened, no half state."""

import os
import random
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from snapshotter.snapshot.directories import metadata_path
from snapshotter.snapshot.lock import RootLock
from snapshotter.snapshot.model import Kind
from snapshotter.snapshot.snapshotter import Snapshotter
from snapshotter.snapshot.store import SnapshotStore
from tests.support.layer_providers import NoLayers
from tests.support.snapshot_churn import replay

pytestmark = pytest.mark.usefixtures("root")

KILLS = 8
LINES = (0, 120)
"""Between how many events a kill comes."""


def churn_until_killed(root: Path, seed: int, lines: int) -> list[str]:
    """Return every line that the program wrote until it was killed, after `lines` of them."""
    command = [sys.executable, "-m", "tests.support.snapshot_churn", str(root), str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        written = [program.stdout.readline() for _ in range(lines)]
        program.kill()
        written += program.stdout.readlines()
    assert all(line.endswith("\n") for line in written)
    return written


def check_database(root: Path) -> None:
    connection = sqlite3.connect(metadata_path(root))
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    connection.close()


def check_directories(root: Path, store: SnapshotStore) -> None:
    place = root / "snapshotter/snapshots"
    for snapshot in store.all():
        expected = {"fs", "work"} if (place / f"{snapshot.id}/work").exists() else {"fs"}
        assert set(os.listdir(place / str(snapshot.id))) == expected
        assert expected == {"fs", "work"} or snapshot.info.kind != Kind.ACTIVE


def check_usable(sn: Snapshotter) -> None:
    sn.prepare("probe")
    sn.commit("probed", "probe")
    sn.view("probe", "probed")
    sn.remove("probe")
    sn.remove("probed")


def test_killed_again_and_again(workdir: Path) -> None:
    chance = random.Random(1)
    state: dict[str, Kind] = {}
    for seed in range(KILLS):
        lines = churn_until_killed(workdir, seed, chance.randint(*LINES))
        certain, possible = replay(state, lines)
        check_database(workdir)
        with RootLock(workdir):
            store = SnapshotStore(metadata_path(workdir))
            sn = Snapshotter(workdir, store, NoLayers())
            state = {info.name: info.kind for info in sn.walk()}
            assert state in (certain, possible)
            check_directories(workdir, store)
            check_usable(sn)
            sn.cleanup()
            left = {int(name) for name in os.listdir(workdir / "snapshotter/snapshots")}
            assert left == store.ids()
            sn.close()
