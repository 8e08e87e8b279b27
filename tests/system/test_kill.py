"""kill -9 of any process under readers: no error, no wrong byte."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.images import ImageBuilder
from tests.support.lazysystem import LazySystem, lazy_system
from tests.support.process import Daemon, wait_until

_RANDOM = random.Random(17)
FILES = {f"d/f{number:03}": _RANDOM.randbytes(_RANDOM.randrange(1_000, 400_000)) for number in range(120)}

READER = """
import hashlib, json, os, random, sys, time
root, seed, stop = sys.argv[1], int(sys.argv[2]), sys.argv[3]
truth = json.load(open(sys.argv[4]))
names, rnd, reads, worst = sorted(truth), random.Random(seed), 0, 0.0
while not os.path.exists(stop):
    name = rnd.choice(names)
    begin = time.monotonic()
    with open(os.path.join(root, name), "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        data = file.readall()
    worst = max(worst, time.monotonic() - begin)
    if hashlib.sha256(data).hexdigest() != truth[name]:
        sys.exit(f"wrong bytes in {name}: {len(data)} of {size}")
    reads += 1
    if rnd.random() < 0.05:
        try: os.stat(os.path.join(root, "absent-%d" % rnd.randrange(10**9)))
        except FileNotFoundError: pass
print(reads, worst)
"""


@pytest.fixture(scope="module")
def system(module_workdir: Path) -> Iterator[LazySystem]:
    with lazy_system(module_workdir) as running:
        image = ImageBuilder(module_workdir / "image").layer(FILES, level=1).build()
        reference = running.publish(image, "test/kill", "--min-layer-size", "0", "--span-size", "131072")
        running.pull(reference)
        yield running


@contextmanager
def readers(
    system: LazySystem, workdir: Path, count: int = 4
) -> Iterator[Callable[[], list[tuple[int, float]]]]:
    """Read the layer's own mount with several processes; the call ends them and returns (reads, worst) of each."""
    (mount,) = system.mounts()
    truth, stop = workdir / "truth.json", workdir / "stop"
    stop.unlink(missing_ok=True)
    truth.write_text(json.dumps({n: hashlib.sha256(d).hexdigest() for n, d in FILES.items()}))
    arguments = [[mount["target"], str(seed), str(stop), str(truth)] for seed in range(count)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", READER, *each], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for each in arguments
    ]

    def finish() -> list[tuple[int, float]]:
        stop.touch()
        results = []
        for process in processes:
            out, error = process.communicate(timeout=60)
            assert process.returncode == 0, error
            reads, worst = out.split()
            results.append((int(reads), float(worst)))
        return results

    try:
        yield finish
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.communicate()


def pids(system: LazySystem, role: str) -> list[int]:
    status = system.daemon.status()
    if role == "server":
        return [mount["pid"] for mount in status["mounts"] if mount["pid"]]
    return [status["pids"][role]] if status["pids"][role] else []


@pytest.mark.parametrize("role", ["server", "fetcher", "zygote"])
def test_killing_a_role_under_readers(system: LazySystem, module_workdir: Path, role: str) -> None:
    kills = 0
    with readers(system, module_workdir) as finish:
        for _round in range(5):
            time.sleep(0.4)
            for pid in pids(system, role):
                os.kill(pid, signal.SIGKILL)
                kills += 1
        time.sleep(0.4)
        results = finish()
    assert kills >= 4
    assert all(reads > 10 for reads, _worst in results)


def test_killing_the_daemon_under_readers(system: LazySystem, module_workdir: Path) -> None:
    with readers(system, module_workdir) as finish:
        for _round in range(3):
            time.sleep(0.5)
            mark = system.registry.mark()
            system.daemon.kill()
            system.daemon.start()
            assert len(system.mounts()) == 1
            assert [r for r in system.registry.requests(mark) if r.kind == "manifest"] == []
        results = finish()
    assert all(reads > 10 for reads, _worst in results)


def test_killing_everything_but_the_holder(system: LazySystem, module_workdir: Path) -> None:
    with readers(system, module_workdir) as finish:
        time.sleep(0.3)
        everything = [*pids(system, "server"), *pids(system, "fetcher"), *pids(system, "zygote")]
        for pid in everything:
            os.kill(pid, signal.SIGKILL)
        system.daemon.kill()
        system.daemon.start()
        time.sleep(0.5)
        results = finish()
    assert all(reads > 10 for reads, _worst in results)


def test_the_holder_may_die_too_while_the_daemon_lives(system: LazySystem, module_workdir: Path) -> None:
    with readers(system, module_workdir, count=2) as finish:
        (old,) = pids(system, "holder")
        os.kill(old, signal.SIGKILL)
        wait_until(lambda: pids(system, "holder") not in ([], [old]), timeout=60, what="another holder")
        time.sleep(0.3)
        system.daemon.kill()
        system.daemon.start()
        results = finish()
    assert all(reads > 10 for reads, _worst in results)


def test_a_stopped_daemon_keeps_its_mounts_and_a_start_needs_no_network(
    system: LazySystem, module_workdir: Path
) -> None:
    """In a row: everything was fetched above; stop in order, registry gone, start again, read everything."""
    wait_until(lambda: all(m["verified"] for m in system.mounts()), timeout=60, what="the layer is verified")
    system.daemon.stop()
    system.registry.stop()
    try:
        system.daemon.start()
        with readers(system, module_workdir, count=2) as finish:
            time.sleep(0.5)
            results = finish()
        assert all(reads > 10 for reads, _worst in results)
    finally:
        system.registry.start()


def test_on_a_kernel_that_sends_requests_once(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 6.9: the same kills, and the journal has what the dead took along."""
    monkeypatch.setattr(Daemon, "program", "tests.support.oldkernel")
    with lazy_system(workdir) as system:
        image = ImageBuilder(workdir / "image").layer(FILES, level=1).build()
        system.pull(system.publish(image, "test/old", "--min-layer-size", "0", "--span-size", "131072"))
        with readers(system, workdir) as finish:
            for role in ("server", "fetcher", "server", "zygote", "server"):
                time.sleep(0.4)
                for pid in pids(system, role):
                    os.kill(pid, signal.SIGKILL)
            for _round in range(2):
                for pid in (*pids(system, "server"), *pids(system, "fetcher"), *pids(system, "zygote")):
                    os.kill(pid, signal.SIGKILL)
                system.daemon.kill()
                system.daemon.start()
                time.sleep(0.4)
            results = finish()
        assert all(reads > 10 for reads, _worst in results)
