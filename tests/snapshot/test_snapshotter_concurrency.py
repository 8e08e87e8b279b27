"""Many callers at once: one wins, the others are told, and nothing is left behind."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from snapshotter.errors import AlreadyExists, ContractError, NotFound
from snapshotter.snapshot.directories import metadata_path
from snapshotter.snapshot.layers import Deferred, LayerRequest, Provided
from snapshotter.snapshot.model import LABEL_TARGET, Kind
from snapshotter.snapshot.snapshotter import Snapshotter
from snapshotter.snapshot.store import SnapshotStore
from tests.support import host
from tests.support.layer_providers import DirectoryLayers, NoLayers

pytestmark = pytest.mark.usefixtures("root")

THREADS = 16
TARGET = "sha256:layer"


class Together(DirectoryLayers):
    """Lets no layer through before all threads ask for it: the worst race there is."""

    def __init__(self, layer: Path, *, lazy: bool) -> None:
        super().__init__({TARGET: layer} if lazy else {})
        self._all_here = threading.Barrier(THREADS)

    def provide(self, request: LayerRequest) -> Provided:
        self._all_here.wait(timeout=60)
        return super().provide(request)


@pytest.fixture
def layer(workdir: Path) -> Iterator[Path]:
    made = workdir / "layer"
    made.mkdir()
    yield made
    host.detach_below(workdir)


def start(workdir: Path, layers: NoLayers) -> Snapshotter:
    root = workdir / "root"
    return Snapshotter(root, SnapshotStore(metadata_path(root)), layers)


def run(calls: list[Callable[[], object]]) -> list[object]:
    """Run all calls at once and return their results, errors of the contract among them."""

    def attempt(call: Callable[[], object]) -> object:
        try:
            return call()
        except ContractError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(attempt, calls))


def directories(workdir: Path) -> list[str]:
    return os.listdir(workdir / "root/snapshotter/snapshots")


def pull(sn: Snapshotter, key: str) -> object:
    return sn.prepare(key, "", {LABEL_TARGET: TARGET}, "default")


@pytest.mark.parametrize("one_key", [True, False], ids=["one key", "a key each"])
def test_one_of_many_makes_the_layer(workdir: Path, layer: Path, one_key: bool) -> None:
    layers = Together(layer, lazy=True)
    sn = start(workdir, layers)
    keys = ["key"] * THREADS if one_key else [f"key-{number}" for number in range(THREADS)]
    outcomes = run([lambda key=key: pull(sn, key) for key in keys])  # type: ignore[misc]
    assert {str(outcome) for outcome in outcomes} == {f'target snapshot "{TARGET}": already exists'}
    assert all(isinstance(outcome, AlreadyExists) for outcome in outcomes)
    assert [info.name for info in sn.walk()] == [TARGET]
    (left,) = directories(workdir)
    assert [entry.target.parent.name for entry in host.mounts_below(workdir / "root")] == [left]
    assert len(layers.released) == THREADS - 1
    sn.close()


def test_one_of_many_gets_the_key_of_a_deferred_layer(workdir: Path, layer: Path) -> None:
    sn = start(workdir, Together(layer, lazy=False))
    outcomes = run([lambda: pull(sn, "key")] * THREADS)
    assert sum(isinstance(outcome, tuple) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, AlreadyExists) for outcome in outcomes) == THREADS - 1
    assert [info.name for info in sn.walk()] == ["key"]
    assert len(directories(workdir)) == 1
    sn.close()


def test_one_of_many_gets_the_key(workdir: Path) -> None:
    sn = start(workdir, NoLayers())
    outcomes = run([lambda: sn.prepare("key")] * THREADS)
    assert sum(isinstance(outcome, tuple) for outcome in outcomes) == 1
    assert len(directories(workdir)) == 1
    sn.close()


def test_one_of_many_commits(workdir: Path) -> None:
    sn = start(workdir, NoLayers())
    for number in range(THREADS):
        sn.prepare(f"key-{number}")
    outcomes = run([lambda key=f"key-{number}": sn.commit("name", key) for number in range(THREADS)])  # type: ignore[misc]
    assert sum(outcome is None for outcome in outcomes) == 1
    assert sum(isinstance(outcome, AlreadyExists) for outcome in outcomes) == THREADS - 1
    assert len(list(sn.walk(["kind==active"]))) == THREADS - 1
    sn.close()


def test_one_of_many_removes(workdir: Path) -> None:
    sn = start(workdir, NoLayers())
    sn.prepare("key")
    outcomes = run([lambda: sn.remove("key")] * THREADS)
    assert sum(outcome is None for outcome in outcomes) == 1
    assert sum(isinstance(outcome, NotFound) for outcome in outcomes) == THREADS - 1
    run([sn.cleanup] * THREADS)
    assert directories(workdir) == []
    sn.close()


def test_a_slow_layer_holds_nobody_up(workdir: Path) -> None:
    """While one layer waits for the network, everything else is answered."""
    asked, answer = threading.Event(), threading.Event()

    class Slow(NoLayers):
        def provide(self, request: LayerRequest) -> Provided:
            asked.set()
            assert answer.wait(timeout=60)
            return Deferred("no-index")

    sn = start(workdir, Slow())
    thread = threading.Thread(target=pull, args=(sn, "slow"))
    thread.start()
    assert asked.wait(timeout=60)
    sn.prepare("quick")
    sn.commit("name", "quick")
    assert [info.name for info in sn.walk()] == ["name"]
    assert sn.usage("name").inodes == 1
    sn.remove("name")
    sn.cleanup()
    assert thread.is_alive()
    answer.set()
    thread.join(timeout=60)
    assert sn.stat("slow").kind == Kind.ACTIVE
    sn.close()


def test_lives_of_many_snapshots_at_once(workdir: Path) -> None:
    """Whole lives, side by side, with Cleanup running all the time; nothing is lost, and nothing remains."""
    sn = start(workdir, NoLayers())

    def live(number: int) -> None:
        for turn in range(6):
            base, top = f"{number}-{turn}-base", f"{number}-{turn}-top"
            (mount,) = sn.prepare(base)
            (Path(mount.source) / "file").write_text(base)
            sn.commit(f"{base}-committed", base)
            sn.prepare(top, f"{base}-committed")
            assert (Path(mount.source) / "file").read_text() == base
            sn.cleanup()
            for name in (top, f"{base}-committed"):
                sn.remove(name)

    assert run([lambda number=number: live(number) for number in range(8)]) == [None] * 8  # type: ignore[misc]
    sn.cleanup()
    assert list(sn.walk()) == []
    assert directories(workdir) == []
    sn.close()
