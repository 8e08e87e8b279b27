"""The garbage collector, while many values are being made."""

import gc
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from snapshotter.heap import without_collector


def test_the_collector_rests_until_the_last_block_has_ended() -> None:
    assert gc.isenabled()
    both = Barrier(2, timeout=20)

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
