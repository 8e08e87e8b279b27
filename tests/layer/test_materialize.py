"""Layers written as files: the same as a real unpacking, and the same as the tree says."""

from __future__ import annotations

import os
import stat
import time
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from snapshotter.errors import InvalidLayerFile, UnsupportedLayer
from snapshotter.layer.compile import DirAttributes
from snapshotter.layer.materialize import LayerUsage, materialize
from tests.support import random_layers, unpacking
from tests.support.facts import Facts, deep_root, facts_of_directory, facts_of_tree, tree_of
from tests.support.images import Entry, directory, hardlink, tar
from tests.support.nasty import Named, nasty_layers


def written(data: bytes, target: bytes, *, base: bool) -> LayerUsage:
    """Materialize the layer `data` below `target`. Raises UnsupportedLayer."""
    scratch = os.memfd_create("tar")
    try:
        os.write(scratch, data)
        with closing(tree_of(data, base=base)) as tree:
            return materialize(tree, scratch, Path(os.fsdecode(target)))
    finally:
        os.close(scratch)


def on_disk_both_ways(data: bytes, *, base: bool) -> tuple[dict[bytes, Facts], dict[bytes, Facts]]:
    """Return (materialized, unpacked by the oracle). Raises UnsupportedLayer, unpacking.Refused."""
    since_ns = time.time_ns() - 10**9
    with deep_root() as ours, deep_root() as theirs:
        written(data, ours, base=base)
        unpacking.unpack(data, theirs, base=base)
        return facts_of_directory(ours, since_ns=since_ns), facts_of_directory(theirs, since_ns=since_ns)


@pytest.mark.parametrize("number", [0, 1])
def test_nasty_layers(number: int) -> None:
    ours, theirs = on_disk_both_ways(nasty_layers()[number], base=number == 0)
    assert ours == theirs


@given(entries=random_layers.layers())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_layers(entries: list[Named]) -> None:
    try:
        ours, theirs = on_disk_both_ways(tar(entries), base=False)
    except (UnsupportedLayer, unpacking.Refused):
        return  # test_apply proves that they agree about this
    assert ours == theirs


def test_the_usage_is_that_of_the_directory() -> None:
    data = nasty_layers()[0]
    with deep_root() as target:
        usage = written(data, target, base=True)
        found = {
            os.lstat(os.path.join(target, path)).st_ino: os.lstat(os.path.join(target, path)).st_blocks
            for path in unpacking.paths(target)
        }
    assert usage == LayerUsage(sum(found.values()) * 512, len(found))


def test_a_target_keeps_its_own_mode_and_owner_but_gets_the_opaque_mark() -> None:
    with deep_root() as target:
        os.chmod(target, 0o710)
        os.chown(target, 5, 6)
        written(tar({".wh..wh..opq": b""}), target, base=False)
        info = os.stat(target)
        assert (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid) == (0o710, 5, 6)
        assert os.getxattr(target, "trusted.overlay.opaque") == b"y"


def test_directories_deeper_than_descriptors_and_recursion_allow() -> None:
    name = "/".join("d" * 1200)
    data = tar([(name + "/leaf", b"deep"), ("link", hardlink(name + "/leaf"))])
    with deep_root() as target:
        usage = written(data, target, base=False)
        assert usage.inodes == 1202
        with open(os.path.join(target, b"link"), "rb") as leaf:
            assert leaf.read() == b"deep"


def test_directories_that_forbid_writing_are_filled_first() -> None:
    data = tar([("locked/", directory(0o000, uid=9)), ("locked/inside", Entry(b"x", mode=0o400))])
    with deep_root() as target:
        written(data, target, base=False)
        assert stat.S_IMODE(os.stat(os.path.join(target, b"locked")).st_mode) == 0
        assert os.listdir(os.path.join(target, b"locked")) == [b"inside"]


def test_implicit_directories_take_over_what_they_inherit() -> None:
    data = tar({"var/tmp/file": b"x"})
    inherited = {b"var/tmp": DirAttributes(0o1777, 3, 4, 10**18, ((b"user.note", b"kept"),))}
    with deep_root() as target, closing(tree_of(data, inherited=inherited)) as tree:
        expected = facts_of_tree(tree, data)[b"var/tmp"]
        scratch = os.memfd_create("tar")
        os.write(scratch, data)
        materialize(tree, scratch, Path(os.fsdecode(target)))
        os.close(scratch)
        shown = facts_of_directory(target, since_ns=time.time_ns())[b"var/tmp"]
    assert shown == expected
    assert (shown.mode, shown.uid, shown.gid) == (0o041777, 3, 4)
    assert shown.xattrs == ((b"user.note", b"kept"),)


def test_a_tar_that_is_too_short_is_an_error() -> None:
    data = tar({"file": b"x" * 5000})
    scratch = os.memfd_create("tar")
    os.write(scratch, data[:4096])
    with (
        deep_root() as target,
        closing(tree_of(data)) as tree,
        pytest.raises(InvalidLayerFile, match="ends at 4096"),
    ):
        materialize(tree, scratch, Path(os.fsdecode(target)))
    os.close(scratch)
