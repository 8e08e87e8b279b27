"""Memory: the collector while many values are being made, and what a process gives back at rest."""

import gc
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from snapshotter.heap import without_collector


def test_the_collector_rests_until_the_last_block_has_ended() -> None:
    assert gc.isenabled()
    both = Barrier(2, timeout=60)

    def work() -> bool:
        with without_collector():
            both.wait()
            rested = not gc.isenabled()
            both.wait()
            return rested

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda _: work(), range(2))) == [True, True]
    assert gc.isenabled()


def test_the_collector_goes_on_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), without_collector(), without_collector():
        raise ZeroDivisionError
    assert gc.isenabled()


_AT_REST = """
import hashlib, json, ssl, threading
from snapshotter import heap

def kilobytes(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))

heap.use_one_heap()
heap.settle()
before = kilobytes("RssAnon")

def work():
    # Above and below what malloc takes from the system by itself, and in a cycle that no collector has seen.
    cycle = [b"x" * size for size in [200_000] * 100 + [30_000_000]]
    cycle.append(cycle)

threads = [threading.Thread(target=work) for _ in range(3)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
grown = kilobytes("RssAnon") - before
code = kilobytes("RssFile")
heap.give_back()
after, code_after = kilobytes("RssAnon") - before, kilobytes("RssFile")
works = hashlib.sha256(json.dumps(ssl.OPENSSL_VERSION).encode()).hexdigest()
print(json.dumps([grown, after, code, code_after, works]))
"""


def test_a_process_at_rest_gives_back_what_its_threads_worked_with_and_goes_on() -> None:
    result = subprocess.run(
        [sys.executable, "-c", f"import ssl\n{_AT_REST}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    grown, after, code, code_after, works = json.loads(result.stdout)
    assert grown > 40_000, "in kilobytes"
    assert after < grown / 10
    assert code_after < code
    assert len(works) == 64
