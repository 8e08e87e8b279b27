"""The entries of a layer applied in tar order: what containerd's unpacking would leave in an upper directory.

Two ways, as containerd has two. `base=False` is how it unpacks onto an overlay: a whiteout becomes a character
device 0:0 and an opaque marker an attribute of its directory. `base=True` is how it unpacks the bottom layer,
into a plain directory: whiteouts take away what the same layer has put there before, and leave nothing.

The rules that are easy to get wrong, each observable and each as in containerd's `pkg/archive/tar.go`:

- what resolves to the root itself is ignored, so the root keeps 0755 root:root;
- an existing path is removed first, unless it and the entry are directories: then attributes are set anew,
  extended attributes are added to those there, and the children stay;
- a hard link's own owner, mode, time and attributes are set on the inode that it shares;
- setting an owner drops a file capability that was there before (a kernel rule, seen through hard links);
- a new inode in a set-group-id directory starts with that directory's group;
- the times of directories are set at the end, by path, in tar order: a path that leads elsewhere by then
  changes what it leads to, and one that is gone is an error.

Concurrency: a pure function of its arguments. It does not know the compiled form; `layer/compile.py` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from snapshotter.errors import UnsupportedLayer
from snapshotter.layer.attributes import CAPABILITY, KEEP_OWNER, OPAQUE, bound_time, device_number, settable
from snapshotter.layer.layout import FIRST_ENTRY_INO, ROOT_INO
from snapshotter.layer.scratch import MAX_NAME, MAX_PATH, Inode, Scratch, clean
from snapshotter.ztoc.model import FileEntry, mod_time_ns, xattrs

_WHITEOUT: Final = b".wh."
_OPAQUE_MARKER: Final = b".wh..wh..opq"
_SPECIAL: Final = (b"", b".", b"..")

_FORMAT: Final = {
    "reg": 0o100000,
    "dir": 0o040000,
    "symlink": 0o120000,
    "char": 0o020000,
    "block": 0o060000,
    "fifo": 0o010000,
}
_DIRECTORY_SIZE: Final = 4096
_SET_GROUP_ID: Final = 0o2000

_MAX_INODES: Final = 1 << 22
"""Ten times the largest image seen; at 88 bytes a row it bounds the compiled file to 370 MB."""


@dataclass(frozen=True, slots=True)
class DirAttributes:
    """What an implicit directory takes over from the same path in the parent layers."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    xattrs: tuple[tuple[bytes, bytes], ...] = ()


@dataclass(frozen=True, slots=True)
class Applied:
    """The upper directory: inodes are numbered up to `highest_ino`, implicit ones behind the entries.

    `moments` has the modification time of each entry as it stands there, whatever its inode ends up with.
    """

    root: Inode
    highest_ino: int
    moments: Sequence[int]


def apply_entries(
    entries: Sequence[FileEntry], *, base: bool, inherited: Mapping[bytes, DirAttributes]
) -> Applied:
    """Apply `entries` in order; `inherited` maps paths without leading slash to what parent layers have there.

    Raises UnsupportedLayer, naming the entry, for whatever containerd would refuse to unpack and for what has
    no place in a lazy layer.
    """
    applying = _Applying(entries, base=base, inherited=inherited)
    applying.run()
    return Applied(applying.scratch.root, applying.next_number - 1, applying.moments)


class _Parent(NamedTuple):
    """Where an entry goes: the directory, its children, and its path ending in a slash."""

    directory: Inode
    children: dict[bytes, Inode]
    path: bytes


