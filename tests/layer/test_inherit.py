"""What implied directories take over: the same from a lazy parent as from an unpacked one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from snapshotter.errors import InvalidLayerFile
from snapshotter.layer.apply import DirAttributes
from snapshotter.layer.compile import compile_tree
from snapshotter.layer.inherit import Parent, inherited_attributes
from snapshotter.layer.materialize import materialize
from snapshotter.layer.tree import Tree
from snapshotter.ztoc.build import build
from snapshotter.ztoc.model import Algorithm
from tests.support.images import Entry, directory, symlink, tar
from tests.support.process import open_descriptors

Named = tuple[str, Entry | bytes]
MTIME_NS = 1_700_000_000 * 10**9
TMP = DirAttributes(0o1777, 5, 6, MTIME_NS)
pytestmark = pytest.mark.usefixtures("root")


@pytest.fixture(params=["lazy", "unpacked"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Layers:
    """Makes layers of entries below a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._count = 0

    def tree(self, entries: Iterable[Named]) -> Tree:
        """Return the compiled tree of a layer."""
        path, _data = self._compile(entries)
        with open(path, "rb") as file:
            return Tree(file.fileno())

    def parent(self, kind: str, entries: Iterable[Named]) -> Parent:
        """Return a layer as a parent that is lazy or unpacked."""
        path, data = self._compile(entries)
        if kind == "lazy":
            return Parent(tree=path)
        target = path.with_suffix(".d")
        target.mkdir()
        with open(path, "rb") as file, open(path.with_suffix(".tar"), "w+b") as stream:
            stream.write(data)
            stream.flush()
            tree = Tree(file.fileno())
            materialize(tree, stream.fileno(), target)
            tree.close()
        return Parent(directory=target)

    def _compile(self, entries: Iterable[Named]) -> tuple[Path, bytes]:
        data = tar(entries)
        self._count += 1
        path = self.root / f"{self._count}.tree"
        path.write_bytes(compile_tree(build([data], algorithm=Algorithm.UNCOMPRESSED).ztoc))
        return path, data


@pytest.fixture
def layers(tmp_path: Path) -> Layers:
    return Layers(tmp_path)


def inherited(
    layers: Layers, kind: str, upper: Iterable[Named], parents: Sequence[Iterable[Named]]
) -> dict[bytes, DirAttributes]:
    """Return what a layer of `upper` takes over from `parents`, the nearest first."""
    tree = layers.tree(upper)
    try:
        return inherited_attributes(tree, [layers.parent(kind, entries) for entries in parents])
    finally:
        tree.close()


SOMETHING_IN_TMP = [("tmp/new", b"N")]
HAS_TMP = [("tmp/", directory(0o1777, uid=5, gid=6))]


def test_owner_mode_and_time_are_taken_over(layers: Layers, kind: str) -> None:
    assert inherited(layers, kind, SOMETHING_IN_TMP, [HAS_TMP]) == {b"tmp": TMP}


def test_attributes_are_taken_over_but_those_of_the_overlay(layers: Layers, kind: str) -> None:
    marked = {"SCHILY.xattr.user.note": "kept", "SCHILY.xattr.trusted.note": "not kept"}
    parent = [("tmp/", directory(0o1777, uid=5, gid=6, pax=marked)), ("tmp/.wh..wh..opq", b"")]
    found = inherited(layers, kind, SOMETHING_IN_TMP, [parent])
    assert found[b"tmp"].xattrs == ((b"user.note", b"kept"),)


def test_what_the_layer_has_itself_is_not_looked_for(layers: Layers, kind: str) -> None:
    upper = [("tmp/", directory(0o700)), *SOMETHING_IN_TMP]
    assert inherited(layers, kind, upper, [HAS_TMP]) == {}


def test_the_nearest_parent_decides(layers: Layers, kind: str) -> None:
    nearer = [("tmp/", directory(0o700))]
    assert inherited(layers, kind, SOMETHING_IN_TMP, [nearer, HAS_TMP])[b"tmp"].mode == 0o700
    assert inherited(layers, kind, SOMETHING_IN_TMP, [[("other", b"")], HAS_TMP]) == {b"tmp": TMP}


