"""What Prepare, View and Mounts tell the client to mount. Pure: numbers and paths in, values out.

The shapes are containerd's own overlay snapshotter's, because the code that mounts them is containerd's:
a bind mount where one directory is the answer, otherwise one overlay whose lower directories come nearest
parent first. Long `lowerdir` strings are left as they are: the client's mount code changes into their
common directory when they outgrow a page.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from snapshotter.snapshot.model import Kind, Mount


def upper_path(snapshots: Path, snapshot_id: int) -> Path:
    """Return the directory that holds a snapshot's own files."""
    return snapshots / str(snapshot_id) / "fs"


def work_path(snapshots: Path, snapshot_id: int) -> Path:
    """Return overlay's scratch directory of an active snapshot."""
    return snapshots / str(snapshot_id) / "work"


def mounts_of(
    snapshots: Path,
    kind: Kind,
    snapshot_id: int,
    parent_ids: Sequence[int],
    overlay_options: tuple[str, ...] = (),
) -> tuple[Mount, ...]:
    """Return the mounts of an active snapshot or a view.

    `snapshots` is the directory of all snapshots, `parent_ids` are the parents nearest first,
    `overlay_options` are added to overlay mounts only. Raises ValueError for a committed snapshot, which
    has no mounts of its own.
    """
    if kind == Kind.COMMITTED:
        raise ValueError(f"snapshot {snapshot_id} is committed and has no mounts")
    lower = [str(upper_path(snapshots, parent_id)) for parent_id in parent_ids]
    if kind == Kind.ACTIVE and lower:
        options = (
            f"workdir={work_path(snapshots, snapshot_id)}",
            f"upperdir={upper_path(snapshots, snapshot_id)}",
            f"lowerdir={':'.join(lower)}",
            *overlay_options,
        )
        return (Mount("overlay", "overlay", "", options),)
    if len(lower) > 1:
        return (Mount("overlay", "overlay", "", (f"lowerdir={':'.join(lower)}", *overlay_options)),)
    access = "rw" if kind == Kind.ACTIVE else "ro"
    source = lower[0] if lower else str(upper_path(snapshots, snapshot_id))
    return (Mount("bind", source, "", (access, "rbind")),)
