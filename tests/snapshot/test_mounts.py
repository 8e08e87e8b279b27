"""What the client is told to mount, for every kind and number of parents."""

from pathlib import Path

import pytest

from snapshotter.snapshot.model import Kind, Mount
from snapshotter.snapshot.mounts import mounts_of

ROOT = Path("/r")


def test_an_active_snapshot_without_parents_is_its_own_directory() -> None:
    assert mounts_of(ROOT, Kind.ACTIVE, 7, (), ("userxattr",)) == (
        Mount("bind", "/r/7/fs", "", ("rw", "rbind")),
    )


def test_a_view_of_nothing_is_an_empty_directory() -> None:
    assert mounts_of(ROOT, Kind.VIEW, 7, ()) == (Mount("bind", "/r/7/fs", "", ("ro", "rbind")),)


def test_a_view_of_one_layer_is_that_layer() -> None:
    assert mounts_of(ROOT, Kind.VIEW, 7, (3,), ("userxattr",)) == (
        Mount("bind", "/r/3/fs", "", ("ro", "rbind")),
    )


def test_a_view_of_several_layers_is_an_overlay_without_an_upper() -> None:
    assert mounts_of(ROOT, Kind.VIEW, 7, (5, 3)) == (
        Mount("overlay", "overlay", "", ("lowerdir=/r/5/fs:/r/3/fs",)),
    )


@pytest.mark.parametrize(
    ("parents", "lower"), [((3,), "/r/3/fs"), ((5, 3, 1), "/r/5/fs:/r/3/fs:/r/1/fs")], ids=["one", "three"]
)
def test_an_active_snapshot_with_parents_is_an_overlay(parents: tuple[int, ...], lower: str) -> None:
    expected = ("workdir=/r/7/work", "upperdir=/r/7/fs", f"lowerdir={lower}")
    assert mounts_of(ROOT, Kind.ACTIVE, 7, parents) == (Mount("overlay", "overlay", "", expected),)


def test_options_are_added_to_overlays_at_the_end() -> None:
    for kind in (Kind.ACTIVE, Kind.VIEW):
        (mount,) = mounts_of(ROOT, kind, 7, (5, 3), ("userxattr", "volatile"))
        assert mount.options[-2:] == ("userxattr", "volatile")


def test_a_committed_snapshot_has_no_mounts() -> None:
    with pytest.raises(ValueError, match="7 is committed"):
        mounts_of(ROOT, Kind.COMMITTED, 7, ())
