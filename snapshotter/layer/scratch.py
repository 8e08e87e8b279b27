"""An upper directory in memory: inodes, names, and paths resolved as containerd and the kernel resolve them.

containerd unpacks a layer into a real directory. It resolves the parent of every entry itself, link by link,
bounded by that directory (continuity's `fs.RootPath`), and leaves the rest to the kernel. Where the two
disagree (a link to a link is joined lexically before the kernel follows it) the outcome is observable, so both
are imitated: `resolve` is the former, `find` is lstat(2).

One thing is not: where lstat(2) would be led out of the directory by an absolute link or by `..`, containerd sees
the host's files. Here there is nothing.

What containerd would refuse raises UnsupportedLayer with the reason; the caller adds the entry.

Concurrency: one owner, no I/O. It does not know tar entries; `layer/apply.py` does.
"""

from __future__ import annotations

from typing import Final

from snapshotter.errors import UnsupportedLayer

MAX_NAME: Final = 255  # NAME_MAX
MAX_PATH: Final = 4095  # PATH_MAX without its NUL
_MAX_LINKS: Final = 255  # containerd's limit: the walk after the 256th link fails
_MAX_KERNEL_LINKS: Final = 40  # MAXSYMLINKS

_STEPS: Final = 5_000_000
"""Path components that following links may cost a layer, at 1 us each. An entry below one link costs about 30,
so 150,000 such entries pass; what a hostile layer could demand (255 links of 2,000 names for every entry) does not."""


class Inode:
    """One file of any kind; `children` is a dict for directories alone.

    `entry` is the index of the tar entry that holds the data, -1 when there is none; `links` is counted at the
    end by whoever walks the whole tree.
    """

    __slots__ = (
        "children",
        "entry",
        "gid",
        "links",
        "mode",
        "mtime_ns",
        "number",
        "rdev",
        "size",
        "target",
        "uid",
        "xattrs",
    )

    def __init__(self, number: int, mode: int, *, gid: int, entry: int = -1) -> None:
        self.number = number
        self.mode = mode
        self.uid = 0
        self.gid = gid
        self.rdev = 0
        self.size = 0
        self.mtime_ns = 0
        self.entry = entry
        self.links = 0
        self.target = b""
        self.children: dict[bytes, Inode] | None = {} if mode >> 12 == 0o4 else None
        self.xattrs: dict[bytes, bytes] | None = None

    @property
    def is_link(self) -> bool:
        """Whether this is a symbolic link."""
        return bool(self.target)


class Scratch:
    """The directory itself: `root` and what hangs below it."""

    def __init__(self, root: Inode, *, steps: int = _STEPS) -> None:
        self.root = root
        self._steps_left = steps

    def spend(self, steps: int) -> None:
        """Pay for work that a hostile layer could demand without end. Raises UnsupportedLayer when all is spent."""
        self._steps_left -= steps
        if self._steps_left < 0:
            raise UnsupportedLayer("too many links and markers to follow")

    def find(self, path: bytes) -> Inode | None:
        """Return what lstat(2) finds at the absolute and clean `path`; None for ENOENT.

        Raises UnsupportedLayer for ENOTDIR, ELOOP and ENAMETOOLONG.
        """
        if path == b"/":
            return self.root
        if len(path) > MAX_PATH:
            raise UnsupportedLayer("path too long")
        node = self.root
        for part in path[1:].split(b"/"):
            if node.children is None:
                return self._find_through_links(path)
            child = node.children.get(part)
            if child is None:
                _refuse_long_name(part)
                return None
            node = child
        return node

    def resolve(self, path: bytes) -> bytes:
        """Return `path` absolute and clean, without links on it, bounded by the root.

        What does not exist is taken as it is. Raises UnsupportedLayer for more than 255 links and for the
        errors of `find`.
        """
        straight = self._resolve_straight(path)
        if straight is not None:
            return straight
        links = 0
        while True:
            before = links
            path, links = self._walk(path, links)
            if links == before:
                return path

    def _resolve_straight(self, path: bytes) -> bytes | None:
        """Return the resolved path if no link and no dot is on it, else None: the ordinary case, in one go."""
        parts = [part for part in path.split(b"/") if part]
        node = self.root
        for part in parts:
            if part in (b".", b".."):
                return None
            if node.children is None:
                if node.is_link:
                    return None
                raise UnsupportedLayer("a part of the path is not a directory")
            child = node.children.get(part)
            if child is None:
                _refuse_long_name(part)
                if b"." in parts or b".." in parts:
                    return None
                break
            node = child
        return None if node.is_link else b"/" + b"/".join(parts)

    def _walk(self, path: bytes, links: int) -> tuple[bytes, int]:
        """Go once over `path`, replacing every link on the way by its target; return (new path, links so far).

        A target stands as it is when the link is the last part or absolute; the rest is joined lexically.
        """
        parts = [part for part in path.split(b"/") if part]
        current = b"/" if path.startswith(b"/") else b""
        for part in parts:
            if links > _MAX_LINKS:
                raise UnsupportedLayer("too many links")
            here = current
            current = clean(b"/" + here + b"/" + part)
            self.spend(1 + current.count(b"/"))
            node = self.find(current)
            if node is not None and node.is_link:
                links += 1
                if here and not node.target.startswith(b"/"):
                    current = clean(here + b"/" + node.target)
                else:
                    current = node.target
        return current or b"/", links

    def _find_through_links(self, path: bytes) -> Inode | None:
        """lstat(2) of a path with links in its middle."""
        todo = path.split(b"/")
        todo.reverse()
        above = [self.root]
        followed = 0
        while todo:
            self.spend(1)
            part = todo.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":
                if len(above) == 1:
                    return None  # out of the root, see the module docstring
                above.pop()
                continue
            _refuse_long_name(part)
            child = (above[-1].children or {}).get(part)
            if child is None or not todo:
                return child
            if child.children is not None:
                above.append(child)
                continue
            if not child.is_link:
                raise UnsupportedLayer("a part of the path is not a directory")
            followed += 1
            if followed > _MAX_KERNEL_LINKS:
                raise UnsupportedLayer("too many links")
            if child.target.startswith(b"/"):
                return None  # out of the root
            todo.extend(reversed(child.target.split(b"/")))
        return None


def clean(path: bytes) -> bytes:
    """Return the shortest path that means the same lexically (Go's filepath.Clean); `b"."` when nothing is left."""
    if path[:2] == b"./" and path[2:3] not in (b"", b"/"):
        path = path[2:]  # as most tars have it
    if path and path[0] != 46 and b"//" not in path and b"/." not in path and path[-1] != 47:
        return path  # most are; the check costs a third of taking it apart
    parts = path.split(b"/")
    rooted = path.startswith(b"/")
    kept: list[bytes] = []
    for part in parts:
        if part in (b"", b"."):
            continue
        if part != b"..":
            kept.append(part)
        elif kept and kept[-1] != b"..":
            kept.pop()
        elif not rooted:
            kept.append(part)
    body = b"/".join(kept)
    return b"/" + body if rooted else body or b"."


def _refuse_long_name(name: bytes) -> None:
    if len(name) > MAX_NAME:
        raise UnsupportedLayer(f"a name of {len(name)} bytes")
