"""The nasty image, two compiled layers merged as overlayfs merges, against what overlayfs showed of containerd's unpacking."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from snapshotter.layer.layout import ROOT_INO
from snapshotter.layer.tree import Tree, TreeFlags
from tests.support.facts import tree_of
from tests.support.nasty import nasty_layers

GOLDEN = Path(__file__).parents[1] / "data/golden/nasty-tree-overlayfs.txt"

Layer = tuple[Tree, bytes]
Merged = tuple[Tree, bytes, int]


def merged(layers: list[Layer], inodes: list[int]) -> Iterator[tuple[bytes, Merged, list[Layer], list[int]]]:
    """Yield (name, what is on top, layers that show through, their inodes) for a directory; topmost layer first."""
    names: dict[bytes, list[tuple[Layer, int]]] = {}
    for layer, ino in zip(layers, inodes, strict=True):
        for _, name, child in layer[0].children(ino):
            names.setdefault(name, []).append((layer, child))
    for name, found in sorted(names.items()):
        (tree, tar), top = found[0]
        node = tree.row(top)
        if stat.S_ISCHR(node.mode) and node.rdev == 0:
            continue
        through = []
        for layer, child in found:
            if not stat.S_ISDIR(layer[0].row(child).mode):
                break
            through.append((layer, child))
            if layer[0].xattr(child, b"trusted.overlay.opaque") == b"y":
                break
        yield name, (tree, tar, top), [layer for layer, _ in through], [child for _, child in through]


def lines(layers: list[Layer], inodes: list[int], above: bytes = b"") -> Iterator[str]:
    """Yield the lines of the listing below a directory."""
    for name, top, through, children in merged(layers, inodes):
        path = above + b"/" + name
        yield line(path, *top)
        if through:
            yield from lines(through, children, path)


def line(path: bytes, tree: Tree, tar: bytes, ino: int) -> str:
    node = tree.row(ino)
    shown: object = ""
    if stat.S_ISREG(node.mode):
        content = memoryview(tar)[node.data_offset : node.data_offset + node.size]
        shown = hashlib.sha256(content).hexdigest()[:12]
    elif stat.S_ISLNK(node.mode):
        shown = tree.readlink(ino)[:60]
    attributes = [
        (name.decode(), (tree.xattr(ino, name) or b"")[:20])
        for name in tree.xattr_names(ino)
        if not name.startswith(b"trusted.overlay.")
    ]
    links, size, time = ("-", "-", "-") if stat.S_ISDIR(node.mode) else (node.nlink, node.size, node.mtime_ns)
    fields = (path[:140], oct(node.mode), links, node.uid, node.gid, size, node.rdev, time, shown, attributes)
    return " ".join(map(str, fields))


def test_the_nasty_image_is_what_overlayfs_shows_of_it() -> None:
    lower, upper = nasty_layers(full=True)
    with closing(tree_of(lower, base=True)) as below, closing(tree_of(upper)) as above:
        assert above.flags & TreeFlags.HAS_OPAQUE
        assert above.flags & TreeFlags.HAS_WHITEOUTS
        assert not below.flags & TreeFlags.HAS_WHITEOUTS
        layers = [(above, upper), (below, lower)]
        shown = list(lines(layers, [ROOT_INO, ROOT_INO]))
    assert shown[0].startswith("b'/n' 0o40755 ")
    assert shown[1:] == GOLDEN.read_text().splitlines()
