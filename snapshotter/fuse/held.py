"""What the holder has of the keeper's mounts: put there, taken back after a restart, forgotten.

Names carry everything that is needed to adopt a mount again (see mountpoint.py). What belongs to no living FUSE
connection, or is a journal without its mount, is let go; what is not recognised stays, for the version that knows
it. A start never fails over either.

Concurrency: trio; the holder is asked from worker threads.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable

import trio

from snapshotter.errors import ProcessFailed
from snapshotter.fuse import kernel
from snapshotter.fuse.holding import HolderClient
from snapshotter.fuse.journal import Journal
from snapshotter.fuse.mountpoint import (
    Device,
    HolderName,
    Mountpoint,
    held_names,
    is_dead,
    parse_holder_name,
)

_log = logging.getLogger(__name__)


class HeldDevices:
    """The descriptors of mounts at one holder."""

    def __init__(self, holder: HolderClient) -> None:
        self._holder = holder

    async def put(self, mountpoint: Mountpoint) -> None:
        """Have a mount's descriptors kept. Raises ProcessFailed."""
        for name, fd in mountpoint.held.items():
            await trio.to_thread.run_sync(self._holder.put, name, fd)

    async def forget(self, names: Iterable[str]) -> None:
        """Have the holder forget; it cannot be helped when it does not answer."""
        for name in names:
            try:
                await trio.to_thread.run_sync(self._holder.drop, name)
            except ProcessFailed as error:
                _log.warning("the holder keeps a mount that is gone", extra={"error": str(error)})

    async def drop(self, snapshot_id: int, device: Device) -> None:
        """Close a device and have it forgotten: if nobody else has it, its mount is dead."""
        names = held_names(snapshot_id, device.init, fd=device.fd, journal_fd=device.journal_fd)
        device.close()
        await self.forget(names)

    async def take_back(self) -> dict[int, Device]:
        """Return the living mounts by snapshot id (the caller owns them). Raises ProcessFailed."""
        found: dict[HolderName, tuple[str, int]] = {}
        useless: list[str] = []
        for name, fd in (await trio.to_thread.run_sync(self._holder.kept)).items():
            parsed = _parse(name)
            if parsed is None:
                os.close(fd)
            elif parsed.is_journal or not is_dead(fd):
                found[parsed] = (name, fd)
            else:
                os.close(fd)
                useless.append(name)
        devices = {}
        for parsed in [each for each in found if not each.is_journal]:
            _name, fd = found.pop(parsed)
            _name, journal_fd = found.pop(parsed._replace(is_journal=True), ("", -1))
            devices[parsed.snapshot_id] = _device(fd, parsed.init, journal_fd)
        for name, journal_fd in found.values():  # of mounts that are gone
            os.close(journal_fd)
            useless.append(name)
        await self.forget(useless)
        return devices


def _parse(name: str) -> HolderName | None:
    try:
        return parse_holder_name(name)
    except ValueError:  # of another version; it is for that one to take back
        _log.warning("the holder keeps something unknown", extra={"held": name})
        return None


def _device(fd: int, init: kernel.Init, journal_fd: int) -> Device:
    """Return a device; one that needs a journal and lost it gets a new one: what was in it is lost."""
    if not init.has_resend and journal_fd < 0:
        _log.warning("the journal of a mount is lost; what was asked of it may never be answered")
        journal_fd = Journal.create("soci-journal")
    return Device(fd, init, journal_fd, Journal(journal_fd))
