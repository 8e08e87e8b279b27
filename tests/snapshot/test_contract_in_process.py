"""containerd's contract, kept by the snapshotter in this process."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotter.snapshot.directories import metadata_path
from snapshotter.snapshot.snapshotter import Snapshotter
from snapshotter.snapshot.store import SnapshotStore
from tests.contract import CHECKS
from tests.support.layer_providers import NoLayers

pytestmark = pytest.mark.usefixtures("root")


@pytest.fixture
def snapshotter(workdir: Path) -> Iterator[Snapshotter]:
    root = workdir / "root"
    made = Snapshotter(root, SnapshotStore(metadata_path(root)), NoLayers())
    yield made
    made.close()


@pytest.mark.parametrize("name", CHECKS)
def test_contract(name: str, snapshotter: Snapshotter, workdir: Path) -> None:
    work = workdir / "work"
    work.mkdir()
    CHECKS[name](snapshotter, work)
