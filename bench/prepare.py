"""How long one Prepare of a layer with 23,000 files takes: the first on this host, and one that finds all on disk.

The first one fetches the index and the zTOC: what is left without that time is compiling, writing and mounting. The
second asks for the same layer under another name, as another containerd namespace does.

Concurrency: one thread.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

from bench import image as images
from bench.direct import Direct, publish
from bench.figures import Figure
from bench.goals import goal
from bench.recipes import LARGE
from bench.site import Site

ROUNDS = 5
_MANY_FILES = 2
"""The place of the layer with the most files among those of the large image."""


def figures(directory: Path, *, tell: Callable[[str], None] = lambda _: None) -> Iterator[Figure]:
    """Yield both figures. Raises AssertionError."""
    site = Site(directory)
    try:
        site.start()
        image = publish(site, "many", images.build(LARGE, tell=tell).layers[_MANY_FILES])
        direct = Direct(site, "daemon", {"background_fetch": {"disable": True}})
        first, again, network = [], [], []
        for _ in range(ROUNDS):
            before = direct.phase_seconds("index", "ztoc", "source")
            name, seconds = direct.prepare(image)
            network.append(direct.phase_seconds("index", "ztoc", "source") - before)
            first.append(seconds - network[-1])
            other, seconds = direct.prepare(image)
            again.append(seconds)
            direct.remove(name, other)
            direct.wait_removed()
        direct.close()
    finally:
        site.close()
    yield goal("prepare, 20k files, artifacts on disk").figure(
        statistics.median(again) * 1000, **_range(again)
    )
    yield goal("prepare, 20k files, first time, without the network").figure(
        statistics.median(first) * 1000, **_range(first), network_ms=round(statistics.median(network) * 1000)
    )


def _range(seconds: list[float]) -> dict[str, float]:
    return {"min": round(min(seconds) * 1000, 1), "max": round(max(seconds) * 1000, 1)}
