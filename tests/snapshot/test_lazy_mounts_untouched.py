"""Nobody looks at a lazy mount: every method is called while the layers' file systems answer nothing at all."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapshotter.errors import AlreadyExists, FailedPrecondition
from snapshotter.snapshot.directories import metadata_path
from snapshotter.snapshot.model import LABEL_TARGET, Kind
from snapshotter.snapshot.snapshotter import Snapshotter
from snapshotter.snapshot.store import SnapshotStore
from tests.conftest import ExpectedLogs
from tests.support import host
from tests.support.layer_providers import LAZY_USAGE, StuckLayers

pytestmark = pytest.mark.usefixtures("fuse")


@pytest.fixture
def layers() -> Iterator[StuckLayers]:
    made = StuckLayers()
    yield made
    made.unstick()


@pytest.fixture
def place(workdir: Path) -> Iterator[Path]:
    yield workdir / "root"
    host.detach_below(workdir)


def in_time(layers: StuckLayers, call: Callable[[], object]) -> None:
    """Run `call`; if it does not end, free it by ending the file systems, and fail."""
    failures: list[Exception] = []

    def run() -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 raised again below
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(timeout=60)
    stuck = thread.is_alive()
    if stuck:
        layers.unstick()
    thread.join()
    assert not stuck, "a path at or below a lazy mount was resolved"
    if failures:
        raise failures[0]


def pull(sn: Snapshotter, target: str, parent: str) -> None:
    with pytest.raises(AlreadyExists):
        sn.prepare(f"extract {target}", parent, {LABEL_TARGET: target}, "default")


def use_everything(sn: Snapshotter) -> None:
    pull(sn, "one", "")
    pull(sn, "two", "one")
    pull(sn, "two", "one")
    assert len(sn.prepare("container", "two")) == len(sn.view("view", "one")) == 1
    assert sn.mounts("container") != sn.mounts("view")
    assert {info.name: info.kind for info in sn.walk(["kind==committed"])} == {
        "one": Kind.COMMITTED,
        "two": Kind.COMMITTED,
    }
    assert sn.update("one", {}, ["labels"]).labels == {}
    assert [sn.usage(name).inodes for name in ("one", "two", "container", "view")] == [
        *(LAZY_USAGE.inodes, LAZY_USAGE.inodes),
        *(1, 0),
    ]
    sn.commit("image", "container")
    with pytest.raises(FailedPrecondition):
        sn.remove("two")
    sn.cleanup()
    sn.prepare("again", "image")


def remove_everything(sn: Snapshotter) -> None:
    for name in ("again", "view", "image", "two", "one"):
        sn.remove(name)
    sn.cleanup()


def test_no_method_waits_for_a_lazy_mount(place: Path, layers: StuckLayers) -> None:
    sn = Snapshotter(place, SnapshotStore(metadata_path(place)), layers)
    in_time(layers, lambda: use_everything(sn))
    assert len(host.mounts_below(place)) == 2
    in_time(layers, lambda: remove_everything(sn))
    assert host.mounts_below(place) == []
    assert os.listdir(place / "snapshotter/snapshots") == []
    in_time(layers, sn.close)


def test_nor_does_a_snapshotter_that_starts(place: Path, layers: StuckLayers) -> None:
    sn = Snapshotter(place, SnapshotStore(metadata_path(place)), layers)
    in_time(layers, lambda: use_everything(sn))
    in_time(layers, sn.close)
    reopened: list[Snapshotter] = []
    in_time(layers, lambda: reopened.append(Snapshotter(place, SnapshotStore(metadata_path(place)), layers)))
    in_time(layers, lambda: reopened[0].mounts("again"))
    in_time(layers, lambda: remove_everything(reopened[0]))
    assert host.mounts_below(place) == []
    in_time(layers, reopened[0].close)


def test_nor_does_cleanup_when_unmounting_fails(
    place: Path, layers: StuckLayers, monkeypatch: pytest.MonkeyPatch, expected_logs: ExpectedLogs
) -> None:
    """A provider that has forgotten a mount says there was none: the directory stays, nothing hangs."""
    expected_logs.allow("could not be deleted yet")
    sn = Snapshotter(place, SnapshotStore(metadata_path(place)), layers)
    in_time(layers, lambda: pull(sn, "one", ""))
    sn.remove("one")
    with monkeypatch.context() as patch:
        patch.setattr(layers, "release", lambda _snapshot_id, _directory: False)
        in_time(layers, sn.cleanup)
    assert len(host.mounts_below(place)) == 1
    in_time(layers, sn.cleanup)
    assert host.mounts_below(place) == []
    assert os.listdir(place / "snapshotter/snapshots") == []
    in_time(layers, sn.close)
