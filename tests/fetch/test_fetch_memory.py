"""Buffers that are used again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from snapshotter.fetch.memory import ROUND, Buffer, Buffers
from snapshotter.heap import trim_heap


def test_a_buffer_that_was_given_back_is_used_again() -> None:
    buffers = Buffers(10 * ROUND)
    first = buffers.take(ROUND + 1)
    assert first.size == 2 * ROUND
    first.view[:5] = b"hello"
    buffers.give(first)
    assert buffers.take(2 * ROUND) is first
    assert buffers.free_bytes == 0


def test_the_smallest_that_fits_is_taken() -> None:
    buffers = Buffers(100 * ROUND)
    sizes = [buffers.take(count * ROUND) for count in (5, 1, 3)]
    for buffer in sizes:
        buffers.give(buffer)
    assert buffers.take(2 * ROUND).size == 3 * ROUND
    assert buffers.take(2 * ROUND).size == 5 * ROUND
    assert buffers.take(2 * ROUND).size == 2 * ROUND, "none that fits is left"


def test_no_more_is_kept_than_allowed_and_nothing_after_clearing() -> None:
    buffers = Buffers(2 * ROUND)
    for buffer in [buffers.take(ROUND) for _ in range(3)]:
        buffers.give(buffer)
    assert buffers.free_bytes == 2 * ROUND
    buffers.clear()
    assert buffers.free_bytes == 0
    trim_heap()


@given(st.lists(st.integers(0, 4 * ROUND), max_size=40), st.integers(0, 8 * ROUND))
def test_no_buffer_is_lent_twice(steps: list[int], limit: int) -> None:
    buffers = Buffers(limit)
    lent: list[Buffer] = []
    for size in steps:
        if size < ROUND and lent:
            buffers.give(lent.pop())
        else:
            buffer = buffers.take(size + 1)
            assert len(buffer.view) == buffer.size > size
            assert all(buffer is not other for other in lent)
            lent.append(buffer)
        assert buffers.free_bytes <= limit
