"""Fuzzes every target for a while: `python -m tests.fuzz.run [--seconds N] [--keep] [TARGET…]`.

Ends with one line of JSON per target: {"target", "executions", "crashes", "hangs", "bombs", "seconds"}; the exit
code is 1 when anything was found. What was found lies in .cache/fuzz/TARGET; put it into tests/fuzz/corpus/TARGET
when it is mended, so that `make test` tries it for ever. With `--keep`, the inputs that reach code which the corpus
did not reach are added to it, as far as they are small.

Concurrency: one worker process per CPU; see tests/fuzz/worker.py.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.fuzz.targets import TARGETS

COUNTS = struct.Struct("<QQQ")
"""What a worker reports: executions, hangs, bombs."""

CORPUS = Path(__file__).parent / "corpus"
WORK = Path(".cache/fuzz")

_HANG_LIMIT_S = 20
"""What takes longer is ended by libFuzzer; the worker itself counts what takes more than one second."""

_RSS_LIMIT_MIB = 2048
_MAX_LENGTH = 1 << 16
_KEPT_SIZE = 600
"""Largest input that `--keep` adds; the whole corpus has to stay below 300 KB."""

_LOST = re.compile(r"ERROR: libFuzzer: (timeout|out-of-memory)")


@dataclass
class Outcome:
    """What became of one target."""

    target: str
    executions: int = 0
    crashes: int = 0
    hangs: int = 0
    bombs: int = 0
    seconds: float = 0.0

    @property
    def is_clean(self) -> bool:
        """Whether nothing was found."""
        return not (self.crashes or self.hangs or self.bombs)


def fuzz(name: str, seconds: float, *, seed: int = 0) -> Outcome:
    """Fuzz one target; after a crash, go on with what is left of the time."""
    outcome, begin = Outcome(name), time.monotonic()
    place = WORK / name
    found = place / "corpus"
    found.mkdir(parents=True, exist_ok=True)
    report = place / "report"
    while (left := seconds - (time.monotonic() - begin)) >= 1 or not outcome.seconds:
        report.write_bytes(bytes(COUNTS.size))
        options = {
            "max_total_time": max(int(left), 1), "timeout": _HANG_LIMIT_S, "rss_limit_mb": _RSS_LIMIT_MIB,
            "max_len": _MAX_LENGTH, "artifact_prefix": f"{place}/", "seed": seed,
        }  # fmt: skip
        command = [sys.executable, "-m", "tests.fuzz.worker", name, str(report)]
        command += [f"-{key}={value}" for key, value in options.items()]
        done = subprocess.run(
            [*command, str(found), str(CORPUS / name)],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        _count(outcome, done, report)
        outcome.seconds = round(time.monotonic() - begin, 1)
        if outcome.crashes > 10:
            break
    return outcome


def _count(outcome: Outcome, done: subprocess.CompletedProcess[str], report: Path) -> None:
    executions, hangs, bombs = COUNTS.unpack(report.read_bytes())
    outcome.executions += executions
    lost = _LOST.search(done.stderr)
    outcome.hangs += hangs + (lost is not None and lost[1] == "timeout")
    outcome.bombs += bombs + (lost is not None and lost[1] == "out-of-memory")
    if done.returncode != 0 and lost is None:
        outcome.crashes += 1
        print(f"{outcome.target}: {done.stderr[-3000:]}", file=sys.stderr)


def keep(name: str) -> None:
    """Add what was found, and reaches something new, to the corpus of the repository."""
    command = [sys.executable, "-m", "tests.fuzz.worker", name, str(WORK / name / "report"), "-merge=1"]
    kept = CORPUS / name
    small = WORK / name / "small"
    small.mkdir(exist_ok=True)
    for path in (WORK / name / "corpus").iterdir():
        if path.stat().st_size <= _KEPT_SIZE:
            os.replace(path, small / path.name)
    subprocess.run([*command, str(kept), str(small)], capture_output=True, check=True)


def main() -> int:
    """Run the program; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600.0, help="of all targets together (600)")
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    parser.add_argument("--keep", action="store_true", help="add what reaches new code to the corpus")
    parser.add_argument("target", nargs="*", help="by default all")
    arguments = parser.parse_args()
    names = arguments.target or list(TARGETS)
    workers = len(os.sched_getaffinity(0))
    share = arguments.seconds * workers / len(names)
    found = False
    with ThreadPoolExecutor(workers) as pool:
        for outcome in pool.map(lambda name: fuzz(name, share, seed=arguments.seed), names):
            print(json.dumps(asdict(outcome)), flush=True)
            found |= not outcome.is_clean
        if arguments.keep:
            list(pool.map(keep, names))
    return int(found)


if __name__ == "__main__":
    sys.exit(main())
