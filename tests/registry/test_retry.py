"""When to try again: a table of waits, and properties of any policy."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.errors import (
    AuthenticationFailed,
    BlobNotFound,
    RangeNotHonoured,
    RegistryError,
    RegistryRefused,
    RegistryTimeout,
    RegistryUnavailable,
    ShortBody,
)
from snapshotter.registry.retry import RetryPolicy

TEMPORARY = RegistryTimeout("x")


def test_waits_double_until_the_attempts_are_used_up() -> None:
    policy = RetryPolicy(attempts=6, first_wait=0.1, max_wait=1.0, jitter=0.0)
    assert [policy.delay(attempt, TEMPORARY) for attempt in range(1, 8)] == [
        0.1,
        0.2,
        0.4,
        0.8,
        1.0,
        None,
        None,
    ]


def test_the_default_policy_waits_some_eight_seconds_in_nine_attempts() -> None:
    policy = RetryPolicy(random=lambda: 0.0)
    waits = [policy.delay(attempt, TEMPORARY) for attempt in range(1, 10)]
    assert waits[-1] is None
    assert sum(wait for wait in waits if wait) == pytest.approx(7.65)


def test_jitter_adds_its_fraction_of_the_wait() -> None:
    policy = RetryPolicy(first_wait=1.0, jitter=0.5, random=lambda: 0.5)
    assert policy.delay(1, TEMPORARY) == 1.25


@pytest.mark.parametrize("kind", [AuthenticationFailed, BlobNotFound, RangeNotHonoured, RegistryRefused])
def test_what_is_final_is_not_tried_again(kind: type[RegistryError]) -> None:
    assert RetryPolicy().delay(1, kind("x")) is None


@pytest.mark.parametrize("kind", [RegistryUnavailable, RegistryTimeout, ShortBody])
def test_what_may_pass_is_tried_again(kind: type[RegistryError]) -> None:
    assert RetryPolicy().delay(1, kind("x")) is not None


@pytest.mark.parametrize(("asked", "wait"), [(None, 0.1), (0.0, 0.1), (0.05, 0.1), (2.0, 2.0), (3600.0, 5.0)])
def test_the_servers_wish_is_honoured_up_to_the_cap(asked: float | None, wait: float) -> None:
    policy = RetryPolicy(first_wait=0.1, max_wait=5.0, jitter=0.0)
    assert policy.delay(1, RegistryUnavailable("x", retry_after=asked)) == wait


@given(
    attempt=st.integers(1, 10_000),
    attempts=st.integers(1, 20_000),
    asked=st.none() | st.floats(0, 1e12),
    number=st.floats(0, 1, exclude_max=True),
)
def test_a_wait_is_never_longer_than_cap_and_jitter_allow(
    attempt: int, attempts: int, asked: float | None, number: float
) -> None:
    policy = RetryPolicy(attempts=attempts, max_wait=10.0, jitter=0.25, random=lambda: number)
    wait = policy.delay(attempt, RegistryUnavailable("x", retry_after=asked))
    assert (wait is None) == (attempt >= attempts)
    assert wait is None or 0.0 < wait <= 12.5
