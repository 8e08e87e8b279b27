"""From parsed TOML to a `Config`, noting everything that is wrong on the way.

A `Reader` serves one file and is used once. It puts a default wherever a value is wrong and goes on, so that
an operator sees all mistakes at once; the caller must not use the result when there are `problems`.

No I/O; conflicts between values that are each right are found in `conflicts.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from snapshotter.daemon.config import reference
from snapshotter.daemon.config.conflicts import conflicts
from snapshotter.daemon.config.keys import (
    Key,
    Table,
    TableList,
    TableMap,
    TextList,
    Value,
    accept,
    keys_of,
    shown,
)
from snapshotter.daemon.config.locate import Lines, Path
from snapshotter.daemon.config.reference import KeyPath, named, table_named
from snapshotter.daemon.config.schema import Config

_TYPE_NAMES = {bool: "true or false", int: "an integer", str: "a text"}


class Reader:
    """Reads one file; `problems` and `dropped` grow while `config` runs."""

    def __init__(self, file: str, lines: Lines) -> None:
        self._file = file
        self._lines = lines
        self._problems: list[tuple[int, str]] = []
        self.dropped: list[KeyPath] = []
        """Keys that the file sets and that are without effect, in the order of `reference.WITHOUT_EFFECT`."""

    @property
    def problems(self) -> list[str]:
        """One line of text for each mistake, in the order of the file."""
        return [text for _, text in sorted(self._problems, key=lambda problem: problem[0])]

    def config(self, data: Mapping[str, Any]) -> Config:
        """Return what `data` says, with defaults wherever it is wrong."""
        config: Config = self._table(Config, self._of_ours(data), ())
        if not self._problems:
            for at, text in conflicts(config):
                self._problem(at, text)
        return config

    def _problem(self, at: Path, text: str, name: str = "") -> None:
        line = self._lines.of(at)
        self._problems.append((line, f"{self._file}:{line}: {name or named(at)}: {text}"))

    def _of_ours(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Return a copy of `data` without the keys that only the reference has."""
        copy = {name: dict(raw) if isinstance(raw, dict) else raw for name, raw in data.items()}
        for at, (wanted, _) in reference.WITHOUT_EFFECT.items():
            raw = _take(copy, at)
            if raw is None:
                continue
            if type(raw) is not wanted:
                self._problem(at, f"must be {_TYPE_NAMES[wanted]}, got {shown(raw)}")
            self.dropped.append(at)
        self._rename_background(copy)
        for name in _FOREIGN_TABLES & copy.keys():
            rest = copy.pop(name)
            if not isinstance(rest, dict):
                self._problem((name,), f"must be a table, got {shown(rest)}", name=table_named((name,)))
                continue
            for key, raw in rest.items():
                self._unknown((name, key), raw, _names_of(None, (name,)))
        return copy

    def _rename_background(self, data: dict[str, Any]) -> None:
        at = ("background_fetch", "disable")
        disable = _take(data, at)
        if disable is not None and not isinstance(disable, bool):
            self._problem(at, f"must be true or false, got {shown(disable)}")
        elif disable and isinstance(fetch := data.setdefault("fetch", {}), dict):
            if fetch.get("background") is True:
                self._problem(at, "is true, but so is [fetch] background; leave one of them out")
            fetch["background"] = False

    def _table(self, table_type: type[Any], data: object, at: Path) -> Any:
        if not isinstance(data, dict):
            self._problem(at, f"must be a table, got {shown(data)}", name=table_named(at))
            return table_type()
        known = {key.name: key for key in keys_of(table_type)}
        for name, raw in data.items():
            if name not in known:
                self._unknown((*at, name), raw, _names_of(table_type, at))
        found: dict[str, Any] = {}
        for name, key in known.items():
            if name in data:
                self._entry(key, data[name], (*at, name), found)
            elif isinstance(key.description, Value) and key.description.required:
                self._problem(at, f"{name} is missing", name=table_named(at))
        return table_type(**found)

    def _entry(self, key: Key, raw: object, at: Path, found: dict[str, Any]) -> None:
        """Put what `raw` means for `key` into `found`, or note a problem."""
        match key.description:
            case Table(type=nested):
                found[key.attribute] = self._table(nested, raw, at)
            case TableMap() as description:
                found[key.attribute] = self._table_map(description, raw, at)
            case TableList(type=nested) if isinstance(raw, list):
                tables = (self._table(nested, entry, (*at, i)) for i, entry in enumerate(raw))
                found[key.attribute] = tuple(tables)
            case TextList() if isinstance(raw, list) and all(isinstance(entry, str) for entry in raw):
                found[key.attribute] = tuple(raw)
            case TableList() | TextList() as description:
                what = "texts" if isinstance(description, TextList) else "tables"
                self._problem(at, f"must be an array of {what}, got {shown(raw)}")
            case Value() as rule:
                try:
                    found[key.attribute] = accept(rule, key.default, raw)
                except ValueError as error:
                    self._problem(at, str(error))

    def _table_map(self, description: TableMap, raw: object, at: Path) -> dict[str, Any]:
        if not isinstance(raw, dict):
            self._problem(at, f"must be a table, got {shown(raw)}", name=table_named(at))
            return {}
        for name in raw:
            if description.names and name not in description.names:
                one_of = ", ".join(f'"{known}"' for known in description.names)
                self._problem((*at, name), f"{description.name} must be one of {one_of}")
        return {name: self._table(description.type, entry, (*at, name)) for name, entry in raw.items()}

    def _unknown(self, at: Path, raw: object, siblings: Mapping[str, str]) -> None:
        what, name = ("table", table_named(at)) if isinstance(raw, dict) else ("key", named(at))
        likely = _most_like(str(at[-1]), siblings)
        self._problem(at, f"unknown {what}" + (f"; did you mean {likely}?" if likely else ""), name)