class _Applying:
    """The state of one application."""

    def __init__(
        self, entries: Sequence[FileEntry], *, base: bool, inherited: Mapping[bytes, DirAttributes]
    ) -> None:
        root = Inode(ROOT_INO, _FORMAT["dir"] | 0o755, gid=0)
        root.size = _DIRECTORY_SIZE
        self.scratch = Scratch(root)
        self.next_number = FIRST_ENTRY_INO + len(entries)
        self._entries = entries
        self._inherited = inherited
        self._base = base
        self._parents: dict[bytes, _Parent] = {}
        """By the raw parent part of a name: those without a link on the way, until a directory is removed."""
        self._directory_times: list[tuple[bytes, int]] = []
        self._unpacked: set[bytes] = set()
        """For `base`: the paths that an opaque marker spares."""
        self._times: dict[str, int] = {}
        self.moments = [0] * len(entries)

    def run(self) -> None:
        """Apply every entry, then set the times of directories."""
        if self.next_number > _MAX_INODES:
            raise UnsupportedLayer(
                f"{len(self._entries)} tar entries; at most {_MAX_INODES} files are served lazily"
            )
        name = b""
        try:
            for index, entry in enumerate(self._entries):
                name = entry.name
                self._apply(index, entry)
            for path, mtime_ns in self._directory_times:
                name = path
                self._set_directory_time(path, mtime_ns)
        except UnsupportedLayer as error:
            raise UnsupportedLayer(f"tar entry {_shorten(name)}: {error}") from error

    def _apply(self, index: int, entry: FileEntry) -> None:
        head, _, name = entry.name.rstrip(b"/").rpartition(b"/")
        if name in _SPECIAL:
            head, _, name = clean(entry.name).rpartition(b"/")
            if name in _SPECIAL:
                return
        parent = self._parents.get(head) or self._enter(head)
        directory, children, path = parent
        if name.startswith(_WHITEOUT):
            self._apply_whiteout(index, entry, parent, name)
            return
        if len(name) > MAX_NAME or len(path) + len(name) > MAX_PATH or b"\0" in name:
            raise UnsupportedLayer("no file can have this name")
        kind = entry.kind
        inode = children.get(name)
        if inode is not None and (kind != "dir" or inode.children is None):
            self._remove(children, name, inode)
            inode = None
        if kind == "hardlink":
            inode = children[name] = self._link_target(entry.linkname)
        elif inode is None:
            inode = children[name] = self._make(index, entry, directory)
        self._set_attributes(index, inode, entry)
        if kind == "dir":
            self._directory_times.append((entry.name, inode.mtime_ns))
        if self._base:
            self._unpacked.add(path + name)

    def _make(self, index: int, entry: FileEntry, directory: Inode) -> Inode:
        """Return a new inode for the entry, as created: owner and mode come afterwards."""
        kind = entry.kind
        mode = _FORMAT.get(kind)
        if mode is None:
            raise UnsupportedLayer(f"entries of kind {kind!r} are not supported")
        gid = directory.gid if directory.mode & _SET_GROUP_ID else 0
        inode = Inode(FIRST_ENTRY_INO + index, mode, gid=gid, entry=index)
        if kind == "reg":
            for key, _ in entry.pax:
                if key.startswith(b"GNU.sparse."):
                    raise UnsupportedLayer("sparse files are not stored as they are read")
            inode.size = entry.size
        elif kind == "dir":
            inode.size = _DIRECTORY_SIZE
        elif kind == "symlink":
            target = entry.linkname
            if not 0 < len(target) <= MAX_PATH or b"\0" in target:
                raise UnsupportedLayer("no symbolic link can have this target")
            inode.target = target
            inode.size = len(target)
            inode.mode |= 0o777
        else:
            number = device_number(entry.devmajor, entry.devminor)
            inode.rdev = 0 if kind == "fifo" else number
        return inode

    def _set_attributes(self, index: int, inode: Inode, entry: FileEntry) -> None:
        """Set owner, extended attributes, mode and time, in that order, as lchown, lsetxattr, chmod and utimes do."""
        _, _, _, _, _, mode, uid, gid, _, _, text, _, _, pax = entry
        self._set_owner(inode, uid, gid)
        if pax and (found := xattrs(entry)):
            for key, value in dict(found).items():
                if settable(key, value, inode.mode):
                    inode.xattrs = inode.xattrs or {}
                    inode.xattrs[key] = value
        if not inode.target:
            inode.mode = inode.mode & 0o170000 | mode & 0o7777
        moment = self._times.get(text)
        if moment is None:
            moment = self._times[text] = mod_time_ns(text)
        self.moments[index] = moment
        inode.mtime_ns = bound_time(moment)

    @staticmethod
    def _set_owner(inode: Inode, uid: int, gid: int) -> None:
        if uid != KEEP_OWNER:
            inode.uid = uid
        if gid != KEEP_OWNER:
            inode.gid = gid
        if inode.xattrs and inode.children is None:
            inode.xattrs.pop(CAPABILITY, None)

    def _link_target(self, linkname: bytes) -> Inode:
        """Return the inode a hard link names. Its parent is resolved, its last part is not followed."""
        if b"\0" in linkname:
            raise UnsupportedLayer("no hard link can have this target")
        head, slash, name = linkname.rpartition(b"/")
        target = self.scratch.find(clean(self.scratch.resolve(head + slash) + b"/" + name))
        if target is None:
            raise UnsupportedLayer(f"hard link to {_shorten(linkname)}, which is not in this layer")
        if target.children is not None:
            raise UnsupportedLayer(f"hard link to the directory {_shorten(linkname)}")
        return target

    def _apply_whiteout(self, index: int, entry: FileEntry, parent: _Parent, name: bytes) -> None:
        directory, children, path = parent
        if name == _OPAQUE_MARKER:
            if self._base:
                self._clear(directory, path)
            else:
                directory.xattrs = directory.xattrs or {}
                directory.xattrs[OPAQUE] = b"y"
            return
        hidden = name[len(_WHITEOUT) :]
        if (
            hidden in _SPECIAL
            or len(hidden) > MAX_NAME
            or len(path) + len(hidden) > MAX_PATH
            or b"\0" in name
        ):
            raise UnsupportedLayer("whiteout of an impossible name")
        present = children.get(hidden)
        if self._base:
            if present is not None:
                self._remove(children, hidden, present)
            return
        if present is not None:
            raise UnsupportedLayer("whiteout of a name that this layer has")
        inode = Inode(FIRST_ENTRY_INO + index, _FORMAT["char"], gid=_initial_gid(directory), entry=index)
        self._set_owner(inode, entry.uid, entry.gid)
        children[hidden] = inode

    def _clear(self, directory: Inode, path: bytes) -> None:
        """Remove what an opaque marker of a base layer removes: all below that no entry put at its path.

        A directory that was only implied goes with everything in it, unpacked or not, as in containerd.
        """
        todo = [(directory, path)]
        while todo:
            above, prefix = todo.pop()
            children = _children(above)
            self.scratch.spend(1 + len(children))
            for name, inode in list(children.items()):
                if prefix + name not in self._unpacked:
                    self._remove(children, name, inode)
                elif inode.children is not None:
                    todo.append((inode, prefix + name + b"/"))

    def _remove(self, children: dict[bytes, Inode], name: bytes, inode: Inode) -> None:
        del children[name]
        if inode.children is not None:
            self._parents.clear()

    def _enter(self, head: bytes) -> _Parent:
        """Return the directory that `head` means, making what is missing."""
        above, _, name = head.rpartition(b"/")
        known = self._parents.get(above)
        if known is not None and name not in _SPECIAL:
            directory = known.children.get(name)
            if directory is not None and directory.children is not None:
                found = self._parents[head] = _Parent(directory, directory.children, known.path + name + b"/")
                return found
        if b"\0" in head:
            raise UnsupportedLayer("no file can have this name")
        cleaned = clean(head)
        if cleaned == b".":
            cleaned = b""
        resolved = self.scratch.resolve(cleaned)
        directory = self._make_directories(resolved)
        path = resolved if resolved == b"/" else resolved + b"/"
        found = _Parent(directory, _children(directory), path)
        if resolved.lstrip(b"/") == cleaned.lstrip(b"/"):
            # Otherwise links (or dots) are on the way, whose meaning may change with every new entry.
            self._parents[head] = found
        return found

    def _make_directories(self, path: bytes) -> Inode:
        node = self.scratch.root
        at = 0
        while at < len(path) - 1:
            end = path.find(b"/", at + 1)
            end = len(path) if end < 0 else end
            name = path[at + 1 : end]
            children = _children(node)
            child = children.get(name)
            if child is None:
                child = children[name] = self._make_implicit(node, name, path[:end])
            node, at = child, end
        return node

    def _make_implicit(self, parent: Inode, name: bytes, path: bytes) -> Inode:
        if len(name) > MAX_NAME or len(path) > MAX_PATH:
            raise UnsupportedLayer("no directory can have this name")
        if self.next_number > _MAX_INODES:
            raise UnsupportedLayer(f"more than {_MAX_INODES} files and directories")
        inode = Inode(self.next_number, _FORMAT["dir"] | 0o755, gid=_initial_gid(parent))
        inode.size = _DIRECTORY_SIZE
        self.next_number += 1
        attributes = self._inherited.get(path[1:])
        if attributes is not None:
            inode.mode = _FORMAT["dir"] | attributes.mode & 0o7777
            inode.uid, inode.gid, inode.mtime_ns = attributes.uid, attributes.gid, attributes.mtime_ns
            inode.xattrs = {key: value for key, value in attributes.xattrs if not key.startswith(b"trusted.")}
        return inode

    def _set_directory_time(self, name: bytes, mtime_ns: int) -> None:
        inode = self._directory_entered(name) or self.scratch.find(self.scratch.resolve(clean(name)))
        if inode is None:
            raise UnsupportedLayer("the directory is gone at the end of the layer")
        inode.mtime_ns = mtime_ns

    def _directory_entered(self, name: bytes) -> Inode | None:
        """Return the directory called `name` if it is one below another that is known; a shortcut."""
        head, _, name = name.rstrip(b"/").rpartition(b"/")
        known = self._parents.get(head)
        inode = known.children.get(name) if known is not None and name not in _SPECIAL else None
        return inode if inode is not None and inode.children is not None else None


def _children(directory: Inode) -> dict[bytes, Inode]:
    """Return the children of what must be a directory. Raises UnsupportedLayer when it is none."""
    if directory.children is None:
        raise UnsupportedLayer("its parent is not a directory")
    return directory.children


def _initial_gid(directory: Inode) -> int:
    return directory.gid if directory.mode & _SET_GROUP_ID else 0


def _shorten(name: bytes) -> str:
    text = repr(name)[1:]
    return text if len(text) <= 200 else text[:200] + "…'"
