"""What a reload changes, and what it leaves to a restart."""

from __future__ import annotations

import dataclasses

from snapshotter.daemon import reloading
from snapshotter.daemon.config import Config


def edited() -> Config:
    """Return a configuration with a live key at the top, a live one in a table, and others."""
    old = Config()
    fuse = dataclasses.replace(old.fuse, read_budget_sec=7.0, read_ahead_kb=64)
    return dataclasses.replace(old, log_level="debug", metrics_address="127.0.0.1:1", fuse=fuse)


def test_every_changed_key_is_named() -> None:
    assert reloading.changed(Config(), edited()) == {
        "log_level",
        "metrics_address",
        "fuse.read_budget_sec",
        "fuse.read_ahead_kb",
    }
    assert reloading.changed(edited(), edited()) == set()


def test_live_keys_change_and_others_stay() -> None:
    now = reloading.with_live(Config(), edited())
    assert (now.log_level, now.fuse.read_budget_sec) == ("debug", 7.0)
    assert now.metrics_address == ""
    assert now.fuse.read_ahead_kb == Config().fuse.read_ahead_kb
    # What waits for a restart is told again at the next reload.
    assert reloading.changed(now, edited()) == {"metrics_address", "fuse.read_ahead_kb"}


def test_every_live_key_exists() -> None:
    for name in reloading.LIVE:
        table, _, key = name.rpartition(".")
        assert hasattr(getattr(Config(), table) if table else Config(), key)
