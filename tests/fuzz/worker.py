"""Fuzzes one target, guided by coverage: `python -m tests.fuzz.worker TARGET REPORT [libFuzzer options] CORPUS…`.

libFuzzer leads (through atheris) and ends the process as it sees fit; so what came of it is kept in the mapped
file REPORT, three numbers that the parent reads afterwards: executions, hangs, bombs. An input that takes more than
a second of processor time, or makes the process grow by more than 256 MiB, is written beside the report, and the
search goes on; one that raises ends it, and libFuzzer writes the input where `-artifact_prefix` says.
"""

from __future__ import annotations

import mmap
import resource
import struct
import sys
import time
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["snapshotter", "tests.fuzz.targets"]):
    from tests.fuzz.targets import TARGETS

COUNTS = struct.Struct("<QQQ")
"""Executions, hangs, bombs; also in run.py, which has to do without atheris."""

_HANG_S = 1.0
_BOMB_KIB = 256 << 10


def main() -> None:
    """Fuzz until libFuzzer says that it is enough."""
    name, report = sys.argv[1], Path(sys.argv[2])
    run = TARGETS[name]
    counts = [0, 0, 0]
    with report.open("r+b") as file:
        page = mmap.mmap(file.fileno(), COUNTS.size)

    def once(data: bytes) -> None:
        counts[0] += 1
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begin = time.process_time()
        try:
            run(data)
        finally:
            slow = time.process_time() - begin > _HANG_S
            large = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > _BOMB_KIB
            if slow or large:
                counts[1] += slow
                counts[2] += large
                report.with_name(f"{'hang' if slow else 'bomb'}-{sum(counts[1:])}").write_bytes(data)
            COUNTS.pack_into(page, 0, *counts)

    atheris.Setup([sys.argv[0], *sys.argv[3:]], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
