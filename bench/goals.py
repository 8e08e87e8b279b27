"""The goals: for each figure that has one, its name, its limit, and on which side of it a figure should be.

This list is what the README's table is made of and what `python -m bench` answers to: a goal without a figure counts
as not measured, never as met. Ratios have the unit "x".
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from bench.figures import Figure

LOOPBACK, LINK = "loopback", "20 ms, 1 Gbit/s"
PLACES = (LOOPBACK, LINK)
"""Where cold starts are measured: TLS in both cases."""


class Goal(NamedTuple):
    """What is aimed at; `known` is what was known before, of the reference or of the parts that we use."""

    name: str
    unit: str
    limit: float
    better: Literal["less", "more"] = "less"
    known: str = ""

    def figure(self, got: float | None, **detail: object) -> Figure:
        """Return the figure that was measured for this goal."""
        return Figure(self.name, self.unit, got, self.limit, self.better, detail)


def _everywhere(goal: Goal) -> tuple[Goal, ...]:
    return tuple(goal._replace(name=f"{goal.name}, {place}") for place in PLACES)


GOALS: tuple[Goal, ...] = (
    *_everywhere(Goal("cold start over full pull", "x", 0.30, known="reference 0.48-0.69")),
    *_everywhere(Goal("cold start over reference", "x", 0.50)),
    *_everywhere(Goal("second container over overlayfs, warm", "x", 1.1, known="reference 1.3")),
    *_everywhere(
        Goal("second container over overlayfs, page cache dropped", "x", 1.1, known="reference 1.5")
    ),
    *_everywhere(Goal("on-demand ranges until the run ends", "", 60, known="reference 166")),
    *_everywhere(Goal("on-demand bytes over those of the spans touched", "x", 1.3)),
    Goal("every byte read, to offline, over full pull", "x", 1.0),
    Goal("full pull without an index over containerd's", "x", 0.8),
    Goal("wake-up of a layer of 20k files to its first reply", "ms", 50, known="fork to first reply 9-16"),
    Goal("prepare, 20k files, artifacts on disk", "ms", 50),
    Goal("prepare, 20k files, first time, without the network", "ms", 300),
    Goal("daemon restart with 50 mounts, until gRPC answers", "ms", 700),
    Goal("network requests of ten restarts with 50 mounts", "", 0),
    Goal("memory, all idle", "MB", 90, known="reference 42"),
    Goal("memory, 4 lazy layers awake", "MB", 130, known="reference 247"),
    Goal("memory, one awake server of 20k files", "MB", 8),
    Goal("processor, all idle", "%", 0.1),
    Goal("wake-ups, all idle, beside grpcio's", "per s", 1.0, known="grpcio 7-15"),
    Goal("scrape with 200 mounts", "ms", 20),
    Goal("find of 20k entries over reference, cold", "x", 0.6),
    Goal("find of 20k entries over reference, again", "x", 0.6),
    Goal("tar of 10k files over reference, page cache dropped", "x", 0.6),
    Goal("tar of 10k files over reference, again", "x", 0.6),
    Goal("cold-page 4 KiB reads over a C server", "x", 0.5, "more"),
    Goal("uncached lookups over a C server", "x", 0.5, "more"),
    Goal("1 MiB sequential over a C server", "x", 0.5, "more"),
    Goal("background on an idle link over the link", "x", 0.8, "more", known="reference: 8 MiB/s at most"),
    Goal("a reader's median wait beside the background over idle", "x", 2.0),
    Goal("ranges over TLS, loopback", "MB/s", 600, "more"),
    Goal("ranges over TLS, client", "CPU s per GB", 1.5, known="urllib3, http.client 0.9-1.3"),
    Goal("code, median lines of a module", "", 180),
    Goal("code, lines of the largest module", "", 450),
    Goal("code, lines of the longest function", "", 60),
    Goal("code, import cycles", "", 0),
    Goal("code, lines of tests over lines of code", "x", 1.0, "more"),
)

_BY_NAME = {goal.name: goal for goal in GOALS}


def goal(name: str) -> Goal:
    """Return the goal called `name`. Raises KeyError: a figure that nobody lists would never reach the table."""
    return _BY_NAME[name]
