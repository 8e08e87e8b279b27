"""Mounts of a former daemon taken back into service: from the holder, or made anew; mended first where that is needed.

    the holder has it, its tree is good     readopted: its users notice nothing
    the holder has it, its tree is not      its readers wait until it is mended; when that fails they get an error
    the holder has not                      mounted anew, as soon as its tree is good

What has to be mended is not waited for, and is tried again for as long as somebody wants the mount.

Concurrency: trio; in the loop and the nursery of the keeper.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable

import trio

from snapshotter.errors import InvalidLayerFile, NotFound, SnapshotterError
from snapshotter.fuse import mounting
from snapshotter.fuse.held import HeldDevices
from snapshotter.fuse.mountpoint import Device, Mountpoint, MountSpec, RootFacts, readopt

_log = logging.getLogger(__name__)

_FIRST_MEND_WAIT_S = 5.0
_MAX_MEND_WAIT_S = 300.0
"""Between tries to mend a layer for a mount that waits for it: what is missing has to come from the registry."""

Mend = Callable[[MountSpec], Awaitable[None]]
"""Makes files of a layer again that are missing or damaged; raises NotFound when its mount is not wanted any more."""


class Restorer:
    """Restores mounts for a keeper: `mount` makes one, `keep` looks after one from then on."""

    def __init__(
        self,
        held: HeldDevices,
        nursery: trio.Nursery,
        *,
        mount: Callable[[MountSpec], Awaitable[Mountpoint]],
        keep: Callable[[Mountpoint], None],
        mend: Mend | None,
    ) -> None:
        self._held = held
        self._nursery = nursery
        self._mount = mount
        self._keep = keep
        self._mend = mend

    async def restore(self, specs: Iterable[MountSpec]) -> list[MountSpec]:
        """Restore mounts; return those that cannot be. What the holder has and nobody knows is let go."""
        held = await self._held.take_back()
        failed = []
        for spec in specs:
            device = held.pop(spec.snapshot_id, None)
            if self._mend is not None and not await trio.to_thread.run_sync(_is_readable, spec.tree):
                self._nursery.start_soon(self._restore_mended, self._mend, spec, device)
            elif not await self._restore(spec, device):
                failed.append(spec)
        for snapshot_id, device in held.items():
            _log.warning(
                "the holder kept a mount that nobody knows; it is let go", extra={"snapshot": snapshot_id}
            )
            await self._held.drop(snapshot_id, device)
        return failed

    async def _restore(self, spec: MountSpec, device: Device | None) -> bool:
        """Take back one mount, or make it again; return whether that was possible."""
        try:
            if device is not None:
                await self._readopt(spec, device)
            else:
                while await trio.to_thread.run_sync(mounting.detach, spec.target):
                    _log.warning("a dead mount was detached", extra={"snapshot": spec.snapshot_id})
                await self._mount(spec)
        except (OSError, ValueError, SnapshotterError) as error:
            _say(spec, error)
            return False
        return True

    async def _readopt(self, spec: MountSpec, device: Device) -> None:
        """Take back one mount. One that cannot be served is let go: its readers get an error instead of waiting."""
        try:
            facts = await trio.to_thread.run_sync(RootFacts.read, spec.tree)
            readopt(device)
        except (OSError, SnapshotterError):
            await self._let_go(spec, device)
            raise
        mountpoint = Mountpoint.of(spec, device, facts)
        self._keep(mountpoint)
        if not device.init.has_resend:
            await self._held.put(mountpoint)  # it may have lost the journal

    async def _restore_mended(self, mend: Mend, spec: MountSpec, device: Device | None) -> None:
        """Restore a mount as soon as its tree can be used; the holder's only if that is at the first try."""
        wait = _FIRST_MEND_WAIT_S
        while True:
            try:
                await mend(spec)
                break
            except (OSError, SnapshotterError, trio.TooSlowError) as error:
                if device is not None:
                    await self._let_go(spec, device)
                    device = None
                if isinstance(error, NotFound):
                    return
                _say(spec, error)
            await trio.sleep(wait)
            wait = min(2 * wait, _MAX_MEND_WAIT_S)
        if await self._restore(spec, device):
            _log.info("a lazy mount is back", extra={"snapshot": spec.snapshot_id, "layer": spec.layer})

    async def _let_go(self, spec: MountSpec, device: Device) -> None:
        await self._held.drop(spec.snapshot_id, device)
        await trio.to_thread.run_sync(mounting.detach, spec.target)


def _is_readable(tree: str) -> bool:
    try:
        RootFacts.read(tree)
    except (OSError, InvalidLayerFile):
        return False
    return True


def _say(spec: MountSpec, error: Exception) -> None:
    _log.error(
        "a lazy mount could not be restored",
        extra={
            "snapshot": spec.snapshot_id,
            "layer": spec.layer,
            "error": str(error) or type(error).__name__,
        },
    )
