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
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from bench import image as images
from tests.support import host
from tests.support.containerd import Containerd, remove_directory
from tests.support.dockerregistry import DockerRegistry, Request
from tests.support.images import Image
from tests.support.netem import Link
from tests.support.netns import Network
from tests.support.process import Daemon

PROGRAM = """\
import time
started = time.monotonic()
import pandas, pyarrow.parquet, scipy.stats, sklearn.ensemble
import numpy
frame = pandas.DataFrame({"x": numpy.arange(1000.0), "y": numpy.arange(1000) % 2})
model = sklearn.ensemble.RandomForestClassifier(5, random_state=1).fit(frame[["x"]], frame["y"])
print("right answers:", int((model.predict(frame[["x"]]) == frame["y"]).sum()))
"""

RECIPE = images.Recipe(
    name="science",
    packages=("python3", "bash", "coreutils", "base-files", "libstdc++6", "libgomp1"),
    wheels=(
        (
            *("numpy==2.4.6", "pandas==3.1.1", "scipy==1.17.1", "scikit-learn==1.9.1", "pyarrow==26.0.1"),
            *("joblib==1.6.0", "narwhals==2.29.0", "cloudpickle==3.1.2", "threadpoolctl==3.8.0"),
            *("python-dateutil==4.0.0", "tzdata==2026.6"),
        ),
    ),
    files=(("app/main.py", PROGRAM),),
    weights=80 << 20,
)
COMMAND = ("python3", "/app/main.py")
SNAPSHOTTER = "soci"
_POLITE = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
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
        self._directory = directory
        self._tell = tell
        self._undo = contextlib.ExitStack()
        self._prefix: tuple[str, ...] = ()
        # Nobody's credentials: the demo must not depend on whose machine this is.
        self._env = {"DOCKER_CONFIG": str(directory)}
        self._registry = DockerRegistry(directory / "registry")
        if link is not None:
            network = self._undo.enter_context(Network(directory, link))
            far = network.server
            self._registry = DockerRegistry(
                directory / "registry", host=far.address, tls=True, prefix=far.prefix
            )
            self._prefix = network.client.prefix
            self._env["SSL_CERT_FILE"] = str(self._registry.ca)
        self._undo.callback(self._registry.cleanup)

    def close(self) -> None:
        """End every process and detach every mount of this demo."""
        self._undo.close()

    def run(self) -> Result:
        """Do all of it. Raises AssertionError, with what the program said, when a step fails."""
        image = images.build(RECIPE, tell=self._tell)
        if image.size < LEAST_SIZE:
            raise AssertionError(f"the image has {image.size} compressed bytes, less than {LEAST_SIZE}")
        self._tell(f"registry: push {image.size / 2**20:.0f} MiB in {len(image.layers)} layers")
        self._registry.start()
        reference = self._registry.push(image, RECIPE.name)
        self._index(reference)
        full, answer, _ = self._full(reference)
        lazy, lazy_answer, served, requests = self._lazy(reference)
        if answer != lazy_answer:
            raise AssertionError(f"the full pull answered {answer!r}, the lazy one {lazy_answer!r}")
        fetched = sum(request.size for request in served)
        self._print_table(image, full, lazy, fetched, requests)
        return Result(
            image=f"{RECIPE.name}@{image.digest}",
            full_s=round(full.total, 2),
            lazy_s=round(lazy.total, 2),
            ratio=round(lazy.total / full.total, 2),
            bytes_image=image.size,
            bytes_fetched=fetched,
            requests=requests,
        )

    @property
    def _scheme(self) -> list[str]:
        return [] if self._registry.tls else ["--plain-http"]

    def _containerd(self, name: str, snapshotters: Mapping[str, Path] | None = None) -> Containerd:
        containerd = Containerd(
            self._directory / name, snapshotters=snapshotters, prefix=self._prefix, env=self._env
        )
        self._undo.callback(containerd.cleanup)
        return containerd.start()

    def _soci(self, containerd: Containerd, *arguments: str) -> None:
        """Run our own command line, as a user does."""
        options = ["--address", str(containerd.address), "--root", str(self._directory / "soci")]
        command = [*self._prefix, sys.executable, "-m", "snapshotter.cli.main", *options, *arguments]
        env = {**os.environ, **self._env}
        result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env, check=False)
        if result.returncode != 0:
            raise AssertionError(f"soci {' '.join(arguments)}: {result.stdout}{result.stderr}")

    def _index(self, reference: str) -> None:
        self._tell("soci create, soci push")
        containerd = self._containerd("builder")
        containerd.ctr("content", "fetch", *self._scheme, reference)
        self._soci(containerd, "create", reference)
        self._soci(containerd, "push", *self._scheme, reference)
        containerd.cleanup()

    def _full(self, reference: str) -> tuple[Times, str, list[Request]]:
        self._tell("full pull by overlayfs, and run")
        containerd = self._containerd("full")
        mark = self._registry.mark()
        host.drop_caches()
        started = time.monotonic()
        containerd.pull(reference, plain_http=not self._registry.tls)
        pulled = time.monotonic()
        answer = containerd.run(reference, *COMMAND)
        ended = time.monotonic()
        served = self._registry.requests(mark)
        containerd.cleanup()
        return Times(pulled - started, ended - pulled), answer, served

    def _lazy(self, reference: str) -> tuple[Times, str, list[Request], int]:
        self._tell("lazy pull by our daemon, and run")
        daemon = Daemon(self._directory / "daemon", env=self._env, prefix=self._prefix)
        self._undo.callback(daemon.cleanup)
        daemon.start()
        containerd = self._containerd("lazy", snapshotters={SNAPSHOTTER: daemon.address})
        mark = self._registry.mark()
        host.drop_caches()
        started = time.monotonic()
        self._soci(containerd, "image", "rpull", *self._scheme, "--snapshotter", SNAPSHOTTER, reference)
        pulled = time.monotonic()
        answer = containerd.run(reference, *COMMAND, snapshotter=SNAPSHOTTER)
        ended = time.monotonic()
        served = self._registry.requests(mark)
        requests = int(daemon.metrics()[ON_DEMAND_REQUESTS])
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
