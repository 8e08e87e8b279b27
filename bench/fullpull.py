"""Full pulls of an image that has no index: by the daemon in parallel, and by containerd alone: `python -m bench.fullpull`.

A round is one pull by each, by turns, of an image of real packages; nothing of it is on the client's side, and the
page cache is cold. Ours begins with the start of `soci image rpull`, containerd's with that of ctr. The pull ends when
the client returns; what either leaves to be written to the disk is not waited for.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import image as images
from bench.demo import orderly_end, parse_link
from bench.figures import Figure, summary
from bench.goals import goal
from bench.recipes import DEMO
from bench.site import SNAPSHOTTER, Site
from tests.support.containerd import remove_directory
from tests.support.netem import Link

NAME = "full pull without an index over containerd's"
ROUNDS = 3


def figures(
    directory: Path,
    *,
    link: Link | None = None,
    rounds: int = ROUNDS,
    options: Mapping[str, object] | None = None,
) -> Iterator[Figure]:
    """Measure in `directory`; `options` are keys of [pull_modes.parallel_pull_unpack]. Raises AssertionError."""
    image = images.build(DEMO)
    site = Site(directory, link=link)
    try:
        site.start()
        reference = site.registry.push(image, DEMO.name)
        ours, theirs = [], []
        for number in range(rounds):
            theirs.append(_by_containerd(site, reference, number))
            ours.append(_by_daemon(site, reference, number, options or {}))
    finally:
        site.close()
    ratio = statistics.median(ours) / statistics.median(theirs)
    detail: dict[str, Any] = {
        "ours_s": [round(seconds, 2) for seconds in ours],
        "containerd_s": [round(seconds, 2) for seconds in theirs],
        "bytes": image.size,
    }
    yield goal(NAME).figure(round(ratio, 3), **detail)


def _by_containerd(site: Site, reference: str, number: int) -> float:
    containerd = site.containerd(f"their{number}")
    site.make_cold()
    started = time.monotonic()
    containerd.pull(reference, plain_http=not site.registry.tls)
    seconds = time.monotonic() - started
    containerd.cleanup()
    return seconds


def _by_daemon(site: Site, reference: str, number: int, options: Mapping[str, object]) -> float:
    name = f"our{number}"
    parallel = {"experimental_parallel_pull_as_fallback": True, **options}
    where = {"containerd_address": str(site.directory / name / "c.sock")}
    config = {"content_store": where, "pull_modes": {"parallel_pull_unpack": parallel}}
    daemon = site.daemon(f"daemon{number}", config)
    containerd = site.containerd(name, snapshotters={SNAPSHOTTER: daemon.address})
    site.make_cold()
    started = time.monotonic()
    site.soci(containerd, "image", "rpull", *site.scheme, "--snapshotter", SNAPSHOTTER, reference)
    seconds = time.monotonic() - started
    made = [
        r.get("local-snapshot-prepared") for r in daemon.records() if r.get("msg") == "image layer prepared"
    ]
    if set(made) != {"true"}:
        raise AssertionError(f"the daemon left layers to containerd: {made}")
    containerd.cleanup()
    daemon.cleanup()
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figure; return the exit code."""
    parser = argparse.ArgumentParser(prog="bench.fullpull")
    parser.add_argument("--link", type=parse_link, metavar="DELAY_MS,MBIT", help="one-way delay and rate")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="(%(default)s)")
    parser.add_argument("--unpacks", type=int, default=1, help="layers unpacked at once (%(default)s)")
    told = parser.parse_args(arguments)
    directory = Path(tempfile.mkdtemp(prefix="sb-", dir="/var/tmp"))
    try:
        with orderly_end():
            options = {"max_concurrent_unpacks_per_image": told.unpacks}
            found = list(figures(directory, link=told.link, rounds=told.rounds, options=options))
    finally:
        remove_directory(directory)
    for figure in found:
        print(figure.to_json())
    print(summary(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
