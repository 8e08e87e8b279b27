"""A tar unpacked into a real directory by containerd's rules, with system calls alone: the oracle for trees.

It shares no line with `snapshotter.layer`: paths are resolved against the disk, and what Linux makes of modes, owners,
links and extended attributes is left to Linux. Needs root, and a file system with extended attributes.

Concurrency: plain functions.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import stat
import tarfile
from collections.abc import Iterator

_MAX_TIME_NS = (1 << 63) - 1
_KEEP = 0xFFFFFFFF
_FORMATS = {
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
}


class Refused(Exception):
    """containerd would answer with an error; `entry` is the number of the entry it is about, -1 for none."""

    def __init__(self, reason: str, entry: int = -1) -> None:
        super().__init__(reason)
        self.entry = entry


def unpack(data: bytes, root: bytes, *, base: bool) -> None:
    """Apply the tar `data` to the directory `root`. Raises Refused.

    `base` chooses how whiteouts are treated: removing (a plain directory), or made for an overlay.
    """
    unpacking = _Unpacking(root, base=base)
    try:
        unpacking.run(data)
    except (OSError, ValueError, Refused) as error:  # ValueError: a NUL in a path
        raise Refused(str(error), unpacking.entry) from error


class _Unpacking:
    def __init__(self, root: bytes, *, base: bool) -> None:
        self.root = root
        self.base = base
        self.entry = -1
        self.unpacked: set[bytes] = set()
        self.directories: list[tuple[bytes, int]] = []

    def run(self, data: bytes) -> None:
        with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8", errors="surrogateescape") as archive:
            for self.entry, member in enumerate(archive):
                self._apply(archive, member)
        self.entry = -1
        for name, mtime_ns in self.directories:
            os.utime(root_path(self.root, name), ns=(mtime_ns, mtime_ns), follow_symlinks=False)

    def _apply(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        name = clean(_raw(member.name))
        head, base = split(name)
        parent = root_path(self.root, head)
        path = join(parent, join(b"/", base))
        if path == self.root:
            return
        if parent != self.root:
            self._make_parent(parent)
        if base.startswith(b".wh."):
            self._whiteout(member, parent, base)
            return
        present = _lstat(path)
        if present is not None and not (stat.S_ISDIR(present.st_mode) and member.isdir()):
            _remove(path)
            present = None
        self._create(archive, member, path, exists=present is not None)
        if member.isdir():
            self.directories.append((name, _mtime_ns(member)))
        self.unpacked.add(path)

    def _create(
        self, archive: tarfile.TarFile, member: tarfile.TarInfo, path: bytes, *, exists: bool
    ) -> None:
        if member.isdir():
            if not exists:
                os.mkdir(path)
        elif member.isreg():
            source = archive.extractfile(member)
            assert source is not None
            with open(path, "xb") as target:
                target.write(source.read())
        elif member.issym():
            os.symlink(_raw(member.linkname), path)
        elif member.islnk():
            self._link(_raw(member.linkname), path)
        else:
            device = _device(member.devmajor, member.devminor)
            os.mknod(path, _FORMATS[member.type] | member.mode & 0o7777, device)
        _chown(path, member)
        self._set_xattrs(member, path)
        if not stat.S_ISLNK(os.lstat(path).st_mode):
            os.chmod(path, member.mode & 0o7777)
        os.utime(path, ns=(_mtime_ns(member), _mtime_ns(member)), follow_symlinks=False)

    def _link(self, linkname: bytes, path: bytes) -> None:
        head, base = split(linkname)
        target = join(root_path(self.root, head), base)
        if not target.startswith(self.root):
            target = self.root
        os.link(target, path, follow_symlinks=False)

    def _set_xattrs(self, member: tarfile.TarInfo, path: bytes) -> None:
        for key, value in member.pax_headers.items():
            name = _raw(key).removeprefix(b"SCHILY.xattr.")
            if not key.startswith("SCHILY.xattr.") or name.startswith(b"trusted."):
                continue
            try:
                os.setxattr(path, name, _raw(value), follow_symlinks=False)
            except OSError as error:
                mode = os.lstat(path).st_mode
                ordinary = stat.S_ISREG(mode) or stat.S_ISDIR(mode)
                if error.errno == errno.EPERM and name.startswith(b"user.") and not ordinary:
                    continue
                if error.errno != errno.ENOTSUP:
                    raise

    def _whiteout(self, member: tarfile.TarInfo, parent: bytes, base: bytes) -> None:
        if base == b".wh..wh..opq":
            if self.base:
                self._clear(parent)
            else:
                os.setxattr(parent, "trusted.overlay.opaque", b"y")
            return
        hidden = base.removeprefix(b".wh.")
        if hidden in (b"", b".", b".."):
            raise Refused("whiteout of nothing")
        path = parent + b"/" + hidden
        if self.base:
            if _lstat(path) is not None:
                _remove(path)
            return
        os.mknod(path, stat.S_IFCHR, 0)
        _chown(path, member)

    def _clear(self, directory: bytes) -> None:
        for name in os.listdir(directory):
            path = directory + b"/" + name
            if path not in self.unpacked:
                _remove(path)
            elif stat.S_ISDIR(os.lstat(path).st_mode):
                self._clear(path)

    def _make_parent(self, path: bytes) -> None:
        present = _lstat(path)
        if present is not None:
            if not stat.S_ISDIR(present.st_mode):
                raise Refused("parent is not a directory")
            return
        above = os.path.dirname(path)
        if above != self.root:
            self._make_parent(above)
        os.mkdir(path)
        os.chmod(path, 0o755)


def root_path(root: bytes, path: bytes) -> bytes:
    """Return where `path` leads below `root`, every link bounded by it (continuity's RootPath)."""
    if not path:
        return root
    links = [0]
    while True:
        before = links[0]
        path = _walk_links(root, path, links)
        if links[0] == before:
            rooted = join(b"/", path)
            if rooted == path:
                return join(root, rooted)
            path = rooted


def _walk_links(root: bytes, path: bytes, links: list[int]) -> bytes:
    head, last = split(path)
    if not head:
        return _walk_link(root, last, links)[0]
    if not last:
        return head if head == b"/" else _walk_links(root, head[:-1], links)
    above = _walk_links(root, head, links)
    found, is_link = _walk_link(root, join(above, last), links)
    return join(above, found) if is_link and not found.startswith(b"/") else found


def _walk_link(root: bytes, path: bytes, links: list[int]) -> tuple[bytes, bool]:
    if links[0] > 255:
        raise Refused("too many links")
    path = join(b"/", path)
    if path == b"/":
        return path, False
    found = _lstat(join(root, path))
    if found is None or not stat.S_ISLNK(found.st_mode):
        return path, False
    links[0] += 1
    return os.readlink(join(root, path)), True


def split(path: bytes) -> tuple[bytes, bytes]:
    """Return (everything up to and with the last slash, the rest)."""
    head, slash, last = path.rpartition(b"/")
    return head + slash, last


def join(*parts: bytes) -> bytes:
    """Return the parts as one clean path; empty ones do not count."""
    return clean(b"/".join(part for part in parts if part))


def clean(path: bytes) -> bytes:
    """Return the shortest path that means the same lexically."""
    text = os.path.normpath(path)
    return text[1:] if text.startswith(b"//") else text


def _lstat(path: bytes) -> os.stat_result | None:
    """Return lstat(2), None for ENOENT; other errors raise."""
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def _remove(path: bytes) -> None:
    if stat.S_ISDIR(os.lstat(path).st_mode):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def _chown(path: bytes, member: tarfile.TarInfo) -> None:
    uid, gid = (-1 if number == _KEEP else number for number in (member.uid, member.gid))
    os.lchown(path, uid, gid)


def _device(major: int, minor: int) -> int:
    if not (0 <= major <= 0xFFFFFFFF and 0 <= minor <= 0xFFFFFFFF):
        raise Refused("device number out of range")
    return os.makedev(major & 0xFFF, minor & 0xFFFFF)


def _mtime_ns(member: tarfile.TarInfo) -> int:
    whole, _, fraction = member.pax_headers.get("mtime", str(int(member.mtime))).partition(".")
    mtime_ns = int(whole) * 10**9 + int(fraction.ljust(9, "0")[:9])
    return mtime_ns if 0 <= mtime_ns <= _MAX_TIME_NS else 0


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def paths(root: bytes) -> Iterator[bytes]:
    """Yield every path below `root`, relative to it, `b""` for the root itself, names sorted."""
    stack = [b""]
    while stack:
        name = stack.pop()
        yield name
        path = os.path.join(root, name)
        if stat.S_ISDIR(os.lstat(path).st_mode):
            stack += [os.path.join(name, child) for child in sorted(os.listdir(path), reverse=True)]
