"""Kills, broken registries and broken links under readers: `python -m tests.chaos.run [--seconds N] [--seed N] [--old-kernel]`.

Ends with one line of JSON: reads, errors, wrong answers, kills by role, the longest read, the longest read across a kill
of each role, and what else happened. The exit code is 1 when a reader saw a wrong byte, or an error that the policy
does not promise (see `tests/chaos/schedule.py`).

Some readers stay on one image for the whole time. Beside them images come and go: each is new, is read once while
nothing of it is cached, and is removed. So kills meet mounts, pulls, removals, reads from the cache and reads
from the registry.

Concurrency: readers are processes; two threads pull and remove; the main thread kills.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos import reader
from tests.chaos.rig import NotLazy, Pulled, Rig
from tests.chaos.schedule import ROLES, Disturb, Kill, Misbehave, schedule
from tests.support.containerd import remove_directory
from tests.support.netem import Link
from tests.support.process import wait_until

HANG_S = 200.0
_AFTERMATH_S = 3.0
"""How long after a fault began a slow read or an error still counts as its doing."""


@dataclass
class Tally:
    """What came of it all."""

    seed: int
    reads: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    errors: list[tuple[float, float, int, str]] = field(default_factory=list)
    slow: list[tuple[float, float, str]] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    events: list[tuple[float, str]] = field(default_factory=list)
    """When which role was killed, or "" when another fault began."""
    allowed: list[tuple[float, float]] = field(default_factory=list)
    """When registry or link were so broken that an error is what is promised."""
    pulls: int = 0
    not_lazy: int = 0
    failures: list[str] = field(default_factory=list)
    """Readers and pulls that ended otherwise than they should."""
    restart_times: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, output: str) -> None:
        """Add a reader's report."""
        members = json.loads(output)
        with self.lock:
            self.reads.update(members["reads"])
            self.wrong += members["wrong"]
            self.errors += [tuple(each) for each in members["errors"]]
            self.slow += [tuple(each) for each in members["slow"]]

    def unexpected(self) -> list[tuple[float, float, int, str]]:
        """Return the errors that no fault explains that the policy lets through."""
        return [
            error for error in self.errors
            if not any(begin <= error[1] and error[0] <= end for begin, end in self.allowed)
        ]  # fmt: skip

    def worst_by_role(self) -> dict[str, float]:
        """Return the longest read across a kill of each role; reads that another fault touched are left out."""
        worst = dict.fromkeys(ROLES, 0.0)
        for begin, end, _ in self.slow:
            near = {what for at, what in self.events if begin - _AFTERMATH_S <= at <= end}
            if len(near) == 1 and (role := near.pop()):
                worst[role] = max(worst[role], end - begin)
        return {role: round(seconds, 3) for role, seconds in worst.items()}

    def to_json(self) -> str:
        """Return the line that ends a run."""
        unexpected = self.unexpected()
        return json.dumps(
            {
                "reads": sum(self.reads.values()),
                "errors": len(unexpected),
                "wrong": len(self.wrong),
                "kills": {role: self.kills[role] for role in ROLES},
                "worst_read_s": round(max((end - begin for begin, end, _ in self.slow), default=0.0), 3),
                "worst_read_across_s": self.worst_by_role(),
                "worst_restart_s": round(max(self.restart_times, default=0.0), 3),
                "faults": sum(self.faults.values()),
                "errors_as_promised": len(self.errors) - len(unexpected),
                "pulls": self.pulls,
                "not_lazy": self.not_lazy,
                "failures": len(self.failures),
                "seed": self.seed,
            }
        )

    @property
    def is_clean(self) -> bool:
        """Whether everything that was promised was kept."""
        return not (self.wrong or self.unexpected() or self.failures)


