"""Lazy mounts by themselves: what listing and reading many files takes, how soon a sleeping layer answers, and memory.

All of it on the largest layer, by number of files, of the large image, on loopback. Files are looked at by programs of
their own, because whoever holds a mount's descriptor must not. The reference's mount of the same layer takes turns with
ours, and medians are compared.

Concurrency: one thread.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from bench.contenders import Contender, Ours, Reference
from bench.figures import Figure
from bench.goals import goal
from bench.site import Site
from snapshotter.rest import QUIET_SECONDS
from tests.support import host
from tests.support.process import usage, wait_until

IDLE_SECONDS = 10
"""After which servers end here: long enough for all to be awake at once, and shorter than the minute that is usual."""

WAKES = 5
ROUNDS = 3
FILES = 10_000

_LOOK = """\
import os, sys, time
started = time.monotonic()
try:
    os.lstat(sys.argv[1])
except FileNotFoundError:
    print(time.monotonic() - started)
"""


class Sleepy(Ours):
    """Ours, with servers that end soon."""

    config: ClassVar[Mapping[str, object]] = {"fuse": {"idle_timeout_sec": IDLE_SECONDS}}


def figures(site: Site, reference: str) -> Iterator[Figure]:
    """Yield the figures of the image `reference`. Raises AssertionError."""
    ours = Sleepy(site)
    theirs = Reference(site) if Reference.available() else None
    try:
        ours.pull(reference)
        ours.run(reference)
        ours.wait_complete()
        largest = _largest(ours)
        places = {"ours": largest}
        if theirs is not None:
            theirs.pull(reference)
            places["reference"] = _largest(theirs)
        times = by_turns(site.directory, places)
        if theirs is not None:
            theirs.close()
        for name, seconds in times["ours"].items():
            target = goal(name)
            if theirs is not None:
                other = times["reference"][name]
                detail = {"ours_s": round(seconds, 3), "reference_s": round(other, 3)}
                yield target.figure(seconds / other, **detail)
            else:
                yield target.figure(None, reason="the reference is not on this machine")
        yield from _memory(ours, largest)
        yield _wake(ours, largest)
    finally:
        ours.close()
        if theirs is not None:
            theirs.close()


def _largest(contender: Contender) -> Path:
    """Return the lazy mount with the most files. Mounts are found in mountinfo, and walked by another program."""
    mounts = [
        entry.target
        for entry in host.mounts_below(contender.site.directory.resolve())
        if entry.fstype.startswith("fuse") and contender.directory in str(entry.target)
    ]
    assert mounts, f"{contender.name} has mounted nothing"
    return max(mounts, key=lambda mount: shell(f"find {mount} | wc -l")[1])


def by_turns(
    directory: Path, mounts: Mapping[str, Path], rounds: int = ROUNDS
) -> dict[str, dict[str, float]]:
    """Return the median seconds of `find` and of `tar` on each of the mounts, by the name of their goals."""
    commands = {}
    for who, mount in mounts.items():
        listing = directory / f"files-{who}"
        shell(f"find {mount} -type f | sort | head -n {FILES} >{listing}")
        tar = f"tar -cPf - -T {listing} | cat >/dev/null"
        shell(tar)  # now its spans are there
        commands[who] = f"find {mount} -printf '%s\\n' | wc -l", tar
    trials: dict[str, list[dict[str, float]]] = {who: [] for who in mounts}
    for number in range(rounds):
        for who in sorted(mounts, reverse=bool(number % 2)):
            trials[who].append(walks(*commands[who]))
    return {
        who: {name: statistics.median(trial[name] for trial in some) for name in some[0]}
        for who, some in trials.items()
    }


def walks(find: str, tar: str) -> dict[str, float]:
    """Return the seconds of the commands, cold and once more, by the name of their goals."""
    times = {}
    for what, command in (
        ("find of 20k entries over reference, cold", find),
        ("tar of 10k files over reference, page cache dropped", tar),
    ):
        host.drop_caches()
        times[what] = shell(command)[0]
        times[f"{what.rpartition(',')[0]}, again"] = shell(command)[0]
    return times


def _memory(ours: Ours, largest: Path) -> Iterator[Figure]:
    """Yield the memory of a daemon with all layers awake, of one server that listed its layer, and of all asleep."""
    mounts = ours.daemon.status()["mounts"]
    time.sleep(QUIET_SECONDS + 1)  # by then the fetcher has given back what it fetched with
    shell(f"find {largest} -printf '%s\\n' | wc -l")
    for mount in mounts:
        _look(Path(mount["target"]))
    awake = {mount["target"]: mount["pid"] for mount in ours.daemon.status()["mounts"] if mount["pid"]}
    together, one = ours.memory(), usage([awake.get(str(largest), 0)]).pss
    yield goal("memory, 4 lazy layers awake").figure(
        together / 1e6 if len(awake) == len(mounts) else None, awake=len(awake)
    )
    yield goal("memory, one awake server of 20k files").figure(one / 1e6 or None)
    _sleep(ours)
    yield goal("memory, all idle").figure(ours.memory() / 1e6, mounts=len(mounts))


def _wake(ours: Ours, largest: Path) -> Figure:
    """Return how long the first request of a sleeping layer takes."""
    seconds = []
    for _ in range(WAKES):
        _sleep(ours)
        seconds.append(_look(largest))
    middle = statistics.median(seconds) * 1000
    detail = {"min": round(min(seconds) * 1000, 1), "max": round(max(seconds) * 1000, 1)}
    return goal("wake-up of a layer of 20k files to its first reply").figure(middle, **detail)


def _sleep(ours: Ours) -> None:
    def asleep() -> bool:
        return not any(mount["pid"] for mount in ours.daemon.status()["mounts"])

    wait_until(asleep, timeout=60, what="every server has ended")


def _look(mount: Path) -> float:
    """Look up a name that nobody has asked for and that is not there; return the seconds."""
    name = mount / f"absent-{time.monotonic_ns():x}"
    result = subprocess.run(
        [sys.executable, "-I", "-c", _LOOK, str(name)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return float(result.stdout)


def shell(command: str) -> tuple[float, int]:
    """Run `command`; return the seconds and the number that it printed, 0 for none."""
    started = time.monotonic()
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=300, check=True)
    return time.monotonic() - started, int(result.stdout or 0)
