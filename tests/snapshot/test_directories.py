"""The snapshots' directories: made, claimed, found again, deleted, and never looked into when mounted."""

import os
import threading
from pathlib import Path

import pytest

from snapshotter.snapshot.directories import Directories, snapshots_path
from snapshotter.snapshot.model import Kind, Owner
from tests.support import host
from tests.support.snapshot_mounts import bind, mount

pytestmark = pytest.mark.usefixtures("root")

ROOT_OWNER = Owner(0, 0)


@pytest.fixture
def directories(workdir: Path) -> Directories:
    return Directories(workdir, 0)


def names(directories: Directories) -> set[str]:
    return set(os.listdir(directories.path))


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def test_modes_and_owners_do_not_depend_on_the_umask(directories: Directories) -> None:
    before = os.umask(0o077)
    try:
        directories.make(1, Kind.ACTIVE, Owner(12, 34))
    finally:
        os.umask(before)
    assert mode(directories.path) == mode(directories.path / "1") == 0o700
    assert mode(directories.path / "1/fs") == 0o755
    assert mode(directories.path / "1/work") == 0o711
    assert directories.owner(1) == Owner(12, 34)


def test_only_an_active_snapshot_gets_a_work(directories: Directories) -> None:
    for number, kind in enumerate(Kind):
        directories.make(number, kind, ROOT_OWNER)
        assert (directories.path / f"{number}/work").exists() == (kind == Kind.ACTIVE)


def test_ids_go_on_after_those_that_are_known(workdir: Path) -> None:
    place = snapshots_path(workdir)
    place.mkdir(parents=True)
    for name in ("9", "lost+found", "new-17", "²"):
        (place / name).mkdir()
    with Directories(workdir, 5).claim() as snapshot_id:
        assert snapshot_id == 10
    with Directories(workdir, 12).claim() as snapshot_id:
        assert snapshot_id == 13


def test_ids_are_given_once(directories: Directories) -> None:
    given: list[int] = []

    def take() -> None:
        for _ in range(200):
            with directories.claim() as snapshot_id:
                given.append(snapshot_id)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(given) == list(range(1, 1601))


def test_leftovers_have_neither_row_nor_claim(directories: Directories) -> None:
    for number in (1, 2, 3):
        directories.make(number, Kind.VIEW, ROOT_OWNER)
    (directories.path / "lost+found").mkdir()
    assert directories.leftovers(lambda: {2, 77}) == [1, 3]
    fresh = Directories(directories.path.parent.parent, 3)
    with fresh.claim() as snapshot_id:
        fresh.make(snapshot_id, Kind.VIEW, ROOT_OWNER)
        assert fresh.leftovers(lambda: {1, 2, 3}) == []
    assert fresh.leftovers(lambda: {1, 2, 3}) == [4]


def test_a_row_that_comes_while_leftovers_are_sought(directories: Directories) -> None:
    """Whoever made the directory before the listing may insert its row, and end its claim, until we ask."""
    with directories.claim() as snapshot_id:
        directories.make(snapshot_id, Kind.VIEW, ROOT_OWNER)
    rows: set[int] = set()

    def insert_then_answer() -> set[int]:
        rows.add(snapshot_id)
        return rows

    assert directories.leftovers(insert_then_answer) == []


def test_delete_takes_everything(directories: Directories) -> None:
    directories.make(1, Kind.ACTIVE, ROOT_OWNER)
    upper = directories.upper(1)
    (upper / "a/b/a/b").mkdir(parents=True)
    (upper / "a/file").write_text("x")
    (upper / "closed").mkdir(mode=0)
    (upper / "link").symlink_to("/etc")
    os.mkfifo(upper / "a/b/pipe")
    (upper / os.fsdecode(b"\xff")).mkdir()
    directories.delete(1)
    directories.delete(1)
    assert names(directories) == set()
    assert Path("/etc/passwd").exists()


def test_delete_goes_on_where_an_earlier_one_was_cut_off(directories: Directories) -> None:
    directories.make(1, Kind.ACTIVE, ROOT_OWNER)
    for name in ("0123456789abcdef-0", "0123456789abcdef-1"):
        (directories.path / "1" / name / "sub").mkdir(parents=True)
    directories.delete(1)
    assert names(directories) == set()


@pytest.mark.parametrize("below", ["fs", "fs/deep/down"])
def test_delete_does_not_enter_a_mount(directories: Directories, workdir: Path, below: str) -> None:
    precious = workdir / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    directories.make(1, Kind.ACTIVE, ROOT_OWNER)
    target = directories.path / "1" / below
    target.mkdir(parents=True, exist_ok=True)
    bind(str(precious), target, read_only=False)
    with pytest.raises(OSError, match="busy"):
        directories.delete(1)
    assert (precious / "file").read_text() == "x"
    host.detach_below(directories.path)
    directories.delete(1)
    assert names(directories) == set()


def test_delete_does_not_even_look_at_a_mount(directories: Directories, workdir: Path) -> None:
    """A FUSE file system that never answers: whoever touched it would wait for ever."""
    directories.make(1, Kind.COMMITTED, ROOT_OWNER)
    device = os.open("/dev/fuse", os.O_RDWR)
    mount("stuck", directories.upper(1), "fuse.stuck", 0, f"fd={device},rootmode=40755,user_id=0,group_id=0")
    errors: list[OSError] = []

    def delete() -> None:
        try:
            directories.delete(1)
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=delete, daemon=True)
    thread.start()
    thread.join(timeout=60)
    stuck = thread.is_alive()
    os.close(device)
    thread.join()
    assert not stuck
    assert [error.strerror for error in errors] == ["Device or resource busy"]
    host.detach_below(workdir)


def test_a_file_that_cannot_be_deleted_is_an_error_and_no_more(directories: Directories) -> None:
    directories.make(1, Kind.ACTIVE, ROOT_OWNER)
    mounted_on = directories.upper(1) / "hosts"
    mounted_on.touch()
    bind("/etc/hosts", mounted_on, read_only=False)
    with pytest.raises(OSError, match="busy"):
        directories.delete(1)
    assert Path("/etc/hosts").exists()
    host.detach_below(directories.path)
    directories.delete(1)
    assert names(directories) == set()
