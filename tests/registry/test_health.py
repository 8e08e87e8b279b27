"""Circuits of hosts, on a clock of the test's own."""

from snapshotter.registry.health import (
    FIRST_REST,
    LIAR_REST,
    LONGEST_LIAR_REST,
    LONGEST_REST,
    MAX_HOSTS,
    PROBE_SECONDS,
    Circuits,
    Outcome,
)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def make() -> tuple[Circuits, Clock]:
    clock = Clock()
    return Circuits(clock=clock), clock


def test_a_host_that_nothing_is_known_of_may_be_asked() -> None:
    circuits, _ = make()
    assert circuits.allows("m")
    assert circuits.rest_left("m") == 0.0


def test_a_failure_opens_the_circuit_and_one_probe_closes_it() -> None:
    circuits, clock = make()
    circuits.record("m", Outcome.FAILED)
    assert not circuits.allows("m")
    assert circuits.statistics()["m"].is_resting
    clock.now += FIRST_REST
    assert circuits.allows("m")
    assert not circuits.allows("m"), "one caller only is let through"
    circuits.record("m", Outcome.OK)
    assert circuits.allows("m")
    assert circuits.allows("m")


def test_a_probe_that_never_comes_back_is_followed_by_another() -> None:
    circuits, clock = make()
    circuits.record("m", Outcome.FAILED)
    clock.now += FIRST_REST
    assert circuits.allows("m")
    clock.now += PROBE_SECONDS
    assert circuits.allows("m")


def test_rests_grow_up_to_a_cap() -> None:
    circuits, clock = make()
    rests = []
    for _ in range(10):
        circuits.record("m", Outcome.FAILED)
        rests.append(circuits.rest_left("m"))
        clock.now += rests[-1]
    assert rests[:3] == [FIRST_REST, 2 * FIRST_REST, 4 * FIRST_REST]
    assert rests[-1] == LONGEST_REST


def test_a_liar_rests_longer_and_is_not_trusted_again_by_one_success() -> None:
    circuits, clock = make()
    circuits.record("m", Outcome.LIED)
    assert circuits.rest_left("m") == LIAR_REST
    circuits.record("m", Outcome.OK)
    assert not circuits.allows("m")
    circuits.record("m", Outcome.LIED)
    assert circuits.rest_left("m") == 2 * LIAR_REST
    for _ in range(20):
        clock.now += LONGEST_LIAR_REST
        circuits.record("m", Outcome.LIED)
    assert circuits.rest_left("m") == LONGEST_LIAR_REST


def test_what_a_host_does_not_have_is_no_failure() -> None:
    circuits, _ = make()
    assert circuits.record("m", Outcome.FAILED) == 1
    assert circuits.record("m", Outcome.FAILED) == 2
    assert circuits.record("m", Outcome.MISSING) == 0
    assert circuits.allows("m")
    assert circuits.statistics()["m"].counts[Outcome.MISSING] == 1


def test_hosts_are_forgotten_in_their_turn() -> None:
    circuits, _ = make()
    for number in range(MAX_HOSTS + 1):
        circuits.record(f"h{number}", Outcome.FAILED)
    assert len(circuits.statistics()) == MAX_HOSTS
    assert circuits.allows("h0")
