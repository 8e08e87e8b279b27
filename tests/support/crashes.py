"""Every write that the fetcher makes to a layer's cache files, recorded, and what a crash leaves of them.

    with recording(monkeypatch) as tape:
        ...                                       # run fetchers
    for point, image in tape.after_kill(points):                # what is there when the process dies at a write
    for point, image in tape.after_power_loss(points, chance):  # what may be there when the host does

A process that is killed leaves all that it has written so far. A host that goes down leaves, of every sector, what it
held at the last sync of its file, or anything that was written to it since: the kernel writes back in any order. The
length of a file is treated in the same way.

Stores into the mapped span file are recorded one by one, each before it happens.
"""

from __future__ import annotations

import os
import random
import threading
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from snapshotter.fetch import pipeline
from snapshotter.layer.holes import punch_hole
from snapshotter.layer.spans import SpanFile

FILES = ("blob", "data", "spans")
SECTORS = {"blob": 4096, "data": 4096, "spans": 512}
"""What a disk writes whole: pages of bulk data; smaller where one page holds much."""

Image = dict[str, bytes]
"""Content by name of the file; a file that was never made is missing."""


@dataclass(frozen=True, slots=True)
class Step:
    """One change of one file: bytes at an offset, a new length (`data` is None), or a sync (`at` is -1)."""

    file: str
    at: int
    data: bytes | None = None

    @property
    def is_sync(self) -> bool:
        """Whether everything before it is on the disk for good."""
        return self.at < 0


