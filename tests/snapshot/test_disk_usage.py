"""What a tree occupies: as `du` says, and under a container that does its worst."""

import itertools
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotter.snapshot import directories
from snapshotter.snapshot import usage as usage_module
from snapshotter.snapshot.usage import disk_usage


def du(top: Path) -> tuple[int, int]:
    """Return what coreutils say: allocated bytes and inodes."""
    size = subprocess.run(["du", "-s", "-B1", top], check=True, capture_output=True, text=True)
    inodes = subprocess.run(["du", "-s", "--inodes", top], check=True, capture_output=True, text=True)
    return int(size.stdout.split()[0]), int(inodes.stdout.split()[0])


def usage(top: Path) -> tuple[int, int]:
    found = disk_usage(top)
    return found.size, found.inodes


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "tree"
    (top / "a/b/c").mkdir(parents=True)
    (top / "d").mkdir()
    (top / "a/large").write_bytes(b"x" * 300_000)
    (top / "a/b/small").write_bytes(b"x")
    os.link(top / "a/large", top / "d/link")
    os.link(top / "a/large", top / "a/b/c/link")
    with (top / "d/sparse").open("wb") as file:
        file.truncate(1 << 30)
    (top / "d/up").symlink_to("..")
    (top / "dangling").symlink_to("nowhere")
    os.mkfifo(top / "pipe")
    (top / os.fsdecode(b"not-utf8-\xff")).mkdir()
    return top


def test_it_is_what_du_says(tree: Path) -> None:
    assert usage(tree) == du(tree)


def test_an_empty_directory(tmp_path: Path) -> None:
    assert usage(tmp_path) == du(tmp_path) == (os.stat(tmp_path).st_blocks * 512, 1)


def test_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        disk_usage(tmp_path / "missing")


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[Path]:
    """A tree deeper than recursion and, with its path of 9000 bytes, than the kernel takes in one piece."""
    top = tmp_path / "1"
    top.mkdir()
    fd = os.open(top, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("aa", dir_fd=fd)
        child = os.open("aa", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = child
    os.close(os.open("bottom", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(fd)
    yield top
    if top.exists():
        subprocess.run(["rm", "-rf", top], check=True)


def test_depth_is_no_limit(deep: Path) -> None:
    assert usage(deep) == du(deep)
    assert disk_usage(deep).inodes == 3002


def test_deleting_a_deep_tree(deep: Path, tmp_path: Path) -> None:
    place = tmp_path / "snapshotter/snapshots"
    place.mkdir(parents=True)
    deep.rename(place / "1")
    directories.Directories(tmp_path, 0).delete(1)
    assert list(place.iterdir()) == []


def test_a_tree_that_never_stands_still_is_counted_in_part(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time it comes back from a directory, that has another parent; three passes, then what there is."""
    passes: list[bool] = []
    real = usage_module._Count.walk
    numbers = itertools.count()

    def walk(self: usage_module._Count, top: Path) -> bool:
        passes.append(real(self, top))
        return passes[-1]

    monkeypatch.setattr(usage_module, "_identity", lambda status: (status.st_ino, next(numbers)))
    monkeypatch.setattr(usage_module._Count, "walk", walk)
    assert disk_usage(tree).inodes > 0
    assert passes == [False] * 3


def test_a_tree_that_moves_under_our_feet(tree: Path) -> None:
    """A container renames directories back and forth while we count: an answer comes, and nothing escapes."""
    stop = threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            os.rename(tree / "a/b", tree / "d/b")
            os.rename(tree / "d/b", tree / "a/b")
            (tree / "new").mkdir()
            (tree / "new").rmdir()

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        counts = [disk_usage(tree) for _ in range(300)]
    finally:
        stop.set()
        thread.join()
    size, inodes = du(tree)
    assert all(0 < count.inodes <= inodes + 1 and count.size <= size + 4096 for count in counts)
    assert usage(tree) == (size, inodes)