def test_each_path_finds_its_own_parent(layers: Layers, kind: str) -> None:
    upper = [("a/b/c/file", b"")]
    parents = [[("a/", directory(0o711))], [("a/b/", directory(0o722))], [("a/b/c/", directory(0o733))]]
    found = inherited(layers, kind, upper, parents)
    assert {path: each.mode for path, each in found.items()} == {b"a": 0o711, b"a/b": 0o722, b"a/b/c": 0o733}


def test_what_a_parent_implies_itself_counts(layers: Layers, kind: str) -> None:
    assert inherited(layers, kind, SOMETHING_IN_TMP, [[("tmp/old", b"O")], HAS_TMP])[b"tmp"].mode == 0o755


def test_a_path_that_nobody_has_is_absent(layers: Layers, kind: str) -> None:
    assert inherited(layers, kind, SOMETHING_IN_TMP, [[("usr/", directory())]]) == {}
    assert inherited(layers, kind, SOMETHING_IN_TMP, []) == {}


@pytest.mark.parametrize(
    "replacing",
    [("tmp", b"a file"), (".wh.tmp", b""), ("tmp", symlink("/tmp"))],
    ids=["file", "whiteout", "loop"],
)
def test_what_was_replaced_or_deleted_ends_the_search(layers: Layers, kind: str, replacing: Named) -> None:
    """Also for what would lie below it: a parent further down is hidden there."""
    upper = [("tmp/deeper/new", b"N")]
    below = [*HAS_TMP, ("tmp/deeper/", directory(0o711))]
    assert inherited(layers, kind, upper, [[replacing], below]) == {}


def test_links_are_followed_within_their_layer(layers: Layers, kind: str) -> None:
    usr_merged = [
        ("usr/lib/", directory(0o711)),
        ("usr/lib/deep/", directory(0o722)),
        ("lib", symlink("usr/lib")),
        ("usr/lib64", symlink("/lib")),
        ("usr/up", symlink("../../../usr/lib64/./deep")),
    ]
    upper = [("lib/a", b""), ("usr/lib64/deep/a", b""), ("usr/up/a", b"")]
    found = inherited(layers, kind, upper, [usr_merged])
    assert {path: each.mode for path, each in found.items() if path != b"usr"} == {
        b"lib": 0o711, b"usr/lib64": 0o711, b"usr/lib64/deep": 0o722, b"usr/up": 0o722,
    }  # fmt: skip


def test_a_link_out_of_the_layer_leads_nowhere(layers: Layers, kind: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o712)
    below = [("srv/", directory(0o700))]
    for target in (str(outside), "../" * 20 + str(outside)):
        found = inherited(layers, kind, [("srv/new", b"")], [[("srv", symlink(target))], below])
        assert found[b"srv"].mode == 0o700


def test_a_name_of_any_bytes(layers: Layers, kind: str) -> None:
    name = b"caf\xe9\xff".decode("utf-8", "surrogateescape")
    found = inherited(layers, kind, [(f"{name}/new", b"")], [[(f"{name}/", directory(0o711))]])
    assert found[b"caf\xe9\xff"].mode == 0o711


def test_kinds_of_parents_can_be_mixed(layers: Layers) -> None:
    tree = layers.tree([("a/x", b""), ("b/x", b"")])
    parents = [
        layers.parent("lazy", [("a/", directory(0o711))]),
        layers.parent("unpacked", [("a/", directory(0o700)), ("b/", directory(0o722))]),
    ]
    found = inherited_attributes(tree, parents)
    tree.close()
    assert (found[b"a"].mode, found[b"b"].mode) == (0o711, 0o722)


def test_a_parent_that_cannot_be_read_is_an_error(layers: Layers, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.write_bytes(b"no tree")
    tree = layers.tree(SOMETHING_IN_TMP)
    with pytest.raises(InvalidLayerFile):
        inherited_attributes(tree, [Parent(tree=damaged)])
    with pytest.raises(FileNotFoundError):
        inherited_attributes(tree, [Parent(tree=tmp_path / "gone")])
    tree.close()


def test_nothing_stays_open(layers: Layers) -> None:
    parents = [layers.parent("lazy", HAS_TMP), layers.parent("unpacked", HAS_TMP)]
    tree = layers.tree([("tmp/x", b""), ("other/x", b"")])
    before = open_descriptors()
    inherited_attributes(tree, parents)
    assert open_descriptors() == before
    tree.close()
