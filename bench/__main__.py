"""`python -m bench`: everything that is measured, unattended; each figure is one line of JSON, the last line says what
was missed. With `--readme` the README's table is made of it.

Sections run one after another, each in a directory of its own. One that fails is told and leaves its goals unmeasured;
the exit code is then 1. The figures are also kept in .cache/bench.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench import (
    background,
    code,
    coldstart,
    fullpull,
    growth,
    idle,
    misses,
    mounts,
    packed,
    prepare,
    readme,
    restart,
    transfer,
)
from bench import image as images
from bench.demo import orderly_end
from bench.figures import Figure, summary
from bench.goals import GOALS, LINK, LOOPBACK, PLACES
from bench.recipes import LARGE
from bench.site import Site
from tests.support.containerd import remove_directory
from tests.support.netem import Link

RESULTS = images.CACHE.parent / "bench.jsonl"
LEAST_SIZE = 500 << 20
"""Compressed bytes below which an image says nothing about large ones."""

_LINKS = {LOOPBACK: None, LINK: Link(delay=0.01, rate=125e6)}

Section = Callable[[Path], Iterator[Figure]]


@contextlib.contextmanager
def _published(directory: Path, place: str) -> Iterator[tuple[Site, str]]:
    """Give a site at `place` whose registry has the large image and its index, and the reference."""
    image = images.build(LARGE, tell=_tell)
    if image.size < LEAST_SIZE:
        raise AssertionError(f"the image has {image.size} compressed bytes, less than {LEAST_SIZE}")
    storage = images.CACHE.parent / "registry" / LARGE.key
    here = Path(tempfile.mkdtemp(dir=directory))
    with contextlib.ExitStack() as undo:
        site = Site(here, link=_LINKS[place], tls=True, storage=storage)
        undo.callback(site.close)
        site.start()
        reference = f"{site.registry.name}/{LARGE.name}:latest"
        if not (storage / "indexed").exists():
            site.registry.push(image, LARGE.name)
            site.index(reference)
            (storage / "indexed").touch()
        yield site, reference


def cold_starts(directory: Path) -> Iterator[Figure]:
    """Yield the figures of cold starts, at both places."""
    for place in PLACES:
        with _published(directory, place) as (site, reference):
            yield from coldstart.measure(site, place, reference, tell=_tell)
            if place == LOOPBACK:
                yield coldstart.whole_figure(site, reference)


def lazy_mounts(directory: Path) -> Iterator[Figure]:
    """Yield the figures of mounts."""
    with _published(directory, LOOPBACK) as (site, reference):
        yield from mounts.figures(site, reference)


SECTIONS: dict[str, Section] = {
    "code": lambda _: code.figures(),
    "transfer": transfer.figures,
    "misses": misses.figures,
    "prepare": lambda directory: prepare.figures(directory, tell=_tell),
    "background": background.figures,
    "growth": growth.figures,
    "mounts": lazy_mounts,
    "restart": restart.figures,
    "idle": idle.figures,
    "fullpull": fullpull.figures,
    "packed": packed.figures,
    "coldstart": cold_starts,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; return the exit code."""
    parser = argparse.ArgumentParser(prog="bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--readme", action="store_true", help="write the README's table")
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; all")
    options = parser.parse_args(arguments)
    if unknown := set(options.sections) - SECTIONS.keys():
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    if os.geteuid() != 0:
        print("bench: containerd, FUSE and the page cache need root", file=sys.stderr)
        return 1
    figures: dict[str, Figure] = {}
    try:
        with orderly_end():
            failed = [name for name in options.sections or SECTIONS if not _run(name, figures)]
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 130
    for goal in GOALS:
        figures.setdefault(
            goal.name, goal.figure(None, reason="its section was not run, or has not come to it")
        )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("".join(f"{figure.to_json()}\n" for figure in figures.values()))
    if options.readme:
        readme.write(figures.values())
    print(summary(figures.values()))
    return 1 if failed else 0


def _run(name: str, figures: dict[str, Figure]) -> bool:
    """Run one section and print its figures; return whether it came to its end."""
    _tell(f"section {name}")
    with contextlib.ExitStack() as undo:
        directory = Path(tempfile.mkdtemp(prefix="sb-", dir="/var/tmp"))
        undo.callback(remove_directory, directory)
        try:
            for figure in SECTIONS[name](directory):
                figures[figure.name] = figure
                print(figure.to_json(), flush=True)
        except (AssertionError, OSError) as error:
            print(json.dumps({"section": name, "failed": str(error)}), flush=True)
            return False
    return True


def _tell(line: str) -> None:
    print(f"# {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
