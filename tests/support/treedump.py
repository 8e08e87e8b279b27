"""Everything about a tree of files that a program in it can see, one line for each path.

It is a library, and a program of its own (`treedump.py DIRECTORY`) that runs inside a container by itself: so it
imports nothing but what `toolbox` carries, and takes an error for an answer like any other: a path that cannot be
read is a line that says so.

A line is a JSON object. `path` is relative to the root; bytes that are not printable ASCII are escaped as by
repr(). `same_as` names the first path of the same inode. The size of a directory is left out: it tells about the
file system below, not about the image. A directory with something else mounted on it is listed as that, and not
entered.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator

_CHUNK = 1 << 20

_TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


def dump(root: bytes) -> Iterator[dict[str, object]]:
    """Yield the description of `root` and everything below, a directory before what it holds, names sorted."""
    device = os.lstat(root).st_dev
    first_of: dict[tuple[int, int], str] = {}
    stack = [b""]
    while stack:
        name = stack.pop()
        entry = _describe(os.path.join(root, name), device, first_of, _text(name) or ".")
        yield entry
        if entry.get("type") == "directory":
            try:
                names = sorted(os.listdir(os.path.join(root, name)), reverse=True)
            except OSError as error:
                yield {"path": entry["path"], "error": f"listdir: {error.strerror}"}
                continue
            stack += [os.path.join(name, child) for child in names]


def lines(root: bytes) -> list[str]:
    """Return `dump` as text, one JSON object for each path."""
    return [json.dumps(entry) for entry in dump(root)]


def comparable(dumped: Iterable[str], *, since_ns: int) -> list[str]:
    """Return dump lines in which a time at or after `since_ns` reads "since".

    Directories that no layer names get the time at which they were made, and the root that at which the runtime
    made its mount points in it: facts about the run, different in each.
    """
    entries = [json.loads(line) for line in dumped]
    for entry in entries:
        if entry.get("mtime_ns", -1) >= since_ns:
            entry["mtime_ns"] = "since"
    return [json.dumps(entry) for entry in entries]


def _describe(
    path: bytes, device: int, first_of: dict[tuple[int, int], str], shown: str
) -> dict[str, object]:
    try:
        info = os.lstat(path)
    except OSError as error:
        return {"path": shown, "error": f"lstat: {error.strerror}"}
    kind = _TYPES[stat.S_IFMT(info.st_mode)]
    if kind == "directory" and info.st_dev != device:
        return {"path": shown, "type": "mountpoint"}
    entry: dict[str, object] = {
        "path": shown,
        "type": kind,
        "mode": oct(info.st_mode & 0o7777),
        "nlink": info.st_nlink,
        "uid": info.st_uid,
        "gid": info.st_gid,
        "mtime_ns": info.st_mtime_ns,
    }
    if kind in ("char", "block"):
        entry["rdev"] = f"{os.major(info.st_rdev)}:{os.minor(info.st_rdev)}"
    if kind != "directory":
        entry["size"] = info.st_size
        if info.st_nlink > 1:
            entry["same_as"] = first_of.setdefault((info.st_dev, info.st_ino), shown)
    if kind == "file":
        entry["sha256"] = _attempt(_content, path)
    if kind == "symlink":
        entry["target"] = _attempt(lambda name: _text(os.readlink(name)), path)
    entry["xattrs"] = _attempt(_xattrs, path)
    return entry


def _attempt(read: Callable[[bytes], object], path: bytes) -> object:
    try:
        return read(path)
    except OSError as error:
        return f"error: {error.strerror}"


def _content(path: bytes) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _xattrs(path: bytes) -> dict[str, str]:
    names = sorted(os.listxattr(path, follow_symlinks=False))
    return {name: _text(os.getxattr(path, name, follow_symlinks=False)) for name in names}


def _text(value: bytes) -> str:
    return repr(value)[2:-1]


if __name__ == "__main__":
    for line in lines(os.fsencode(sys.argv[1])):
        print(line)
