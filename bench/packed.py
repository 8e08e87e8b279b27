"""Pulls of an image of many small layers, of which one is lazy: by overlayfs, by the reference, and by us.

An index leaves small layers out (`soci create --min-layer-size`), and many images have dozens of them: here twenty of a
hundred files, half of them below a lazy one of some 30 MiB and half above. A round is one pull by each contender, by
turns, with nothing of the image on its side and a cold page cache, over the emulated link.

Concurrency: one thread.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from bench.contenders import Contender, Ours, Reference
from bench.figures import Figure
from bench.site import Site
from tests.support.images import Entry, Image, ImageBuilder
from tests.support.netem import Link

SMALL = 20
ROUNDS = 3
_LINK = Link(delay=0.01, rate=125e6)


def figures(directory: Path) -> Iterator[Figure]:
    """Yield the seconds of our pull over those of the others. Raises AssertionError."""
    site = Site(directory, link=_LINK, tls=True)
    try:
        site.start()
        reference = site.registry.push(_image(directory), "packed")
        site.index(reference)
        contenders = [Contender, Ours, *([Reference] if Reference.available() else [])]
        seconds: dict[str, list[float]] = {each.name: [] for each in contenders}
        for _ in range(ROUNDS):
            for kind in contenders:
                seconds[kind.name].append(_pull(kind, site, reference))
    finally:
        site.close()
    middle = {name: statistics.median(some) for name, some in seconds.items()}
    detail = {f"{name}_s": [round(each, 2) for each in some] for name, some in seconds.items()}
    for name in middle.keys() - {Ours.name}:
        yield Figure(
            f"pull of {SMALL} small layers and a lazy one over {name}", "x", middle["ours"] / middle[name]
        )
    yield Figure(f"pull of {SMALL} small layers and a lazy one", "s", middle[Ours.name], detail=detail)


def _pull(kind: type[Contender], site: Site, reference: str) -> float:
    contender = kind(site)
    site.make_cold()
    started = time.monotonic()
    contender.pull(reference)
    seconds = time.monotonic() - started
    if isinstance(contender, Ours):
        lazy = len(contender.daemon.status()["mounts"])
        if lazy != 1:
            raise AssertionError(f"{lazy} layers are lazy instead of 1")
    contender.close()
    return seconds


def _image(directory: Path) -> Image:
    builder = ImageBuilder(directory / "image")
    chance = random.Random(1)
    for number in range(SMALL):
        builder.layer(_files(chance, f"small{number}", 100, 5_000))
        if number == SMALL // 2:
            builder.layer(_files(chance, "large", 1_500, 40_000))
    return builder.build()


def _files(chance: random.Random, top: str, count: int, size: int) -> dict[str, Entry | bytes]:
    """Return files of which half can be compressed."""
    return {f"{top}/{number}": chance.randbytes(size // 2) + bytes(size // 2) for number in range(count)}
