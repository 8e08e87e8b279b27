"""From a file to a `Config`, or to a list of everything that is wrong with it.

Stateless; blocks on one small read, so it belongs before the daemon's loops start (or in a thread).
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snapshotter.daemon.config.locate import Lines, locate
from snapshotter.daemon.config.reading import Reader
from snapshotter.daemon.config.reference import KeyPath, named
from snapshotter.daemon.config.schema import Config
from snapshotter.errors import ConfigError

DEFAULT_PATH = Path("/etc/soci-snapshotter-grpc/config.toml")

_FILE_MAX = 1 << 20
"""Bytes; a configuration is a page or two, a larger file is the wrong file."""

_AT_LINE = re.compile(r"\s*\(at (?:line (\d+), column \d+|end of document)\)")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration and what its operator should be told, one sentence each."""

    config: Config
    warnings: tuple[str, ...]


def load(path: Path | None = None, *, explicit: bool = False) -> Loaded:
    """Read the file at `path` (None: the default place).

    A missing file means the defaults, unless the operator named it (`explicit`). Raises ConfigError with one
    line for each mistake.
    """
    path = path or DEFAULT_PATH
    try:
        text, mode = _read(path)
    except FileNotFoundError:
        if explicit:
            raise ConfigError(
                f"{path}: no such file; name one that exists, or none for the defaults"
            ) from None
        return Loaded(Config(), ())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    data = _parsed(path, text)
    lines = locate(text)
    reader = Reader(str(path), lines)
    config = reader.config(data)
    if reader.problems:
        raise ConfigError("\n".join(reader.problems))
    return Loaded(config, tuple(_warnings(path, mode, reader.dropped, lines)))


def check(path: Path) -> list[str]:
    """Return every mistake of the file at `path`, in the order of its lines; empty when it is good."""
    try:
        load(path, explicit=True)
    except ConfigError as error:
        return str(error).splitlines()
    return []


def _read(path: Path) -> tuple[str, int]:
    """Return text and mode of a file. Raises OSError, ConfigError."""
    with open(path, "rb", opener=_open_at_once) as file:
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode):
            raise ConfigError(f"{path}: not a regular file")
        data = file.read(_FILE_MAX + 1)
    if len(data) > _FILE_MAX:
        raise ConfigError(f"{path}: larger than {_FILE_MAX} bytes, which no configuration is")
    try:
        return data.decode(), mode
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text") from None


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # somebody may name a FIFO


def _parsed(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = _AT_LINE.search(str(error))
        line = found[1] if found and found[1] else text.rstrip("\n").count("\n") + 1
        raise ConfigError(f"{path}:{line}: not valid TOML: {_AT_LINE.sub('', str(error))}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not valid TOML: nested too deeply") from None


def _warnings(path: Path, mode: int, dropped: list[KeyPath], lines: Lines) -> Iterator[str]:
    if dropped:
        listed = ", ".join(f"{named(at)} (line {lines.of(at)})" for at in sorted(dropped, key=lines.of))
        yield f"{path}: accepted, but without effect in this snapshotter: {listed}"
    if mode & stat.S_IWOTH:
        yield f"{path}: every user of this host may write it; run: chmod o-w {path}"
