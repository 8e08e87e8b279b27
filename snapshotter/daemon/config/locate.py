"""Where in a TOML text each table and key stands, because `tomllib` does not tell.

`locate` walks a text that `tomllib` has already accepted, so it only has to find statements, not judge them: a
table header, or a key with the value that follows it. Dotted keys and arrays of tables get their own lines;
what is inside an array or an inline table is found at the key that holds it.

Pure; works in time proportional to the text.
"""

from __future__ import annotations

import bisect
import re
import tomllib
from collections.abc import Mapping

Path = tuple[str | int, ...]
"""Keys from the top; an int counts the entries of an array of tables from 0."""

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_QUOTED_KEY = re.compile(r"""'[^'\n]*'|"(?:\\.|[^"\\\n])*\"""")
_COMMENT = re.compile(r"#[^\n]*")
_STRING = re.compile(
    r"""
      \"{3} (?: \\. | [^\\] )*? \"{3,5}   # up to two quotes may stand before the closing three
    | '{3} .*? '{3,5}
    | " (?: \\. | [^"\\\n] )* "
    | ' [^'\n]* '
    """,
    re.VERBOSE | re.DOTALL,
)


class Lines:
    """Line numbers, from 1, by path."""

    def __init__(self, lines: Mapping[Path, int]) -> None:
        self._lines = lines

    def of(self, path: Path) -> int:
        """Return the line of `path`, or of the nearest thing that holds it; 1 when nothing does."""
        for length in range(len(path), 0, -1):
            if path[:length] in self._lines:
                return self._lines[path[:length]]
        return 1


def locate(text: str) -> Lines:
    """Return the lines of all tables and keys of `text`, which must be valid TOML."""
    return Lines(_Walk(text).run())


class _Walk:
    """One pass over a text; `_at` is the offset of the next character to look at."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._newlines = [match.start() for match in re.finditer("\n", text)]
        self._table: Path = ()
        self._entries: dict[Path, int] = {}
        """How many entries each array of tables has so far."""
        self._lines: dict[Path, int] = {}

    def run(self) -> dict[Path, int]:
        """Return the line of each path."""
        while self._at < len(self._text):
            start = self._text[self._at]
            if start in " \t\r\n":
                self._at += 1
            elif start == "#":
                self._skip(_COMMENT)
            elif start == "[":
                self._header()
            else:
                self._pair()
        return self._lines

    def _header(self) -> None:
        line = self._line()
        is_array = self._text.startswith("[[", self._at)
        self._at += 2 if is_array else 1
        names = self._names()
        self._at += 2 if is_array else 1
        path: Path = ()
        for name in names[:-1]:
            path = self._into((*path, name))
        path = (*path, names[-1])
        if is_array:
            self._lines.setdefault(path, line)
            self._entries[path] = self._entries.get(path, 0) + 1
        path = self._into(path)
        self._lines.setdefault(path, line)
        self._table = path

    def _into(self, path: Path) -> Path:
        """Return `path`, or its newest entry when it is an array of tables."""
        count = self._entries.get(path)
        return path if count is None else (*path, count - 1)

    def _pair(self) -> None:
        line = self._line()
        path = self._table
        for name in self._names():
            path = (*path, name)
            self._lines.setdefault(path, line)
        self._value()

    def _names(self) -> list[str]:
        """Read a key, dotted or not, and the blanks around it."""
        names: list[str] = []
        while True:
            self._blanks()
            if match := _QUOTED_KEY.match(self._text, self._at):
                names.append(tomllib.loads(f"key = {match[0]}")["key"])
            elif match := _BARE_KEY.match(self._text, self._at):
                names.append(match[0])
            self._at = match.end() if match else self._at + 1
            self._blanks()
            if not self._text.startswith(".", self._at):
                return names
            self._at += 1

    def _value(self) -> None:
        """Go past "= value": to the end of the line on which all brackets are closed."""
        depth = 0
        while self._at < len(self._text):
            here = self._text[self._at]
            if here in "\"'":
                self._skip(_STRING)
                continue
            if here == "#":
                self._skip(_COMMENT)
                continue
            if here == "\n" and depth == 0:
                return
            depth += (here in "[{") - (here in "]}")
            self._at += 1

    def _blanks(self) -> None:
        while self._at < len(self._text) and self._text[self._at] in " \t":
            self._at += 1

    def _skip(self, pattern: re.Pattern[str]) -> None:
        match = pattern.match(self._text, self._at)
        self._at = match.end() if match else self._at + 1

    def _line(self) -> int:
        return bisect.bisect_left(self._newlines, self._at) + 1
