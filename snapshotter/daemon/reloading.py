"""SIGHUP: the configuration file is read again, and what can change in a running daemon does.

At once: the log level. From the next pull or layer server on: their limits. Credentials are read from their files at
every use and need no reload. All the rest is named in a warning: it takes a restart, which disturbs no container
either. A file with a mistake in it changes nothing.

Pure; the daemon's composition applies what is found here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from snapshotter.daemon.config import Config

LIVE = frozenset(
    {
        "log_level",
        "mount_timeout_sec",
        "snapshotter.min_layer_size",
        "fuse.idle_timeout_sec",
        "fuse.read_budget_sec",
    }
)
"""Keys that a reload puts into effect."""


def changed(old: Config, new: Config) -> set[str]:
    """Return the names of all keys whose values differ: `log_level`, `fetch.background`."""
    before, after = _flat(old), _flat(new)
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def with_live(running: Config, new: Config) -> Config:
    """Return the configuration that runs from now on: `running`, with the live keys of `new`."""
    tables: dict[str, dict[str, object]] = {}
    for name in LIVE:
        table, _, key = name.rpartition(".")
        tables.setdefault(table, {})[key] = getattr(getattr(new, table) if table else new, key)
    top = tables.pop("", {})
    parts = {table: dataclasses.replace(getattr(running, table), **keys) for table, keys in tables.items()}
    return dataclasses.replace(running, **top, **parts)  # type: ignore[arg-type]


def _flat(table: Any, prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for field in dataclasses.fields(table):
        value, name = getattr(table, field.name), prefix + field.name
        found |= _flat(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
    return found
