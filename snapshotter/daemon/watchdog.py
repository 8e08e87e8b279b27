"""The watchdog: tells systemd that the daemon is well (health.py), but only when it has just been seen to be.

A daemon that is not well says so once in the log; if it stays so, systemd ends it and starts another, which takes the
mounts over.

Concurrency: trio; one task.
"""

from __future__ import annotations

import logging

import trio

from snapshotter.daemon.health import Health
from snapshotter.sdnotify import Notifier

_log = logging.getLogger(__name__)


async def watch(health: Health, notifier: Notifier, interval: float | None) -> None:
    """Say every `interval` seconds that all is well, when it is. Returns at once when nobody wants to know."""
    if interval is None:
        return
    was_well = True
    while True:
        trouble = await health.look(interval / 2)
        if not trouble:
            notifier.watchdog()
        elif was_well:
            _log.error("not well; systemd will start another daemon", extra={"reason": trouble})
        was_well = not trouble
        await trio.sleep(interval)
