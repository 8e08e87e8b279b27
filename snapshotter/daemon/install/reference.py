"""What a former installation of the reference snapshotter has left: its program, its process, its mounts, its state.

Both use the same socket, root and unit names, so that containerd need not be told of the change; but neither
understands the other's state.

Stateless; nothing below a mount is visited.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from snapshotter.daemon.install.finding import Finding, ok, problem, warning

_PROGRAM = "soci-snapshotter-grpc"
_MOUNT_TYPE = "fuse.rawBridge"
_DATABASE = Path("snapshotter/metadata.db")
_ELF = b"\x7fELF"


def check_reference(root: Path) -> Iterator[Finding]:
    """Gather the facts and judge them."""
    found = [*program(shutil.which(_PROGRAM)), *processes(Path("/proc"))]
    found += mounts(Path("/proc/self/mountinfo").read_text(), root)
    found += state(root)
    yield from found or [ok("reference", "nothing of it is left here")]


def program(path: str | None) -> Iterator[Finding]:
    """Judge the program that a shell would find under our name."""
    if path is not None:
        with suppress(OSError), open(path, "rb") as file:
            if file.read(4) == _ELF:
                yield warning(
                    "reference program",
                    f"{path} is the reference's: a unit or a shell may start it",
                    f"remove its package, or {path}",
                )


def processes(proc: Path) -> Iterator[Finding]:
    """Judge what runs: a program of that name which is not Python's."""
    for entry in proc.iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if os.path.basename(os.readlink(entry / "exe")).split(" ")[0] == _PROGRAM:
                    yield problem(
                        "reference process",
                        f"process {entry.name} is the reference's daemon",
                        "drain the node, then stop it",
                    )


def mounts(mountinfo: str, root: Path) -> Iterator[Finding]:
    """Judge the lazy mounts of the reference below `root`."""
    lines = [line.split(" ") for line in mountinfo.splitlines()]
    count = sum(1 for fields in lines if _MOUNT_TYPE in fields and fields[4].startswith(f"{root}/"))
    if count:
        yield problem(
            "reference mounts",
            f"{count} below {root}",
            "remove the containers and images that use them, or umount them; then move the root away",
        )


def state(root: Path) -> Iterator[Finding]:
    """Judge the reference's database in `root`."""
    if (root / _DATABASE).exists():
        yield problem(
            "reference state",
            f"{root / _DATABASE} is the reference's: containerd would ask us for its snapshots",
            f"remove containers and images that use it, stop both, mv {root} {root}.reference",
        )
