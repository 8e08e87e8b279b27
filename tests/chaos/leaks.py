"""What stays behind: `python -m tests.chaos.leaks [--cycles N]` pulls, reads and removes an image N times.

Between the cycles, readers go through an image that stays, so that what a day of reading leaves is seen too. Ends
with one line of JSON: growth of descriptors, memory (private and shared in proportion), processes, mounts and files
between a state early on, when heaps have found their size, and the end, by role where there are roles. The exit code is 1 when something grew.

Concurrency: one thread; the daemon's processes are looked at from outside.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos import reader
from tests.chaos.rig import Pulled, Rig
from tests.support import host
from tests.support.containerd import remove_directory
from tests.support.process import usage, wait_until

ROLES = ("daemon", "holder", "zygote", "fetcher")
RSS_LIMIT = 2 << 20
"""Bytes that all processes together may grow by."""

_SETTLE_S = 60.0

_LOOKS = 5
_BETWEEN_LOOKS_S = 0.05
"""What is only there for a moment (an answer being given, a file being replaced) is not there at every look."""
_READ_TIMEOUT_S = 120.0


@dataclass
class Footprint:
    """What the system occupies while nothing happens."""

    fds: dict[str, int] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    """Bytes, by role: proportional, so that shared pages count once."""
    processes: int = 0
    mounts: int = 0
    files: int = 0


def footprint(rig: Rig) -> Footprint:
    """Return what there is once every server has gone to sleep: of each the least that was seen."""
    looks = [_look(rig)]
    while len(looks) < _LOOKS:
        time.sleep(_BETWEEN_LOOKS_S)
        looks.append(_look(rig))
    roles = looks[0].fds
    return Footprint(
        fds={role: min(look.fds[role] for look in looks) for role in roles},
        memory={role: min(look.memory[role] for look in looks) for role in roles},
        processes=min(look.processes for look in looks),
        mounts=min(look.mounts for look in looks),
        files=min(look.files for look in looks),
    )


def _look(rig: Rig) -> Footprint:
    wait_until(
        lambda: all(mount["state"] == "asleep" for mount in rig.status().get("mounts", [{"state": ""}])),
        timeout=_SETTLE_S,
        what="every layer is asleep",
    )
    pids = {role: pid for role, pid in rig.status()["pids"].items() if role in ROLES}
    return Footprint(
        fds={role: _descriptors(pid) for role, pid in pids.items()},
        memory={role: usage([pid]).pss for role, pid in pids.items()},
        processes=len(rig.daemon.processes()),
        mounts=len(host.mounts_below(rig.daemon.root.parent.parent)),
        files=_files(rig.daemon.root, {entry.target for entry in host.mounts_below(rig.daemon.root)}),
    )


def _descriptors(pid: int) -> int:
    """Count what a process has open, but for connections to registries: how many are kept depends on the moment."""
    with open(f"/proc/{pid}/net/unix", encoding="ascii", errors="replace") as lines:
        local = {f"socket:[{line.split()[6]}]" for line in lines if line[0].isalnum() and "Inode" not in line}
    count = 0
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(OSError):  # closed meanwhile
            name = os.readlink(f"/proc/{pid}/fd/{fd}")
            count += not name.startswith("socket:") or name in local
    return count


def _files(top: Path, mounts: set[Path]) -> int:
    """Count what is below `top`, without a look into a mount."""
    count = 0
    for at, directories, files in os.walk(top):
        directories[:] = [name for name in directories if Path(at, name) not in mounts]
        count += len(directories) + len(files)
    return count


@dataclass
class Growth:
    """The difference of two footprints, and what was done in between."""

    cycles: int
    reads: int
    fds: dict[str, int]
    memory_bytes: int
    memory_by_role: dict[str, int]
    processes: int
    mounts: int
    files: int
    seconds: float

    def to_json(self) -> str:
        """Return the line that ends a run."""
        return json.dumps(self.__dict__)

    @property
    def is_none(self) -> bool:
        """Whether nothing grew, but for a little memory."""
        return not (
            any(n > 0 for n in self.fds.values()) or self.processes or self.mounts or self.files > 0
        ) and (self.memory_bytes < RSS_LIMIT)


class Leaks:
    """Cycles on a rig."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self.reads: Counter[str] = Counter()
        self._image, self._truth = rig.publish(1, layers=1, files=6, largest=40_000)
        steady, truth = rig.publish(2, layers=1, files=20, largest=100_000)
        self._steady = rig.pull(steady, truth)

    def measure(self, cycles: int, *, warm_up: int) -> Growth:
        """Return what grew in `cycles` cycles, `warm_up` others after the start."""
        for _ in range(warm_up):
            self.cycle()
        begin, before = time.monotonic(), footprint(self._rig)
        self.reads.clear()
        for _ in range(cycles):
            self.cycle()
        after = footprint(self._rig)
        memory = {role: after.memory[role] - before.memory[role] for role in before.memory}
        return Growth(
            cycles=cycles,
            reads=sum(self.reads.values()),
            fds={role: after.fds[role] - before.fds[role] for role in before.fds},
            memory_bytes=sum(memory.values()),
            memory_by_role=memory,
            processes=after.processes - before.processes,
            mounts=after.mounts - before.mounts,
            files=after.files - before.files,
            seconds=round(time.monotonic() - begin, 1),
        )

    def cycle(self) -> None:
        """Pull, read and remove an image, and read the one that stays."""
        pulled = self._rig.pull(self._image, self._truth)
        self._read(pulled)
        self._read(self._steady)
        self._rig.release(pulled)

    def close(self) -> None:
        """Remove the image that stays."""
        with suppress(OSError):
            self._rig.remove(self._steady)

    def _read(self, pulled: Pulled) -> None:
        """Read all of it, in a process: a page fault holds the interpreter, and the registry needs ours."""
        seed = str(self.reads.total())
        command = [sys.executable, "-I", "-S", reader.__file__, str(pulled.root), str(pulled.truth), seed, ""]
        result = subprocess.run(command, capture_output=True, text=True, timeout=_READ_TIMEOUT_S, check=False)
        assert result.returncode == 0, result.stderr
        report = json.loads(result.stdout)
        assert not report["errors"], report["errors"]
        assert not report["wrong"], report["wrong"]
        self.reads.update(report["reads"])


def main() -> int:
    """Run the program; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cycles", type=int, default=1000)
    arguments = parser.parse_args()
    workdir = Path(tempfile.mkdtemp(prefix="leaks-"))
    try:
        with Rig(workdir) as rig:
            leaks = Leaks(rig)
            growth = leaks.measure(arguments.cycles, warm_up=max(arguments.cycles // 4, 5))
            leaks.close()
    finally:
        remove_directory(workdir)
    print(growth.to_json())
    return 0 if growth.is_none else 1


if __name__ == "__main__":
    sys.exit(main())
