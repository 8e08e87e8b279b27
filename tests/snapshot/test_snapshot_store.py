"""The store: what the contract's checks do not reach. Versions, durability, ids, chains, layers, lazy mounts."""

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotter.errors import AlreadyExists, ConfigError, InvalidArgument, NotFound, Unavailable
from snapshotter.snapshot.model import LABEL_TARGET, NO_USAGE, Kind, LazyMount, Owner, Usage
from snapshotter.snapshot.store import Ancestor, SnapshotStore
from tests.support.layer_providers import some_digest

ROOT = Owner(0, 0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "down" / "metadata.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[SnapshotStore]:
    opened = SnapshotStore(path)
    yield opened
    opened.close()


def add(store: SnapshotStore, snapshot_id: int, name: str, parent: str = "", **fields: object) -> None:
    """Insert a committed snapshot."""
    values = {"labels": {}, "owner": ROOT, **fields}
    store.create(snapshot_id, Kind.COMMITTED, name, parent=parent, **values)  # type: ignore[arg-type]


def test_everything_is_there_after_reopening(store: SnapshotStore, path: Path) -> None:
    labels = {"ключ": "значение", "a.b/c": "x", "empty": ""}
    add(store, 3, "base", usage=Usage(5, 6), owner=Owner(7, 8), lazy=True, labels=labels)
    before = store.create(4, Kind.ACTIVE, "top", parent="base", labels={}, owner=Owner(7, 8))
    store.close()
    again = SnapshotStore(path)
    assert again.get("top") == before
    found = again.get("base")
    assert (found.id, found.usage, found.owner, found.lazy) == (3, Usage(5, 6), Owner(7, 8), True)
    assert found.info.labels == {"ключ": "значение", "a.b/c": "x"}
    assert again.ids() == {3, 4}
    assert [snapshot.info.name for snapshot in again.all()] == ["base", "top"]
    assert again.has("top")
    assert not again.has("to")


def test_a_newer_version_is_refused(store: SnapshotStore, path: Path) -> None:
    store.close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(ConfigError, match=f"{path} is of version 99, this program knows up to 1"):
        SnapshotStore(path)


def test_a_file_that_is_no_database_is_refused(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x00garbage" * 1000)
    with pytest.raises(ConfigError, match=f"{path} cannot be opened"):
        SnapshotStore(path)


def test_a_half_made_database_is_made(path: Path) -> None:
    """Version and tables come in one transaction; a crash before it leaves an empty file."""
    path.parent.mkdir(parents=True)
    path.touch()
    store = SnapshotStore(path)
    add(store, 1, "a")
    assert store.has("a")


def test_commits_are_made_to_survive_a_power_cut(store: SnapshotStore) -> None:
    with store._database.write() as connection:
        (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
        (synchronous,) = connection.execute("PRAGMA synchronous").fetchone()
        (foreign_keys,) = connection.execute("PRAGMA foreign_keys").fetchone()
    assert (mode, synchronous, foreign_keys) == ("wal", 2, 1)


def test_the_last_id_outlives_its_snapshot(store: SnapshotStore, path: Path) -> None:
    assert store.last_id() == 0
    add(store, 5, "a")
    store.remove("a")
    store.close()
    again = SnapshotStore(path)
    assert again.last_id() == 5
    again.record_mount(LazyMount(9, some_digest("l"), "", "", "", ""))
    assert again.last_id() == 9


def test_a_failed_call_changes_nothing(store: SnapshotStore) -> None:
    add(store, 1, "a")
    before = store.all()
    with pytest.raises(sqlite3.IntegrityError):
        add(store, 1, "same id")
    with pytest.raises(AlreadyExists):
        add(store, 2, "a")
    with pytest.raises(InvalidArgument):
        store.update("a", {"x": "y"}, ["labels.x", "name"])
    assert store.all() == before
    add(store, 2, "b")


def test_a_lazy_snapshot_is_a_committed_one(store: SnapshotStore) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        store.create(1, Kind.ACTIVE, "a", parent="", labels={}, owner=ROOT, lazy=True)


def test_chains_are_nearest_first(store: SnapshotStore) -> None:
    add(store, 7, "c1", owner=Owner(1, 1))
    add(store, 3, "c2", "c1", lazy=True, owner=Owner(2, 2))
    add(store, 5, "c3", "c2", owner=Owner(3, 3))
    assert store.chain("") == ()
    assert store.chain("c3") == (
        Ancestor(5, Owner(3, 3), lazy=False),
        Ancestor(3, Owner(2, 2), lazy=True),
        Ancestor(7, Owner(1, 1), lazy=False),
    )
    with pytest.raises(NotFound, match="c4"):
        store.chain("c4")
    store.create(8, Kind.VIEW, "view", parent="c3", labels={}, owner=ROOT)
    with pytest.raises(InvalidArgument, match="view"):
        store.chain("view")


def test_a_chain_of_a_thousand(store: SnapshotStore) -> None:
    for number in range(1, 1001):
        add(store, number, f"c{number}", f"c{number - 1}" if number > 1 else "")
    assert [ancestor.id for ancestor in store.chain("c1000")] == list(range(1000, 0, -1))


def test_a_layer_is_found_by_target_and_parent(store: SnapshotStore) -> None:
    labels = {LABEL_TARGET: "sha256:t"}
    add(store, 1, "p1")
    add(store, 2, "p2")
    add(store, 3, "sha256:t", "p1", labels=labels)
    add(store, 4, "sha256:t/4", "p2", labels=labels)
    assert store.find_layer("sha256:t", "p1") == "sha256:t"
    assert store.find_layer("sha256:t", "p2") == "sha256:t/4"
    assert store.find_layer("sha256:t", "") is None
    assert store.find_layer("sha256:", "p1") is None


@pytest.mark.parametrize(
    ("name", "kind", "labels"),
    [
        ("sha256:t", Kind.COMMITTED, {}),
        ("sha256:t", Kind.COMMITTED, {LABEL_TARGET: "sha256:u"}),
        ("sha256:t", Kind.ACTIVE, {LABEL_TARGET: "sha256:t"}),
        ("default/1/sha256:t", Kind.COMMITTED, {LABEL_TARGET: "sha256:t"}),
        ("sha256:t0", Kind.COMMITTED, {LABEL_TARGET: "sha256:t"}),
    ],
    ids=["unlabelled", "other target", "active", "unpacked by a client", "longer name"],
)
def test_what_only_looks_like_a_layer_is_not_found(
    store: SnapshotStore, name: str, kind: Kind, labels: dict[str, str]
) -> None:
    store.create(1, kind, name, parent="", labels=labels, owner=ROOT)
    assert store.find_layer("sha256:t", "") is None


def test_lazy_mounts_are_remembered(store: SnapshotStore, path: Path) -> None:
    first = LazyMount(2, some_digest("a"), "", "docker.io/library/a:1", "sha256:m", "default")
    second = LazyMount(1, some_digest("b"), "base", "docker.io/library/b:1", "sha256:n", "k8s.io")
    store.record_mount(first)
    store.record_mount(second)
    store.close()
    again = SnapshotStore(path)
    assert again.lazy_mounts() == [second, first]
    replaced = LazyMount(2, some_digest("c"), "", "", "", "")
    again.record_mount(replaced)
    again.forget_mount(1)
    again.forget_mount(1)
    assert again.lazy_mounts() == [replaced]


def test_a_lazy_mount_outlives_its_snapshot(store: SnapshotStore) -> None:
    add(store, 1, "a", lazy=True)
    store.record_mount(LazyMount(1, some_digest("a"), "", "", "", ""))
    assert store.remove("a").id == 1
    assert [mount.snapshot_id for mount in store.lazy_mounts()] == [1]


def test_readers_do_not_wait_for_a_writer(store: SnapshotStore) -> None:
    add(store, 1, "a")
    with store._database.write() as connection:
        connection.execute('UPDATE snapshots SET labels = \'{"x":"y"}\'')
        found: list[dict[str, str]] = []
        thread = threading.Thread(target=lambda: found.append(dict(store.get("a").info.labels)))
        thread.start()
        thread.join(timeout=60)
        assert found == [{}]
    assert store.get("a").info.labels == {"x": "y"}


def test_one_name_goes_to_one_of_many_threads(store: SnapshotStore) -> None:
    outcomes: list[str] = []

    def create(number: int) -> None:
        try:
            store.create(number, Kind.ACTIVE, "key", parent="", labels={}, owner=ROOT, usage=NO_USAGE)
            outcomes.append("made")
        except AlreadyExists:
            outcomes.append("refused")

    threads = [threading.Thread(target=create, args=(number,)) for number in range(1, 17)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["made"] + ["refused"] * 15
    assert len(store.ids()) == 1


def test_a_closed_store_is_unavailable(store: SnapshotStore) -> None:
    store.close()
    store.close()
    for call in (store.all, store.ids, lambda: store.remove("a"), lambda: store.forget_mount(1)):
        with pytest.raises(Unavailable, match="shutting down"):
            call()
