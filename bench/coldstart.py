"""Cold starts: from nothing on the host to the end of a heavy import in a container, by every contender in turn.

A trial is one contender on one site, with nothing of the image on its side and a cold page cache:

    pull          until the client returns
    first         from there until the first line of the container's program runs
    run           from there until the program has ended, its imports done

and, for what comes after it, the same program in a second container with a warm page cache, and in a third with a
cold one, when all of the image has come.

Concurrency: one thread.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from bench.contenders import Contender, Ours, contenders
from bench.figures import Figure
from bench.goals import goal
from bench.site import Site
from snapshotter.fetch.fetcher import TRACE_DELAY

ROUNDS = 3
"""Trials of each contender on each site."""

READ_ALL = """\
import os
total = 0
for top, folders, names in os.walk("/", onerror=lambda error: None):
    folders[:] = [name for name in folders if os.path.join(top, name) not in ("/proc", "/sys", "/dev")]
    for name in names:
        path = os.path.join(top, name)
        if os.path.isfile(path) and not os.path.islink(path):
            with open(path, "rb", buffering=0) as file:
                while piece := file.read(1 << 20):
                    total += len(piece)
print(total)
"""
"""Reads every file of a container."""


@dataclass(slots=True)
class Trial:
    """One cold start: seconds by step, and what it took; `second` and `dropped` are the next containers' runs."""

    contender: str
    pull: float
    first: float
    run: float
    second: float = 0.0
    dropped: float = 0.0
    cpu: dict[str, float] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Seconds from the start of the pull to the end of the run."""
        return self.pull + self.first + self.run


def cold_start(
    site: Site, make: Callable[[Site], Contender], reference: str, *, later: bool = False
) -> Trial:
    """Do one cold start, and the second and third containers if `later`. Raises AssertionError."""
    contender = make(site)
    try:
        mark = site.registry.mark()
        before = contender.cpu_seconds()
        site.make_cold()
        started = time.time()
        contender.pull(reference)
        pulled = time.time()
        facts = {"pss_after_pull": contender.memory()}
        resumed = time.time()
        answer = contender.run(reference)
        ended = time.time()
        facts |= contender.facts() | {"pss_after_run": contender.memory()}
        after = contender.cpu_seconds()
        served = site.registry.requests(mark)
        began = float(re.findall(r"^began (\S+)$", answer, re.MULTILINE)[0])
        trial = Trial(contender.name, pulled - started, began - resumed, ended - began)
        trial.cpu = {role: round(after[role] - before.get(role, 0.0), 2) for role in sorted(after)}
        trial.facts = facts | {"requests": len(served), "bytes": sum(one.size for one in served)}
        if isinstance(contender, Ours):
            trial.phases = contender.phases(started)
            time.sleep(2 * TRACE_DELAY)
            trial.facts["touched_bytes"] = contender.touched_bytes()
        if later:
            contender.wait_complete()
            contender.run(reference)
            trial.second = _seconds(lambda: contender.run(reference))
            site.make_cold()
            trial.dropped = _seconds(lambda: contender.run(reference))
        return trial
    finally:
        contender.close()


def read_whole(site: Site, make: Callable[[Site], Contender], reference: str) -> tuple[float, str]:
    """Return the seconds from nothing until every file was read in a container and the network is not needed any more,
    and how many bytes that were."""
    contender = make(site)
    try:
        site.make_cold()
        started = time.monotonic()
        contender.pull(reference)
        answer = contender.run(reference, "python3", "-c", READ_ALL)
        contender.wait_complete()
        return time.monotonic() - started, answer
    finally:
        contender.close()


def measure(
    site: Site,
    place: str,
    reference: str,
    *,
    rounds: int = ROUNDS,
    tell: Callable[[str], None],
) -> Iterator[Figure]:
    """Let all contenders take turns `rounds` times at `place`, and yield the figures."""
    trials: dict[str, list[Trial]] = {}
    for number in range(rounds):
        for make in contenders():
            trial = cold_start(site, make, reference, later=number == rounds - 1)
            trials.setdefault(trial.contender, []).append(trial)
            tell(f"{place}: {trial}")
    yield from figures(place, trials)


def figures(place: str, trials: Mapping[str, Sequence[Trial]]) -> Iterator[Figure]:
    """Yield the figures of the trials at one place."""
    medians = {name: statistics.median(one.total for one in some) for name, some in trials.items()}
    for name, some in trials.items():
        totals = [one.total for one in some]
        yield Figure(
            f"cold start, {name}, {place}",
            "s",
            medians[name],
            detail={"min": round(min(totals), 2), "max": round(max(totals), 2)} | _middle(some),
        )
    yield goal(f"cold start over full pull, {place}").figure(medians["ours"] / medians["full"])
    over_reference = goal(f"cold start over reference, {place}")
    if "reference" in medians:
        yield over_reference.figure(medians["ours"] / medians["reference"])
    else:
        yield over_reference.figure(None, reason="the reference is not on this machine")
    yield from _second_figures(place, trials)
    facts = [one.facts for one in trials["ours"]]
    ranges = statistics.median(one["ondemand_ranges"] for one in facts)
    yield goal(f"on-demand ranges until the run ends, {place}").figure(ranges)
    share = statistics.median(one["ondemand_bytes"] / one["touched_bytes"] for one in facts)
    yield goal(f"on-demand bytes over those of the spans touched, {place}").figure(share)


def _second_figures(place: str, trials: Mapping[str, Sequence[Trial]]) -> Iterator[Figure]:
    last = {name: some[-1] for name, some in trials.items()}
    for what, seconds in (
        ("warm", {name: one.second for name, one in last.items()}),
        ("page cache dropped", {name: one.dropped for name, one in last.items()}),
    ):
        detail = {f"{name}_s": round(value, 2) for name, value in seconds.items()}
        second = goal(f"second container over overlayfs, {what}, {place}")
        yield second.figure(seconds["ours"] / seconds["full"], **detail)


def whole_figure(site: Site, reference: str) -> Figure:
    """Return how long reading everything takes lazily, over the same after a full pull. Raises AssertionError."""
    full, answer = read_whole(site, Contender, reference)
    lazy, lazy_answer = read_whole(site, Ours, reference)
    if answer != lazy_answer:
        raise AssertionError(f"after a full pull {answer} bytes were read, lazily {lazy_answer}")
    whole = goal("every byte read, to offline, over full pull")
    return whole.figure(lazy / full, full_s=round(full, 2), ours_s=round(lazy, 2))


def _middle(trials: Sequence[Trial]) -> dict[str, object]:
    """Return the steps and costs of the trial with the median time."""
    one = sorted(trials, key=lambda trial: trial.total)[len(trials) // 2]
    steps = {"pull": round(one.pull, 2), "first": round(one.first, 2), "run": round(one.run, 2)}
    facts = {name: round(value, 3) for name, value in one.facts.items()}
    return {**steps, "cpu_s": one.cpu, "phases_s": one.phases, **facts}


def _seconds(do: Callable[[], object]) -> float:
    started = time.monotonic()
    do()
    return time.monotonic() - started