@dataclass
class Tape:
    """The steps in order, and marks between them."""

    steps: list[Step] = field(default_factory=list)
    marks: list[tuple[str, int]] = field(default_factory=list)
    """Names, each with the number of steps before it."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, step: Step) -> None:
        """Record a step that is about to be made; from any thread."""
        with self.lock:
            self.steps.append(step)

    def mark(self, name: str) -> None:
        """Note that something is true from here on."""
        with self.lock:
            self.marks.append((name, len(self.steps)))

    def at(self, name: str) -> int:
        """Return the number of steps before the first mark of this name."""
        return next(count for found, count in self.marks if found == name)

    def after_kill(self, points: Collection[int]) -> Iterator[tuple[int, Image]]:
        """Yield (point, what is there) for a process that dies after so many steps, for each of `points`, ascending."""
        for point, disk in self._played(points):
            yield point, {name: bytes(content) for name, content in disk.files.items()}

    def after_power_loss(self, points: Collection[int], chance: random.Random) -> Iterator[tuple[int, Image]]:
        """Yield (point, what may be there) for a host that goes down after so many steps, likewise."""
        for point, disk in self._played(points):
            yield point, disk.survivors(chance)

    def _played(self, points: Collection[int]) -> Iterator[tuple[int, _Disk]]:
        disk = _Disk()
        wanted = set(points)
        for point, step in enumerate([*self.steps, None]):
            if point in wanted:
                yield point, disk
            if step is not None:
                disk.make(step)


class _Disk:
    """Files as they are, and what else each sector may be found to hold."""

    def __init__(self) -> None:
        self.files: dict[str, bytearray] = {}
        self._versions: dict[str, dict[int, list[bytes]]] = defaultdict(dict)
        """By file and sector: what it held at the last sync, and after each change since."""
        self._lengths: dict[str, list[int]] = defaultdict(lambda: [0])

    def make(self, step: Step) -> None:
        """Change a file, or sync it."""
        content = self.files.setdefault(step.file, bytearray())
        if step.is_sync:
            self._versions[step.file].clear()
            self._lengths[step.file] = [len(content)]
            return
        size, versions = SECTORS[step.file], self._versions[step.file]
        sectors = range(step.at // size, -(-(step.at + len(step.data or b"")) // size))
        for sector in sectors:
            versions.setdefault(sector, [_sector(content, sector, size)])
        _apply(content, step)
        if self._lengths[step.file][-1] != len(content):
            self._lengths[step.file].append(len(content))
        for sector in sectors:
            versions[sector].append(_sector(content, sector, size))

    def survivors(self, chance: random.Random) -> Image:
        """Return what may be left when the power goes now."""
        image = {}
        for name, now in self.files.items():
            content, size = bytearray(now), SECTORS[name]
            for sector, versions in self._versions[name].items():
                start = sector * size
                content[start : start + size] = chance.choice(versions)[: len(content) - start]
            image[name] = bytes(content[: chance.choice(self._lengths[name])])
        return image


def _apply(content: bytearray, step: Step) -> None:
    if step.data is None:
        del content[step.at :]
        content.extend(bytes(step.at - len(content)))
    else:
        content.extend(bytes(max(step.at + len(step.data) - len(content), 0)))
        content[step.at : step.at + len(step.data)] = step.data


def _sector(content: bytearray, sector: int, size: int) -> bytes:
    return bytes(content[sector * size : (sector + 1) * size]).ljust(size, b"\0")


def _name(fd: int) -> str:
    """Return which of the recorded files `fd` is, or nothing."""
    name = Path(os.readlink(f"/proc/self/fd/{fd}")).name
    return name if name in FILES else ""


class _Words:
    """The words of a span file, whose stores are recorded."""

    def __init__(self, words: memoryview, tape: Tape) -> None:
        self._words = words
        self._tape = tape

    def __getitem__(self, index: Any) -> Any:
        return self._words[index]

    def __setitem__(self, index: int, value: int) -> None:
        self._tape.add(Step("spans", 8 * index, int(value).to_bytes(8, "little")))
        self._words[index] = value

    def release(self) -> None:
        """Release the words."""
        self._words.release()


@contextmanager
def recording(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tape]:
    """Record what fetchers in this process do to the files of a layer; one layer at a time."""
    tape = Tape()
    with monkeypatch.context() as patch:
        _record_files(patch, tape)
        _record_states(patch, tape)
        yield tape


def _record_files(patch: pytest.MonkeyPatch, tape: Tape) -> None:
    write, punch, truncate, reserve = pipeline._write, punch_hole, os.ftruncate, os.posix_fallocate
    fsync, fdatasync = os.fsync, os.fdatasync

    def recorded_write(fd: int, data: memoryview, start: int) -> None:
        if name := _name(fd):
            tape.add(Step(name, start, bytes(data)))
        write(fd, data, start)

    def recorded_punch(fd: int, start: int, end: int) -> None:
        first, last = -(-start // 4096) * 4096, end // 4096 * 4096
        if first < last:
            tape.add(Step(_name(fd), first, bytes(last - first)))
        punch(fd, start, end)

    def recorded_truncate(fd: int, size: int) -> None:
        if name := _name(fd):
            tape.add(Step(name, size))
        truncate(fd, size)

    def recorded_reserve(fd: int, offset: int, size: int) -> None:
        if (name := _name(fd)) and os.fstat(fd).st_size < size:
            tape.add(Step(name, size))
        reserve(fd, offset, size)

    def recorded_sync(fd: int) -> None:
        fsync(fd)
        if name := _name(fd):
            tape.add(Step(name, -1))

    def recorded_datasync(fd: int) -> None:
        fdatasync(fd)
        if name := _name(fd):
            tape.add(Step(name, -1))

    patch.setattr(pipeline, "_write", recorded_write)
    patch.setattr(pipeline, "punch_hole", recorded_punch)
    for function, replacement in (
        ("ftruncate", recorded_truncate),
        ("posix_fallocate", recorded_reserve),
        ("fsync", recorded_sync),
        ("fdatasync", recorded_datasync),
    ):
        patch.setattr(os, function, replacement)


def _record_states(patch: pytest.MonkeyPatch, tape: Tape) -> None:
    begin, take_over = SpanFile.__init__, SpanFile._take_over

    def recorded_begin(self: SpanFile, fd: int, span_count: int) -> None:
        begin(self, fd, span_count)
        self._words = _Words(self._words, tape)  # type: ignore[assignment]

    def recorded_take_over(self: SpanFile, *arguments: Any, **named: Any) -> None:
        take_over(self, *arguments, **named)
        tape.add(Step("spans", 0, bytes(self._bytes[:112])))  # the identity, which is packed last

    patch.setattr(SpanFile, "__init__", recorded_begin)
    patch.setattr(SpanFile, "_take_over", recorded_take_over)
