"""A keeper with its holder and zygote in a test's own process; files are looked at by child processes only."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from snapshotter.fuse.forker import Forker
from snapshotter.fuse.holding import HolderClient
from snapshotter.fuse.keeper import Keeper
from snapshotter.fuse.mountpoint import MountSpec, State
from snapshotter.fuse.restoring import Mend
from snapshotter.units import Digest


class NoFetcher:
    """A gate behind which nobody is."""

    def connect(self, layer: Digest) -> int | None:
        """Return nothing."""
        return None


class Kept:
    """What a test has in hand."""

    def __init__(self, keeper: Keeper, forker: Forker, holder: HolderClient, gone: list[MountSpec]) -> None:
        self.keeper = keeper
        self.forker = forker
        self.holder = holder
        self.gone = gone

    async def until(self, snapshot_id: int, state: State, seconds: float = 60) -> None:
        """Wait for a mount to be in `state`."""
        with trio.fail_after(seconds):
            while self.keeper.mounts[snapshot_id].state is not state:
                await trio.sleep(0.01)

    async def until_gone(self, snapshot_id: int) -> None:
        """Wait for a mount to end."""
        with trio.fail_after(60):
            while snapshot_id in self.keeper.mounts:
                await trio.sleep(0.01)


@asynccontextmanager
async def keeping(
    root: Path,
    *,
    gate: object = None,
    idle_timeout: float = 60.0,
    read_budget: float = 10.0,
    mend: Mend | None = None,
    leave: bool = False,
    getxattr_unsupported: bool = True,
) -> AsyncIterator[Kept]:
    """Run a keeper below `root`; at the end every mount is taken down and the holder ended.

    With `leave` the keeper only stops, as a daemon that ends: mounts and holder stay for a next one.
    """
    holder = HolderClient(str(root / "h.sock"))
    await trio.to_thread.run_sync(holder.connect)
    gone: list[MountSpec] = []
    forker = Forker(str(root / "empty"), log_level="warning")
    keeper = Keeper(
        holder=holder,
        forker=forker,
        gate=gate or NoFetcher(),  # type: ignore[arg-type]
        idle_timeout=idle_timeout,
        read_budget=read_budget,
        read_ahead_kb=128,
        getxattr_unsupported=getxattr_unsupported,
        on_gone=lambda spec, _counters: gone.append(spec),
        mend=mend,
    )
    kept = Kept(keeper, forker, holder, gone)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(forker.run)
            await nursery.start(keeper.run)
            try:
                yield kept
            finally:
                if not leave:
                    with trio.CancelScope(shield=True):
                        await _take_down(kept)
                nursery.cancel_scope.cancel()
    finally:
        for mountpoint in keeper.mounts.values():
            mountpoint.close()
        pid = holder.pid
        holder.close()
        if not leave:
            os.kill(pid, signal.SIGKILL)


async def _take_down(kept: Kept) -> None:
    for snapshot_id in list(kept.keeper.mounts):
        await kept.keeper.unmount(snapshot_id)
    for snapshot_id in list(kept.keeper.mounts):
        await kept.until_gone(snapshot_id)


async def shell(command: str, seconds: float = 60) -> str:
    """Return what a shell command prints; raises CalledProcessError when it fails."""
    with trio.fail_after(seconds):
        result = await trio.run_process(["sh", "-c", command], capture_stdout=True, capture_stderr=True)
    return result.stdout.decode()
