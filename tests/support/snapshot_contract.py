"""What the checks of the snapshots contract share: the snapshotter they call, and what they do with it often.

A check takes a fresh snapshotter and an empty directory to play in, and raises AssertionError for a broken
promise. It knows nothing of how the snapshotter is reached. `check` collects them in `CHECKS`, by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from snapshotter.snapshot.model import Info, Mount, Usage
from tests.support.snapshot_mounts import mounted
from tests.support.tree_steps import Step, contents

GC_ROOT = {"containerd.io/gc.root": "contract"}


class AnySnapshotter(Protocol):
    """What the checks call."""

    def prepare(self, key: str, parent: str = ..., labels: Mapping[str, str] = ...) -> tuple[Mount, ...]: ...
    def view(self, key: str, parent: str = ..., labels: Mapping[str, str] = ...) -> tuple[Mount, ...]: ...
    def mounts(self, key: str) -> tuple[Mount, ...]: ...
    def commit(self, name: str, key: str, labels: Mapping[str, str] = ..., parent: str = ...) -> None: ...
    def remove(self, key: str) -> None: ...
    def stat(self, key: str) -> Info: ...
    def update(self, key: str, labels: Mapping[str, str], paths: Sequence[str] = ...) -> Info: ...
    def walk(self, filters: Sequence[str] = ...) -> Iterator[Info]: ...
    def usage(self, key: str) -> Usage: ...
    def cleanup(self) -> None: ...
    def close(self) -> None: ...


Check = Callable[[AnySnapshotter, Path], None]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    """Collect a check."""
    CHECKS[function.__name__] = function
    return function


def commit_layer(sn: AnySnapshotter, work: Path, name: str, parent: str, change: Step) -> None:
    """Commit `name`: what `change` does to a mount on top of `parent`."""
    with mounted(sn.prepare(f"{name}-active", parent, GC_ROOT), work / f"{name}-active") as top:
        change(top)
    sn.commit(name, f"{name}-active", GC_ROOT)


def check_chain(sn: AnySnapshotter, work: Path, *changes: Step) -> None:
    """Commit a chain of layers; a view of each must look as if its changes had been made in one directory."""
    flat = work / "flat"
    flat.mkdir()
    parent = ""
    for number, change in enumerate(changes):
        name = f"layer-{number}"
        commit_layer(sn, work, name, parent, change)
        change(flat)
        with mounted(sn.view(f"{name}-view", name), work / f"{name}-view") as top:
            assert contents(top) == contents(flat)
        sn.remove(f"{name}-view")
        parent = name


def empty_committed(sn: AnySnapshotter, name: str, parent: str = "") -> None:
    """Commit `name`, without files of its own."""
    sn.prepare(f"{name}-active", parent, GC_ROOT)
    sn.commit(name, f"{name}-active", GC_ROOT)


def names(found: Iterator[Info]) -> list[str]:
    """Return the names of a walk, sorted."""
    return sorted(info.name for info in found)
