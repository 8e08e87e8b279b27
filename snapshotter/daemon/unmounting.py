"""`soci-snapshotter-grpc unmount --all`: takes every lazy mount of a root away, while its daemon is stopped.

For the day on which a host goes back to another snapshotter, or is to be shut down by hand. Stopping the daemon keeps
mounts, on purpose; this is the other thing. Snapshots and cache stay on disk: a daemon that is started again
mounts them as after a reboot.

Containers that run from lazy layers would read errors from then on, so they are named and nothing is done, unless
forced.

Concurrency: a plain program; it holds the root's lock, so no daemon can start meanwhile.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from snapshotter.daemon import generation
from snapshotter.errors import UsageError
from snapshotter.fuse import mounting
from snapshotter.fuse.holding import HolderClient
from snapshotter.snapshot.lock import RootLock


def unmount_all(root: Path, holder_socket: Path, *, force: bool = False) -> int:
    """Return how many mounts were taken away.

    Raises ConfigError when the daemon runs, UsageError when containers use the mounts and `force` is not given,
    ProcessFailed when the holder does not answer, OSError.
    """
    if not root.is_dir():
        return 0
    with RootLock(root):
        lock = generation.begin(root / "generation")  # servers of a daemon that has just been stopped
        try:
            # containerd was told the root's name; the kernel knows where that leads.
            if not force and (users := overlays_on(root) or overlays_on(root.resolve())):
                raise UsageError(
                    f"containers read from lazy layers ({len(users)}, one of them at {users[0]}): stop the "
                    "containers first, or use --force, after which they read errors"
                )
            _let_go(holder_socket)
            return _detach(root.resolve())
        finally:
            os.close(lock)


def overlays_on(root: Path) -> list[str]:
    """Return where overlays built on the snapshots of `root` are mounted, in any mount namespace of the host.

    One that is seen in several has the name of the first, ours before all others.
    """
    needle = f"{root}/".encode()
    namespaces: set[str] = set()
    found: dict[bytes, str] = {}
    for process in ["self", *filter(str.isdigit, os.listdir("/proc"))]:
        with suppress(OSError):  # it has just ended
            namespace = os.readlink(f"/proc/{process}/ns/mnt")
            if namespace not in namespaces:
                namespaces.add(namespace)
                found = _overlays(f"/proc/{process}/mountinfo", needle) | found
    return sorted(found.values())


def _overlays(mountinfo: str, needle: bytes) -> dict[bytes, str]:
    """Return the overlays with `needle` in their options: device to mount point."""
    found = {}
    with open(mountinfo, "rb") as lines:
        for line in lines:
            place, _, kind = line.partition(b" - ")
            if kind.startswith(b"overlay ") and needle in kind:
                _, _, device, _, target, *_ = place.split()
                found[device] = os.fsdecode(target)
    return found


def _let_go(holder_socket: Path) -> None:
    """Have the holder close what it kept. With its last descriptor a connection ends, and nobody waits for it."""
    holder = HolderClient(str(holder_socket))
    if not holder.is_running():
        return
    try:
        for name, fd in holder.kept().items():
            os.close(fd)
            holder.drop(name)
    finally:
        holder.close()


def _detach(root: Path) -> int:
    mounts = [info for info in mounting.mounts_below(str(root)) if info.fs_type == mounting.FS_TYPE]
    for info in reversed(mounts):
        mounting.detach(os.fsdecode(info.target))
    return len(mounts)
