"""Mounts as a snapshotter returns them, made and unmade: what containerd's client does with them.

A long `lowerdir` does not fit into the one page that mount(2) takes, so an overlay is mounted from inside the
directory that all its layers share, with relative paths, as containerd does. The thread that changes there has
a working directory of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from snapshotter.snapshot.model import Mount
from tests.support import host

_MS_RDONLY = 1
_MS_REMOUNT = 32
_MS_BIND = 4096
_MS_REC = 16384
_CLONE_FS = 0x200
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def mounted(mounts: Sequence[Mount], target: Path) -> Iterator[Path]:
    """Make `target` if need be, and have the mounts there as long as the block runs. Raises OSError."""
    target.mkdir(parents=True, exist_ok=True)
    for entry in mounts:
        if entry.type == "bind":
            bind(entry.source, target, read_only="ro" in entry.options)
        else:
            _mount_overlay(entry, target)
    try:
        yield target
    finally:
        for _ in mounts:
            host.detach(target)


def bind(source: str, target: Path, *, read_only: bool) -> None:
    """Bind `source` and what is mounted below it to `target`. Raises OSError."""
    mount(source, target, "", _MS_BIND | _MS_REC, "")
    if read_only:
        mount("", target, "", _MS_BIND | _MS_REMOUNT | _MS_RDONLY, "")


def _mount_overlay(entry: Mount, target: Path) -> None:
    lower = next(option for option in entry.options if option.startswith("lowerdir="))
    paths = lower.removeprefix("lowerdir=").split(":")
    common = os.path.commonpath(paths)
    short = "lowerdir=" + ":".join(os.path.relpath(path, common) for path in paths)
    options = ",".join([*(option for option in entry.options if option != lower), short])
    failures: list[OSError] = []

    def mount_from_inside() -> None:
        try:
            _libc.unshare(_CLONE_FS)
            os.chdir(common)
            mount(entry.source, target, entry.type, 0, options)
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=mount_from_inside)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def mount(source: str, target: Path, fstype: str, flags: int, options: str) -> None:
    """Call mount(2). Raises OSError, which names the options."""
    result = _libc.mount(source.encode(), os.fsencode(target), fstype.encode(), flags, options.encode())
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"mount: {os.strerror(number)} ({options})", str(target))
