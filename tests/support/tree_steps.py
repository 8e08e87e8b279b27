"""Changes to a tree of files as values, so that one change can be made in two places and the results compared.

A step is a function of the tree's top directory. Modes are set as given, whatever the umask.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.support import treedump

Step = Callable[[Path], None]

_COMPARED = ("path", "type", "mode", "uid", "gid", "rdev", "size", "sha256", "target")


def steps(*parts: Step) -> Step:
    """Return the step that makes each of `parts` in turn."""

    def make(top: Path) -> None:
        for part in parts:
            part(top)

    return make


def file(name: str, content: str, mode: int = 0o644) -> Step:
    """Return the step that makes or overwrites a file."""

    def make(top: Path) -> None:
        (top / name).write_text(content)
        os.chmod(top / name, mode)

    return make


def directory(name: str, mode: int = 0o755) -> Step:
    """Return the step that makes a directory."""

    def make(top: Path) -> None:
        (top / name).mkdir()
        os.chmod(top / name, mode)

    return make


def removed(name: str) -> Step:
    """Return the step that removes a file, or a directory with all that is in it."""

    def make(top: Path) -> None:
        if (top / name).is_dir():
            shutil.rmtree(top / name)
        else:
            (top / name).unlink()

    return make


def owned(name: str, uid: int, gid: int) -> Step:
    """Return the step that changes an owner."""
    return lambda top: os.chown(top / name, uid, gid)


def renamed(old: str, new: str) -> Step:
    """Return the step that renames a file."""
    return lambda top: os.rename(top / old, top / new)


def linked(old: str, new: str) -> Step:
    """Return the step that makes a hard link."""
    return lambda top: os.link(top / old, top / new)


def contents(top: Path) -> list[dict[str, object]]:
    """Return what two trees that look alike have in common: everything but times, link counts and xattrs."""
    entries = treedump.dump(os.fsencode(top))
    return [{key: entry[key] for key in _COMPARED if key in entry} for entry in entries]