def all_keys() -> Iterator[KeyPath]:
    """Yield the path of every key that a file may have; an operator's own names in a path are left out."""
    yield from _keys_below(Config, ())
    yield from reference.WITHOUT_EFFECT
    yield from reference.RENAMED


def _keys_below(table_type: type[Any], at: KeyPath) -> Iterator[KeyPath]:
    for key in keys_of(table_type):
        match key.description:
            case Table(type=nested) | TableMap(type=nested) | TableList(type=nested):
                yield from _keys_below(nested, (*at, key.name))
            case _:
                yield (*at, key.name)


def _names_of(table_type: type[Any] | None, at: Path) -> dict[str, str]:
    """Return the names a table at `at` may hold, as written and as people are told them."""
    names: dict[str, str] = {}
    for key in keys_of(table_type) if table_type else ():
        is_table = isinstance(key.description, (Table, TableMap))
        names[key.name] = table_named((*at, key.name)) if is_table else named((*at, key.name))
    fixed = tuple(part for part in at if isinstance(part, str))
    for path in (*reference.WITHOUT_EFFECT, *reference.RENAMED):
        if path[:-1] == fixed:
            names[path[-1]] = named(path)
    return names


_FOREIGN_TABLES = {at[0] for at in (*reference.WITHOUT_EFFECT, *reference.RENAMED) if len(at) > 1} - {
    key.name for key in keys_of(Config)
}
"""Tables of the reference of which no field is ours."""


def _take(data: dict[str, Any], at: KeyPath) -> Any:
    """Remove and return the value at `at`, at most one table deep; None when there is none."""
    holder: Any = data
    for name in at[:-1]:
        holder = holder.get(name)
        if not isinstance(holder, dict):
            return None
    return holder.pop(at[-1], None)


def _most_like(name: str, siblings: Mapping[str, str]) -> str:
    """Return the known name most like `name`: the same in another place, else one of its siblings; or ""."""
    everywhere: dict[str, str] = {}
    for path in all_keys():
        everywhere.setdefault(path[-1].lower(), named(path))
        for length in range(1, len(path)):
            everywhere.setdefault(path[length - 1].lower(), table_named(path[:length]))
    near = {sibling.lower(): shown_as for sibling, shown_as in siblings.items()}
    wanted = name.lower()
    if wanted not in near and wanted in everywhere:
        return everywhere[wanted]
    for names, cutoff in ((near, 0.6), (everywhere, 0.8)):
        if best := difflib.get_close_matches(wanted, names, n=1, cutoff=cutoff):
            return names[best[0]]
    return ""
