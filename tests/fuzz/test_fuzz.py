"""Every parser of foreign bytes, for a moment: the corpus as it is, and mutations of it.

Longer, and guided by coverage, by `make fuzz SECONDS=600`.
"""

from __future__ import annotations

import contextlib
import gc
import signal
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"
HANG_S = 20
MUTATIONS = 60


@cache
def corpus(name: str) -> tuple[bytes, ...]:
    return tuple(path.read_bytes() for path in sorted((CORPUS / name).iterdir()))


@st.composite
def mutated(draw: st.DrawFn, name: str) -> bytes:
    """One of the corpus with a few places replaced, and perhaps cut."""
    data = bytearray(draw(st.sampled_from(corpus(name))))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        replaced = draw(st.integers(0, 8))
        data[start : start + replaced] = draw(st.binary(max_size=8))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Fail what takes longer, even in a loop that never ends."""

    def give_up(_number: int, _frame: types.FrameType | None) -> None:
        raise AssertionError(f"more than {seconds} s")

    former = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    gc.disable()  # a finalizer of somebody else's cannot run where a target has used up the stack
    try:
        yield
    finally:
        gc.enable()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def test_the_corpus_is_small_and_every_target_has_one() -> None:
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 300_000
    assert {path.parent.name for path in files} == set(TARGETS)


@pytest.mark.parametrize("name", TARGETS)
def test_corpus(name: str) -> None:
    for data in corpus(name):
        with limited(HANG_S):
            TARGETS[name](data)


@pytest.mark.parametrize("name", TARGETS)
def test_mutations(name: str) -> None:
    @settings(
        max_examples=MUTATIONS,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(mutated(name))
    def run(data: bytes) -> None:
        with limited(HANG_S):
            TARGETS[name](data)

    run()
