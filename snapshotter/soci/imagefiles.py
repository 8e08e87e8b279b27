"""The files of an image as a container would see them, found by name: paths, globs, directories, symbolic links.

Made from zTOCs alone, hence without layers that are not indexed. Pure; a value of its own per use.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from fnmatch import translate
from typing import Final

from snapshotter.ztoc.model import FileEntry, Ztoc

_WHITEOUT: Final = b".wh."
_OPAQUE: Final = b".wh..wh..opq"
_MAX_LINKS: Final = 40
"""As the kernel: what takes more is a loop."""
_GLOB: Final = re.compile(rb"[*?\[]")


class _Node:
    """A name in the tree; without an entry, a directory that nobody listed."""

    __slots__ = ("children", "entry", "layer", "parent")

    def __init__(self, parent: _Node | None, layer: int, entry: FileEntry | None = None) -> None:
        self.parent = parent or self
        self.layer = layer
        self.entry = entry
        self.children: dict[bytes, _Node] = {}


class ImageFiles:
    """The tree of an image."""

    def __init__(self, layers: Iterable[Ztoc]) -> None:
        """`layers` are in order, lowest first."""
        self._root = _Node(None, -1)
        for position, ztoc in enumerate(layers):
            for entry in ztoc.entries:
                self._add(position, entry)

    def find(self, pattern: str) -> list[tuple[int, FileEntry]]:
        """Return the regular files that `pattern` names, each with the number of its layer.

        A leading `/` or `./` makes no difference. A directory stands for all that is in it. In globs `*`, `?` and
        `[...]` match within a name and `**` any number of directories; a name that exists is taken as it is.
        Symbolic links are followed.
        """
        parts = _split(pattern.encode("utf-8", "surrogateescape"))
        found: dict[int, tuple[int, FileEntry]] = {}
        for node in self._match(self._root, parts):
            for layer, entry in self._files(node):
                found[id(entry)] = (layer, entry)
        return list(found.values())

    def file(self, name: bytes) -> FileEntry | None:
        """Return the regular file that `name` leads to, links followed; None when it leads to nothing, or elsewhere."""
        for node in self._match(self._root, _split(name)):
            if node.entry is not None and node.entry.kind != "dir":
                return next((entry for _, entry in self._files(node)), None)
        return None

    def _add(self, layer: int, entry: FileEntry) -> None:
        parts = _split(entry.name)
        if not parts:
            return
        node = self._root
        for part in parts[:-1]:
            child = node.children.get(part)
            if child is None:
                child = node.children[part] = _Node(node, layer)
            node = child
        name = parts[-1]
        if name == _OPAQUE:
            node.children = {key: one for key, one in node.children.items() if one.layer == layer}
        elif name.startswith(_WHITEOUT):
            hidden = node.children.get(name.removeprefix(_WHITEOUT))
            if hidden is not None and hidden.layer != layer:
                del node.children[name.removeprefix(_WHITEOUT)]
        else:
            new = _Node(node, layer, entry)
            old = node.children.get(name)
            if old is not None and entry.kind == "dir" and (old.entry is None or old.entry.kind == "dir"):
                new.children = old.children
                for child in new.children.values():
                    child.parent = new
            node.children[name] = new

    def _match(self, node: _Node, parts: list[bytes]) -> Iterator[_Node]:
        """Yield the nodes below `node` that the parts of a pattern name, links followed."""
        if not parts:
            yield node
            return
        part, rest = parts[0], parts[1:]
        if part == b"**":
            yield from self._match(node, rest)
            for child in node.children.values():
                # A link would lead to what is found elsewhere, or into a loop.
                if child.entry is None or child.entry.kind == "dir":
                    yield from self._match(child, parts)
            return
        if part == b"..":
            yield from self._match(node.parent, rest)
            return
        if part in node.children or _GLOB.search(part) is None:
            named = [node.children[part]] if part in node.children else []
        else:
            matches = re.compile(translate(part.decode("latin-1"))).match
            named = [one for name, one in node.children.items() if matches(name.decode("latin-1"))]
        for child in named:
            target = self._follow(child)
            if target is not None:
                yield from self._match(target, rest)

    def _follow(self, node: _Node) -> _Node | None:
        """Return what a symbolic link leads to, anything else as it is; None for a link to nowhere."""
        return self._resolve(node, [_MAX_LINKS])

    def _resolve(self, node: _Node, budget: list[int]) -> _Node | None:
        while node.entry is not None and node.entry.kind == "symlink":
            budget[0] -= 1
            if budget[0] < 0:
                return None
            target = node.entry.linkname
            found: _Node | None = self._root if target.startswith(b"/") else node.parent
            for part in (one for one in target.split(b"/") if one not in {b"", b"."}):
                if found is None:
                    return None
                child = found.parent if part == b".." else found.children.get(part)
                found = None if child is None else self._resolve(child, budget)
            if found is None:
                return None
            node = found
        return node

    def _files(self, node: _Node) -> Iterator[tuple[int, FileEntry]]:
        """Yield the regular files that `node` is or holds; a hard link is the file it was made from."""
        pending = [node]
        while pending:
            one = pending.pop()
            pending.extend(one.children.values())
            for _ in range(_MAX_LINKS):
                if one.entry is None or one.entry.kind != "hardlink":
                    break
                found = self._root
                for part in _split(one.entry.linkname):
                    found = found.children.get(part, self._root)
                one = found
            if one.entry is not None and one.entry.kind == "reg":
                yield one.layer, one.entry


def _split(path: bytes) -> list[bytes]:
    """Return the parts of a path as layers mean it: from the root, which `..` does not leave."""
    parts: list[bytes] = []
    for part in path.split(b"/"):
        if part == b"..":
            del parts[-1:]
        elif part not in {b"", b"."}:
            parts.append(part)
    return parts
