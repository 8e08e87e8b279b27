"""The directories of the snapshots: `<root>/snapshotter/snapshots/<id>/{fs,work}`.

Owns the ids and everything that makes, finds or deletes such a directory. A directory is made before its
row is, and deleted after it, so what a crash leaves behind is a directory without a row. The ids that are
between the two are *claimed*, and `leftovers` passes over them.

`fs` may be the mount of a lazy layer, which no process that serves one may touch. Therefore nothing here
looks at an `fs` it did not make a moment ago, except `delete`, which renames a directory before it opens
it: the kernel refuses to rename a mount point (EBUSY) without asking the file system on it.

Concurrency: any method from any thread.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from snapshotter.snapshot.model import Kind, Owner
from snapshotter.snapshot.mounts import upper_path, work_path

_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def metadata_path(root: Path) -> Path:
    """Return where the snapshot database of a daemon with this root is."""
    return root / "snapshotter" / "metadata.sqlite"


def snapshots_path(root: Path) -> Path:
    """Return the directory that holds the directories of all snapshots."""
    return root / "snapshotter" / "snapshots"


class Directories:
    """The directories below one root. `last_id` is the greatest id that the database ever gave."""

    def __init__(self, root: Path, last_id: int) -> None:
        self.path = snapshots_path(root)
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._claimed: set[int] = set()
        self._last_id = max(last_id, *self._numbers(), 0)

    def upper(self, snapshot_id: int) -> Path:
        """Return the path of a snapshot's own files."""
        return upper_path(self.path, snapshot_id)

    @contextlib.contextmanager
    def claim(self) -> Iterator[int]:
        """Give a new id, whose directory is not a leftover as long as the block runs."""
        with self._lock:
            self._last_id += 1
            snapshot_id = self._last_id
            self._claimed.add(snapshot_id)
        try:
            yield snapshot_id
        finally:
            with self._lock:
                self._claimed.discard(snapshot_id)

    def make(self, snapshot_id: int, kind: Kind, owner: Owner) -> None:
        """Make the directories of a claimed id; an active snapshot also gets a `work`. Raises OSError."""
        os.mkdir(self.path / str(snapshot_id), 0o700)
        upper = self.upper(snapshot_id)
        os.mkdir(upper)
        os.chmod(upper, 0o755)  # noqa: S103 the mode of `/` in a container; mkdir's own is subject to the umask
        os.chown(upper, owner.uid, owner.gid)
        if kind == Kind.ACTIVE:
            work = work_path(self.path, snapshot_id)
            os.mkdir(work)
            os.chmod(work, 0o711)  # noqa: S103 as containerd's own overlay snapshotter has it

    def owner(self, snapshot_id: int) -> Owner:
        """Return who owns the top directory. Never call it for a lazy snapshot. Raises OSError."""
        status = os.stat(self.upper(snapshot_id), follow_symlinks=False)
        return Owner(status.st_uid, status.st_gid)

    def leftovers(self, known_ids: Callable[[], set[int]]) -> list[int]:
        """Return the ids of the directories that have neither a row nor a claim.

        The order of the three questions is what makes this right: a directory that is listed unclaimed
        either got its row before `known_ids` is asked, or never will.
        """
        listed = self._numbers()
        with self._lock:
            claimed = set(self._claimed)
        known = known_ids()
        return sorted(listed - claimed - known)

    def delete(self, snapshot_id: int) -> None:
        """Delete the directory of an id and all below it, if it exists. Raises OSError.

        That fails with EBUSY, and has then harmed nothing below it, where something is still mounted.
        """
        delete_tree(self.path / str(snapshot_id))

    def _numbers(self) -> set[int]:
        """Return the ids that have a directory; any other name in there is not ours."""
        return {int(name) for name in os.listdir(self.path) if name.isascii() and name.isdecimal()}


def delete_tree(path: Path) -> None:
    """Delete a directory and all below it, however deep, if it exists. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        top = os.open(path, _FLAGS)
        try:
            _empty(top)
        finally:
            os.close(top)
        os.rmdir(path)


def _empty(top: int) -> None:
    """Delete everything below the open directory `top`.

    Containers made these trees, so they may be deeper than recursion, PATH_MAX or open files allow: each
    directory is moved up to `top` before it is emptied.
    """
    # The prefix keeps clear of what an earlier, interrupted attempt has moved here.
    prefix = os.urandom(8).hex()
    names = (f"{prefix}-{number}" for number in itertools.count())
    pending = _flatten(top, top, names)
    while pending:
        name = pending.pop()
        fd = os.open(name, _FLAGS, dir_fd=top)
        try:
            pending += _flatten(fd, top, names)
        finally:
            os.close(fd)
        os.rmdir(name, dir_fd=top)


def _flatten(fd: int, top: int, names: Iterator[str]) -> list[str]:
    """Unlink the files of the directory `fd`, move its directories to `top`, and return their names there."""
    moved = []
    with os.scandir(fd) as entries:
        listed = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_directory in listed:
        if is_directory:
            moved.append(next(names))
            os.rename(name, moved[-1], src_dir_fd=fd, dst_dir_fd=top)
        else:
            os.unlink(name, dir_fd=fd)
    return moved