class Chaos:
    """One run of it."""

    def __init__(self, rig: Rig, *, seconds: float, seed: int, readers: int, pause: float) -> None:
        self._rig = rig
        self._seconds = seconds
        self._readers = readers
        self._pause = pause
        self._random = random.Random(seed)
        self._stop = rig._workdir / "stop"
        self._ending = threading.Event()
        self.tally = Tally(seed)

    def run(self) -> Tally:
        """Do it all; return what came of it."""
        image, truth = self._rig.publish(self.tally.seed, layers=2, files=40, largest=300_000)
        steady = self._rig.pull(image, truth)
        processes = [self._start_reader(steady, number, str(self._stop)) for number in range(self._readers)]
        threads = [threading.Thread(target=self._come_and_go, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        try:
            self._make_chaos(time.monotonic() + self._seconds)
        finally:
            self._ending.set()
            self._stop.touch()
            for process in processes:
                self._finish(process)
            for thread in threads:
                thread.join(2 * HANG_S)
        self._rig.remove(steady)
        self._check_nothing_is_left()
        self.tally.restart_times = self._rig.restart_times
        return self.tally

    # ---- readers ----

    def _start_reader(self, pulled: Pulled, seed: int, stop: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-I", "-S", reader.__file__, pulled.root, pulled.truth, str(seed), stop]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def _finish(self, process: subprocess.Popen[str]) -> None:
        try:
            output, error = process.communicate(timeout=HANG_S)
        except subprocess.TimeoutExpired:
            process.kill()
            self._fail("a reader hangs")
            return
        if output:
            self.tally.add(output)
        if process.returncode != 0:
            self._fail(f"a reader ended with {process.returncode}: {error[-500:]}")

    def _fail(self, what: str) -> None:
        with self.tally.lock:
            self.tally.failures.append(what)

    # ---- images that come and go ----

    def _come_and_go(self, number: int) -> None:
        source = random.Random(1000 * self.tally.seed + number)
        while not self._ending.is_set():
            try:
                self._one_image(source.randrange(1 << 30))
            except NotLazy:
                self.tally.not_lazy += 1
            except Exception as error:  # noqa: BLE001  told at the end
                self._fail(f"pull: {type(error).__name__}: {error}")
                return

    def _one_image(self, seed: int) -> None:
        image, truth = self._rig.publish(seed, layers=1, files=10, largest=60_000)
        pulled = self._rig.pull(image, truth)
        self.tally.pulls += 1
        try:
            self._finish(self._start_reader(pulled, seed, ""))
        finally:
            self._rig.remove(pulled)

    # ---- faults ----

    def _make_chaos(self, until: float) -> None:
        for step in schedule(self.tally.seed, pause=self._pause):
            if time.monotonic() + step.pause > until:
                time.sleep(max(until - time.monotonic(), 0))
                break
            time.sleep(step.pause)
            match step.action:
                case Kill(role):
                    self._kill(role)
                case Misbehave() as fault:
                    self._misbehave(fault)
                case Disturb() as fault:
                    self._disturb(fault)
        self._rig.registry.clear_faults()

    def _kill(self, role: str) -> None:
        victims = self._victims(role)
        if not victims:
            return
        self.tally.events.append((time.monotonic(), role))
        for pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.tally.kills[role] += 1
        if role in {"daemon", "all"}:
            self._rig.daemon.kill()
            self._rig.restart_daemon()
            # Else pulls would never get on where a start takes long.
            time.sleep(self._rig.restart_times[-1])

    def _victims(self, role: str) -> list[int]:
        """Return the processes to kill; for "layer" it is one of the servers that are awake."""
        assert self._rig.holder is not None
        match role:
            case "all":
                return sorted(self._rig.daemon.processes())
            case "daemon":
                return [self._rig.daemon.pid]
            case "holder":
                return [self._rig.holder.pid]
        found = self._rig.status()
        if role == "layer":
            awake = [mount["pid"] for mount in found.get("mounts", []) if mount["pid"]]
            return [self._random.choice(awake)] if awake else []
        pid = found.get("pids", {}).get(role)
        return [pid] if pid else []

    def _misbehave(self, fault: Misbehave) -> None:
        """Arm a fault. One that ends in errors is waited for: it must be over before errors are none again."""
        begin = time.monotonic()
        armed = self._rig.registry.fault(fault.make())
        self.tally.faults[fault.name] += 1
        self.tally.events.append((begin, ""))
        if fault.final:
            with suppress(AssertionError):
                wait_until(lambda: armed.hits >= armed.count, timeout=2.0, what="the fault has struck")
            armed.count = armed.hits
            self.tally.allowed.append((begin, time.monotonic() + _AFTERMATH_S))

    def _disturb(self, fault: Disturb) -> None:
        self.tally.faults[fault.name] += 1
        self.tally.events.append((time.monotonic(), ""))
        self._rig.network.shape(fault.link)
        time.sleep(fault.seconds)
        self._rig.network.shape(Link())

    def _check_nothing_is_left(self) -> None:
        try:
            wait_until(
                lambda: self._rig.status().get("mounts") == [], timeout=60, what="no lazy mount is left"
            )
        except AssertionError as error:
            self._fail(str(error))


def main() -> int:
    """Run the program; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--readers", type=int, default=6, help="on the image that stays (6)")
    parser.add_argument(
        "--pause", type=float, default=0.2, help="seconds between two faults, on the average (0.2)"
    )
    parser.add_argument(
        "--old-kernel", action="store_true", help="as before Linux 6.9: requests are never sent again"
    )
    arguments = parser.parse_args()
    workdir = Path(tempfile.mkdtemp(prefix="chaos-"))
    try:
        with Rig(workdir, old_kernel=arguments.old_kernel) as rig:
            tally = Chaos(
                rig,
                seconds=arguments.seconds,
                seed=arguments.seed,
                readers=arguments.readers,
                pause=arguments.pause,
            ).run()
            log = rig.daemon.log_text()
    finally:
        remove_directory(workdir)
    if not tally.is_clean:
        Path(".cache").mkdir(exist_ok=True)
        Path(".cache/chaos-daemon.log").write_text(log)
        for what in (*tally.failures, *tally.wrong, *tally.unexpected()):
            print(what, file=sys.stderr)
        print("the daemon's log is in .cache/chaos-daemon.log", file=sys.stderr)
    print(tally.to_json())
    return 0 if tally.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
