"""The demo: one real image, pulled in full and pulled lazily, through a real containerd and a real registry.

It builds the image (once; see `image`), pushes and indexes it, then measures from nothing to the end of a heavy Python
import: by containerd's own overlayfs, and by our daemon. The page cache is dropped before each. The last line of the
output is the result as JSON.

By default the registry is on the loopback address. `--link DELAY_MS,MBIT` puts it on another host instead, in network
namespaces, behind a link of that one-way delay and rate, with TLS.

Everything lives in one temporary directory. Whatever happens, interrupts included, every process is ended, every
mount detached and the directory removed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from bench import image as images
from bench.recipes import COMMAND, DEMO
from bench.site import SNAPSHOTTER, Site
from tests.support import host
from tests.support.containerd import remove_directory
from tests.support.dockerregistry import Request
from tests.support.images import Image
from tests.support.netem import Link

_POLITE = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PICTURE = images.CACHE.parent / "demo.html"
"""Where the lazy run's time went, as `soci trace` shows it."""

LEAST_SIZE = 200 << 20
"""Compressed bytes below which the demo would show nothing."""

ON_DEMAND_REQUESTS = "soci_fetch_ondemand_ranges_total"
"""The daemon's counter of range requests that a reader waited for."""


class Times(NamedTuple):
    """Seconds of one way: pull, then run."""

    pull: float
    run: float

    @property
    def total(self) -> float:
        """From the start of the pull to the end of the run."""
        return self.pull + self.run


@dataclass(frozen=True, slots=True)
class Result:
    """The line of JSON: seconds, their ratio (lazy over full), compressed bytes, on-demand range requests."""

    image: str
    full_s: float
    lazy_s: float
    ratio: float
    bytes_image: int
    bytes_fetched: int
    requests: int


class Demo:
    """One run of the demo in `directory`, over `link` if there is one; `close` undoes everything."""

    def __init__(self, directory: Path, tell: Callable[[str], None], link: Link | None = None) -> None:
        self._tell = tell
        self._site = Site(directory, link=link)

    def close(self) -> None:
        """End every process and detach every mount of this demo."""
        self._site.close()

    def run(self) -> Result:
        """Do all of it. Raises AssertionError, with what the program said, when a step fails."""
        image = images.build(DEMO, tell=self._tell)
        if image.size < LEAST_SIZE:
            raise AssertionError(f"the image has {image.size} compressed bytes, less than {LEAST_SIZE}")
        self._tell(f"registry: push {image.size / 2**20:.0f} MiB in {len(image.layers)} layers")
        self._site.start()
        reference = self._site.registry.push(image, DEMO.name)
        self._tell("soci create, soci push")
        self._site.index(reference)
        full, answer, _ = self._full(reference)
        lazy, lazy_answer, served, requests = self._lazy(reference)
        if answer != lazy_answer:
            raise AssertionError(f"the full pull answered {answer!r}, the lazy one {lazy_answer!r}")
        fetched = sum(request.size for request in served)
        self._print_table(image, full, lazy, fetched, requests)
        return Result(
            image=f"{DEMO.name}@{image.digest}",
            full_s=round(full.total, 2),
            lazy_s=round(lazy.total, 2),
            ratio=round(lazy.total / full.total, 2),
            bytes_image=image.size,
            bytes_fetched=fetched,
            requests=requests,
        )

    def _full(self, reference: str) -> tuple[Times, str, list[Request]]:
        self._tell("full pull by overlayfs, and run")
        containerd = self._site.containerd("full")
        mark = self._site.registry.mark()
        host.drop_caches()
        started = time.monotonic()
        containerd.pull(reference, plain_http=not self._site.registry.tls)
        pulled = time.monotonic()
        answer = containerd.run(reference, *COMMAND)
        ended = time.monotonic()
        served = self._site.registry.requests(mark)
        containerd.cleanup()
        return Times(pulled - started, ended - pulled), answer, served

    def _lazy(self, reference: str) -> tuple[Times, str, list[Request], int]:
        self._tell("lazy pull by our daemon, and run")
        daemon = self._site.daemon("daemon")
        containerd = self._site.containerd("lazy", snapshotters={SNAPSHOTTER: daemon.address})
        mark = self._site.registry.mark()
        host.drop_caches()
        started = time.monotonic()
        self._site.soci(
            containerd, "image", "rpull", *self._site.scheme, "--snapshotter", SNAPSHOTTER, reference
        )
        pulled = time.monotonic()
        answer = containerd.run(reference, *COMMAND, snapshotter=SNAPSHOTTER)
        ended = time.monotonic()
        served = self._site.registry.requests(mark)
        requests = int(daemon.metrics()[ON_DEMAND_REQUESTS])
        said = self._site.soci(containerd, "trace", "--root", str(daemon.root), "--output", str(PICTURE))
        self._tell(f"  {said.strip()}\n  {PICTURE.relative_to(PICTURE.parents[1])} has it as a picture")
        containerd.cleanup()
        daemon.cleanup()
        return Times(pulled - started, ended - pulled), answer, served, requests

    def _print_table(self, image: Image, full: Times, lazy: Times, fetched: int, requests: int) -> None:
        rows = [
            ("", "pull", "run", "together"),
            ("full pull (overlayfs)", *(f"{seconds:.2f} s" for seconds in (*full, full.total))),
            ("lazy pull (soci)", *(f"{seconds:.2f} s" for seconds in (*lazy, lazy.total))),
        ]
        for first, *others in rows:
            self._tell(f"  {first:<24}" + "".join(f"{cell:>12}" for cell in others))
        self._tell(
            f"  {image.size / 2**20:.0f} MiB in the image, {fetched / 2**20:.0f} MiB fetched until the run ended, "
            f"{requests} requests that a reader waited for"
        )


def parse_link(text: str) -> Link:
    """Return the link that `DELAY_MS,MBIT` describes. Raises ValueError."""
    delay, rate = map(float, text.split(","))
    return Link(delay=delay / 1000, rate=rate * 125_000)


@contextlib.contextmanager
def orderly_end() -> Iterator[None]:
    """Let every polite signal end the program as an interrupt does, so that everything is undone."""

    def interrupt(number: int, _: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = {number: signal.signal(number, interrupt) for number in _POLITE}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; return the exit code."""
    parser = argparse.ArgumentParser(prog="demo", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--link", type=parse_link, metavar="DELAY_MS,MBIT", help="one-way delay and rate (loopback, no TLS)"
    )
    parser.add_argument("--keep", action="store_true", help="keep the directory with all logs")
    options = parser.parse_args(arguments)
    if os.geteuid() != 0:
        print("demo: containerd, FUSE and the page cache need root", file=sys.stderr)
        return 1
    directory = Path(tempfile.mkdtemp(prefix="sd-", dir="/var/tmp"))
    demo = None
    try:
        with orderly_end():
            demo = Demo(directory, lambda line: print(line, flush=True), options.link)
            result = demo.run()
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    except AssertionError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one must not stop the clearing up
        if demo is not None:
            demo.close()
        if options.keep:
            print(f"demo: kept {directory}")
        else:
            remove_directory(directory)
    print(json.dumps(asdict(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
