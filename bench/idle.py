"""What the daemon costs while nothing happens, with many lazy mounts asleep, and what it costs to be looked at.

A wake-up is a voluntary context switch of a thread. grpcio's own threads wake up some ten times a second, whoever uses it:
an empty gRPC server runs beside the daemon for the same time, and what that does is taken off. A scrape is timed from the
side of whoever scrapes, with a connection of its own each time.

Concurrency: one thread, beside the registry's.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from bench import restart
from bench.figures import Figure
from bench.goals import goal
from tests.support.process import Daemon, Service, accepts_connections, usage, wait_until
from tests.support.registry import Registry

MOUNTS = 200
SCRAPES = 20
WATCH_S = 60.0
_AWAKE_S = 1
"""After which servers end here, so that all are soon asleep."""
_SETTLE_S = 20.0
"""By then memory has been given back, and threads that nobody needed for ten seconds have ended."""

_SERVER = """\
import signal, sys
from concurrent.futures import ThreadPoolExecutor
import grpc
server = grpc.server(ThreadPoolExecutor(32))
server.add_insecure_port(f"unix://{sys.argv[1]}")
server.start()
signal.pause()  # waiting for its end would wake up ten times a second
"""


class Activity(NamedTuple):
    """What some processes did in a while."""

    wakeups: int
    cpu_s: float


def figures(
    directory: Path, *, mounts: int = MOUNTS, seconds: float = WATCH_S, settle: float = _SETTLE_S
) -> Iterator[Figure]:
    """Yield the figures of a daemon at rest. Raises AssertionError."""
    daemon = Daemon(directory / "d", {"fuse": {"idle_timeout_sec": _AWAKE_S}})
    socket = directory / "empty.sock"
    empty = Service([sys.executable, "-c", _SERVER, str(socket)], log=directory / "empty.log")
    with Registry() as registry, contextlib.ExitStack() as undo:
        undo.callback(daemon.cleanup)
        undo.callback(empty.cleanup)
        daemon.start()
        restart.pull(daemon, registry, mounts)
        wait_until(
            lambda: not any(mount["pid"] for mount in daemon.status()["mounts"]),
            timeout=120,
            what="every server has ended",
        )
        empty.start()
        empty.wait_ready(lambda: accepts_connections(socket))
        time.sleep(settle)
        ours, theirs = watch([daemon.processes(), empty.processes()], seconds)
        scrapes = [_scrape(daemon.metrics_address) for _ in range(SCRAPES)]
    # To what can be told: the kernel counts in ticks of 10 ms.
    yield goal("processor, all idle").figure(round(100 * ours.cpu_s / seconds, 3), mounts=mounts)
    yield goal("wake-ups, all idle, beside grpcio's").figure(
        max(ours.wakeups - theirs.wakeups, 0) / seconds,
        all_per_s=round(ours.wakeups / seconds, 2),
        grpcio_per_s=round(theirs.wakeups / seconds, 2),
    )
    yield goal("scrape with 200 mounts").figure(
        statistics.median(scrapes) * 1000,
        mounts=mounts,
        min=round(min(scrapes) * 1000, 1),
        max=round(max(scrapes) * 1000, 1),
    )


def watch(groups: Iterable[Iterable[int]], seconds: float) -> list[Activity]:
    """Return what each group of processes does in the next `seconds`, by the threads that are there at their end."""
    pids = [list(group) for group in groups]
    before = [(_wakeups(group), usage(group).cpu) for group in pids]
    time.sleep(seconds)
    activities = []
    for group, (wakeups, cpu) in zip(pids, before, strict=True):
        more = sum(count - wakeups.get(thread, 0) for thread, count in _wakeups(group).items())
        activities.append(Activity(more, max(usage(group).cpu - cpu, 0.0)))
    return activities


def _wakeups(pids: Iterable[int]) -> dict[str, int]:
    """Return how often each living thread of `pids` has gone to sleep so far, by its name in /proc."""
    tasks: list[Path] = []
    for pid in pids:
        with contextlib.suppress(FileNotFoundError):
            tasks += Path(f"/proc/{pid}/task").iterdir()
    found = {}
    for task in tasks:
        # One that ends just now has nothing to do with the rest.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            status = (task / "status").read_text().split()
            found[str(task)] = int(status[status.index("voluntary_ctxt_switches:") + 1])
    return found


def _scrape(address: str) -> float:
    """Return the seconds of one scrape."""
    started = time.perf_counter()
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as reply:
        assert b"soci_lazy_mounts" in reply.read(), "no metrics"
    return time.perf_counter() - started
