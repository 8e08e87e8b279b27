"""The directory of a layer: names that appear whole or not at all, modes, holes, leftovers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from snapshotter.errors import InvalidLayerFile
from snapshotter.layer import store as store_module
from snapshotter.layer.store import LayerStore
from snapshotter.units import Digest

LAYER = Digest("sha256:" + "0a" * 32)
OTHER = Digest("sha256:" + "0b" * 32)


@pytest.fixture
def store(tmp_path: Path) -> LayerStore:
    return LayerStore(tmp_path)


def test_paths(store: LayerStore, tmp_path: Path) -> None:
    paths = store.paths(LAYER)
    assert paths.directory == tmp_path / "layers/sha256" / ("0a" * 32)
    names = {path.name for path in (paths.ztoc, paths.tree, paths.blob, paths.data, paths.spans, paths.trace)}
    assert names == {"ztoc", "tree", "blob", "data", "spans", "trace"}
    assert store.paths(LAYER, "base").tree.name == "tree.base"
    assert not paths.directory.exists()


@pytest.mark.parametrize("digest", ["sha256:..", "../../etc", "sha256:" + "A" * 64, "sha512:" + "a" * 64, ""])
def test_only_digests_make_paths(store: LayerStore, digest: str) -> None:
    with pytest.raises(ValueError, match="not a sha256 digest"):
        store.paths(Digest(digest))


@pytest.mark.parametrize("variant", ["../x", "A", "a.b", "-a", "x" * 65, "a/b"])
def test_only_plain_words_are_variants(store: LayerStore, variant: str) -> None:
    with pytest.raises(ValueError, match="not the name of a tree variant"):
        store.paths(LAYER, variant)


def test_writing_and_finding(store: LayerStore) -> None:
    assert not store.has_ztoc(LAYER)
    path = store.write_ztoc(LAYER, b"z" * 100_000)
    assert path == store.paths(LAYER).ztoc
    assert path.read_bytes() == b"z" * 100_000
    assert store.has_ztoc(LAYER)
    assert not store.has_tree(LAYER)
    store.write_tree(LAYER, lambda fd: os.write(fd, b"tree") and None)
    store.write_tree(LAYER, lambda fd: os.write(fd, b"base") and None, "base")
    assert store.has_tree(LAYER)
    assert store.has_tree(LAYER, "base")
    assert not store.has_tree(LAYER, "other")
    assert store.paths(LAYER).tree.read_bytes() == b"tree"
    assert sorted(os.listdir(store.paths(LAYER).directory)) == ["tree", "tree.base", "ztoc"]


def test_nobody_else_can_look(store: LayerStore, tmp_path: Path) -> None:
    store.write_ztoc(LAYER, b"z")
    os.close(store.open_cache(store.paths(LAYER).blob, 10))
    for path in (tmp_path / "layers").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
    assert (tmp_path / "layers").stat().st_mode & 0o777 == 0o700


def test_a_write_that_fails_leaves_the_old_file(store: LayerStore) -> None:
    store.write_ztoc(LAYER, b"old")

    def half(fd: int) -> None:
        os.write(fd, b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        store.write_tree(LAYER, half)
    assert os.listdir(store.paths(LAYER).directory) == ["ztoc"]
    store.write_ztoc(LAYER, b"new")
    assert store.paths(LAYER).ztoc.read_bytes() == b"new"


def test_a_name_is_only_given_to_what_is_on_disk(store: LayerStore, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []

    def fsync(fd: int) -> None:
        target = Path(os.readlink(f"/proc/self/fd/{fd}"))
        steps.append("directory" if target.is_dir() else f"file, named: {store.has_ztoc(LAYER)}")

    monkeypatch.setattr(store_module.os, "fsync", fsync)
    store.write_ztoc(LAYER, b"z")
    assert steps == ["file, named: False", "directory", "directory"]


def test_leftovers_go_when_the_daemon_starts(store: LayerStore, tmp_path: Path) -> None:
    store.write_ztoc(LAYER, b"z")
    directory = store.paths(LAYER).directory
    (directory / ".tmp-tree-1234").write_bytes(b"half")
    (directory.parent / ".tmp-5678/sub").mkdir(parents=True)
    LayerStore(tmp_path)
    assert (directory / ".tmp-tree-1234").exists()
    assert LayerStore(tmp_path, tidy=True).layers() == [LAYER]
    assert os.listdir(directory) == ["ztoc"]
    assert os.listdir(directory.parent) == [directory.name]


def test_listing_and_removing(store: LayerStore) -> None:
    store.write_ztoc(OTHER, b"z")
    store.write_ztoc(LAYER, b"z")
    (store.paths(LAYER).directory.parent / "lost+found").mkdir()
    assert store.layers() == [LAYER, OTHER]
    with open(store.paths(LAYER).ztoc, "rb") as kept:
        store.remove(LAYER)
        assert kept.read() == b"z"
    assert store.layers() == [OTHER]
    store.remove(LAYER)


def test_a_removal_that_is_interrupted_leaves_a_leftover(
    store: LayerStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write_ztoc(LAYER, b"z")

    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store_module.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.remove(LAYER)
    assert store.layers() == []
    monkeypatch.undo()
    assert LayerStore(store.paths(LAYER).directory.parents[2], tidy=True).layers() == []


def test_caches_are_sparse_and_of_full_size(store: LayerStore) -> None:
    path = store.paths(LAYER).data
    fd = store.open_cache(path, 1 << 30)
    os.pwrite(fd, b"x" * 4096, 1 << 29)
    os.close(fd)
    assert path.stat().st_size == 1 << 30
    assert path.stat().st_blocks * 512 < 1 << 20
    again = store.open_cache(path, 1 << 30)
    assert os.pread(again, 1, 1 << 29) == b"x"
    os.close(again)


def test_file_systems_without_holes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "data"
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 8 << 20)  # what ftruncate does where there are no holes
        with pytest.raises(InvalidLayerFile, match="stores no sparse files"):
            store_module._refuse_without_holes(file.fileno(), path, 8 << 20)
    assert path.stat().st_size == 0
