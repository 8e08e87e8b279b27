"""A reader of a lazy image, as a program: `reader.py ROOT TRUTH SEED STOP`; everything it reads is compared.

ROOT is the image as a container sees it, TRUTH a directory with the same files as they have to be. It reads at
random offsets, whole files, through mmap, walks directories and looks for names that are not there, until the file
STOP exists; without STOP ("") it reads every file once. The kernel's pages of a file are dropped before each read.

Prints one JSON object: how many reads, of each kind; every wrong answer; every error, as [begin, end, errno, path]; every
read of more than SLOW_S, as [begin, end, path]. Times are CLOCK_MONOTONIC's. A read that failed is tried again until it
comes right, or for PATIENCE_S: that it comes right in the end is part of the promise.

Standard library only: it runs with -I and starts in 20 ms.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

SLOW_S = 0.05
PATIENCE_S = 40.0
PIECE = 4096
READS_PER_OPEN = 24


class Reader:
    """Reads and remembers what came."""

    def __init__(self, root: str, truth: str, seed: int) -> None:
        self.root, self.truth = root, truth
        self.random = random.Random(seed)
        self.names = sorted(
            os.path.relpath(os.path.join(at, name), truth)
            for at, _, files in os.walk(truth)
            for name in files
        )
        self.directories = sorted({os.path.dirname(name) for name in self.names})
        self.reads: Counter[str] = Counter()
        self.errors: list[tuple[float, float, int, str]] = []
        self.wrong: list[str] = []
        self.slow: list[tuple[float, float, str]] = []

    def again_and_again(self, stop: str) -> None:
        """Read at random until `stop` exists."""
        kinds = [self.pieces] * 6 + [self.whole] * 2 + [self.mapped, self.listing, self.absent]
        while not os.path.exists(stop):
            self.random.choice(kinds)()

    def once(self) -> None:
        """Read every file in a random order, each in one of the ways."""
        for name in self.random.sample(self.names, len(self.names)):
            self.random.choice([self.pieces, self.whole, self.mapped])(name)
        for directory in self.directories:
            self.listing(directory)

    def report(self) -> str:
        """Return what came, as JSON."""
        members = {"reads": self.reads, "errors": self.errors, "wrong": self.wrong[:20], "slow": self.slow}
        return json.dumps(members)

    # ---- ways to read ----

    def pieces(self, name: str = "") -> None:
        name = name or self.random.choice(self.names)
        with open(os.path.join(self.truth, name), "rb") as expected:
            size = os.fstat(expected.fileno()).st_size
            with self.opened(name) as file:
                for _ in range(READS_PER_OPEN):
                    at = self.random.randrange(max(size, 1))
                    got = self.timed("pieces", name, lambda: os.pread(file.fileno(), PIECE, at))  # noqa: B023
                    self.compare(name, at, got, os.pread(expected.fileno(), PIECE, at))

    def whole(self, name: str = "") -> None:
        name = name or self.random.choice(self.names)
        with open(os.path.join(self.truth, name), "rb") as expected, self.opened(name) as file:
            content = expected.read()
            at = 0
            while got := self.timed("whole", name, lambda: os.pread(file.fileno(), 1 << 17, at)):  # noqa: B023
                self.compare(name, at, got, content[at : at + len(got)])
                at += len(got)
            if at != len(content):
                self.wrong.append(f"{name}: {at} bytes instead of {len(content)}")

    def mapped(self, name: str = "") -> None:
        name = name or self.random.choice(self.names)
        with open(os.path.join(self.truth, name), "rb") as expected, self.opened(name) as file:
            size = os.fstat(expected.fileno()).st_size
            if not size:
                return
            with mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as pages:
                for _ in range(4):
                    at = self.random.randrange(size)
                    got = self.timed("mapped", name, lambda: pages[at : at + 100])  # noqa: B023
                    self.compare(name, at, got, os.pread(expected.fileno(), 100, at))

    def listing(self, directory: str | None = None) -> None:
        directory = self.random.choice(self.directories) if directory is None else directory
        path = os.path.join(self.root, directory)
        got = self.timed("listing", directory, lambda: sorted(os.listdir(path)))
        if got != sorted(os.listdir(os.path.join(self.truth, directory))):
            self.wrong.append(f"{directory}: {len(got)} names")

    def absent(self) -> None:
        path = os.path.join(self.root, f"absent-{self.random.randrange(10**9)}")
        if self.timed("absent", path, lambda: os.path.lexists(path)):
            self.wrong.append(path)

    # ---- what every way shares ----

    def opened(self, name: str) -> io.FileIO:
        path = os.path.join(self.root, name)
        file = self.timed("open", name, lambda: open(path, "rb", buffering=0))  # noqa: SIM115  the caller closes it
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file

    def timed(self, kind: str, name: str, read: Callable[[], T]) -> T:
        first = time.monotonic()
        while True:
            begin = time.monotonic()
            try:
                return read()
            except OSError as error:
                self.errors.append((begin, time.monotonic(), error.errno or 0, name))
                if time.monotonic() - first > PATIENCE_S:
                    raise
                time.sleep(0.01)
            finally:
                end = time.monotonic()
                self.reads[kind] += 1
                if end - begin > SLOW_S:
                    self.slow.append((begin, end, name))

    def compare(self, name: str, at: int, got: bytes, expected: bytes) -> None:
        if got != expected:
            self.wrong.append(f"{name} at {at}: {len(got)} bytes, not the {len(expected)} that are there")


def main() -> None:
    """Read, then report."""
    root, truth, seed, stop = sys.argv[1:5]
    reader = Reader(root, truth, int(seed))
    try:
        reader.again_and_again(stop) if stop else reader.once()
    finally:
        print(reader.report())


if __name__ == "__main__":
    main()
