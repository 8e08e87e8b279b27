"""The keeper: makes the mounts, holds their descriptors, and sees to it that somebody answers them.

For each mount there is one task with one loop, whatever happens:

    asleep --(a request that needs a server, or `wake`)--> waking --(forked)--> awake
      ^                                                                           |
      +----------- the server ended: idle, killed or crashed; RESEND -------------+

Starting, waking and recovering are therefore the same path, and a server that was killed in the middle of
a read differs from one that went to sleep only in that there is something to send again. A mount ends when the
kernel says so (POLLERR on its descriptor): after `unmount`, as soon as its last user is gone.

It owns the descriptors (with copies at the holder), the counter pages, and the servers' control sockets.
It never resolves a path at or below a mount.

Concurrency: trio; public methods may be called from any task of the loop that runs `run`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import trio

from snapshotter import messages
from snapshotter.counters import CounterPage
from snapshotter.errors import ProcessFailed, SnapshotterError
from snapshotter.fuse import kernel, mounting, server
from snapshotter.fuse.counters import NAMES
from snapshotter.fuse.forker import Child, Forker
from snapshotter.fuse.holding import HolderClient
from snapshotter.fuse.mountpoint import (
    Mountpoint,
    MountSpec,
    RootFacts,
    State,
    answer_one,
    is_dead,
    make_mount,
    parse_holder_name,
)
from snapshotter.layer.tree import Tree
from snapshotter.units import Digest

_log = logging.getLogger(__name__)

SERVER_UID_BASE = 0x7000_0000
"""First uid of layer servers; each snapshot id has its own, so that no server may signal or trace another.
From here to 0x7FFD_FFFF neither distributions nor systemd (UIDS-GIDS.md) hand out anything."""

SERVER_UIDS = 1 << 20

_FIRST_BACKOFF_S = 0.05
_MAX_BACKOFF_S = 2.0
_SHORT_LIFE_S = 0.2
"""A server that ends sooner than this has crashed: it needs some 10 ms to adopt, and never sleeps that early."""

_FREE_TRIES = 3
"""Crashes in a row after which successors wait, longer each time."""


class FetcherGate(Protocol):
    """What the keeper needs of the fetcher: a socket per server."""

    def connect(self, layer: Digest) -> int | None:
        """Return a new descriptor that talks to the fetcher about `layer` (the caller owns it), None if down."""


class Keeper:
    """Keeps every lazy mount of the host answered."""

    def __init__(
        self,
        *,
        holder: HolderClient,
        forker: Forker,
        gate: FetcherGate,
        idle_timeout: float,
        read_budget: float,
        read_ahead_kb: int,
        on_gone: Callable[[MountSpec, Mapping[str, int]], None],
    ) -> None:
        self._holder = holder
        self._forker = forker
        self._gate = gate
        self._idle_timeout = idle_timeout
        self._read_budget = read_budget
        self._read_ahead_kb = read_ahead_kb
        self._on_gone = on_gone
        self._mounts: dict[int, Mountpoint] = {}
        self._nursery: trio.Nursery | None = None
        self._fetchers = 0
        """How many fetchers there have been: a server that was forked meanwhile has a socket to a dead one."""

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look after the mounts until cancelled. They stay mounted; their servers end with the daemon."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    @property
    def mounts(self) -> Mapping[int, Mountpoint]:
        """Every mount by snapshot id."""
        return self._mounts

    def set_limits(self, *, idle_timeout: float, read_budget: float) -> None:
        """Give other limits (seconds) to the layer servers that start from now on."""
        self._idle_timeout, self._read_budget = idle_timeout, read_budget

    async def mount(self, spec: MountSpec) -> Mountpoint:
        """Mount a layer, asleep. Raises OSError, ValueError (kernel too old; an older mount of this snapshot has
        not ended yet), ProcessFailed (no holder), InvalidLayerFile (its tree).

        Order: mount, store the descriptor, answer INIT. A crash between any two leaves a dead mount, which
        `restore` detaches and makes again.
        """
        if spec.snapshot_id in self._mounts:
            raise ValueError(
                f"snapshot {spec.snapshot_id} is mounted already, or its last mount has not ended yet"
            )
        facts = await trio.to_thread.run_sync(_facts, spec.tree)
        fd, unique, init = await trio.to_thread.run_sync(make_mount, spec.target)
        try:
            mountpoint = _mountpoint(spec, fd, init, facts)
            await trio.to_thread.run_sync(self._holder.put, mountpoint.holder_name, fd)
            os.write(fd, kernel.init_reply(unique, init))
        except BaseException:
            mounting.detach(spec.target)
            os.close(fd)
            raise
        self._set_read_ahead(fd)
        self._keep(mountpoint)
        return mountpoint

    async def restore(self, specs: Iterable[MountSpec]) -> list[MountSpec]:
        """Take back what the holder kept, mount again what it did not keep; return what could not be mounted."""
        held: dict[int, tuple[str, int, kernel.Init]] = {}
        for name, fd in (await trio.to_thread.run_sync(self._holder.kept)).items():
            try:
                snapshot_id, init = parse_holder_name(name)
            except ValueError:  # of another version; it is for that one to take back
                _log.warning("the holder keeps something unknown", extra={"held": name})
                os.close(fd)
                continue
            if is_dead(fd):
                os.close(fd)
                await trio.to_thread.run_sync(self._holder.drop, name)
            else:
                held[snapshot_id] = (name, fd, init)
        failed = []
        for spec in specs:
            try:
                if spec.snapshot_id in held:
                    await self._readopt(spec, *held.pop(spec.snapshot_id))
                else:
                    while await trio.to_thread.run_sync(mounting.detach, spec.target):
                        _log.warning("a dead mount was detached", extra={"snapshot": spec.snapshot_id})
                    await self.mount(spec)
            except (OSError, ValueError, SnapshotterError) as error:
                _log.error(
                    "a lazy mount could not be restored",
                    extra={"snapshot": spec.snapshot_id, "layer": spec.layer, "error": str(error)},
                )
                failed.append(spec)
        for name, fd, _init in held.values():
            _log.warning("the holder kept a mount that nobody knows; it is let go", extra={"mount": name})
            os.close(fd)
            await trio.to_thread.run_sync(self._holder.drop, name)
        return failed

    def wake(self, snapshot_ids: Iterable[int]) -> None:
        """Start servers for these mounts, without waiting; unknown ids are ignored."""
        for snapshot_id in snapshot_ids:
            if snapshot_id in self._mounts:
                self._mounts[snapshot_id].wanted.set()

    async def unmount(self, snapshot_id: int) -> bool:
        """Take a mount out of the tree; return whether there was one. It ends when its last user is gone."""
        mountpoint = self._mounts.get(snapshot_id)
        if mountpoint is None:
            return False
        await trio.to_thread.run_sync(mounting.detach, mountpoint.spec.target)
        mountpoint.detached = True
        return True

    def fetcher_changed(self) -> None:
        """Give every awake server a socket to the new fetcher."""
        self._fetchers += 1
        for mountpoint in self._mounts.values():
            self._connect(mountpoint)

    def _connect(self, mountpoint: Mountpoint) -> None:
        if mountpoint.control is None:
            return
        fd = self._gate.connect(mountpoint.spec.layer)
        if fd is not None:
            try:
                messages.send(mountpoint.control, {"op": "fetcher"}, [fd])
            except OSError:
                pass  # it has just ended; its successor gets a socket of its own
            finally:
                os.close(fd)

    def counters(self, snapshot_id: int) -> dict[str, int]:
        """Return the counters of one mount by name. Raises KeyError."""
        page = CounterPage(self._mounts[snapshot_id].counters_fd, NAMES, writable=False)
        try:
            return page.snapshot()
        finally:
            page.close()

    async def holder_changed(self) -> None:
        """Give a new holder everything that the old one had. Raises ProcessFailed."""
        for mountpoint in list(self._mounts.values()):
            await trio.to_thread.run_sync(self._holder.put, mountpoint.holder_name, mountpoint.fd)

    async def _readopt(self, spec: MountSpec, name: str, fd: int, init: kernel.Init) -> None:
        """Take back one mount. One that cannot be served is let go: its readers get an error instead of waiting."""
        try:
            facts = await trio.to_thread.run_sync(_facts, spec.tree)
        except (OSError, SnapshotterError):
            os.close(fd)
            await trio.to_thread.run_sync(self._holder.drop, name)
            await trio.to_thread.run_sync(mounting.detach, spec.target)
            raise
        os.write(fd, kernel.resend_notice())
        self._keep(_mountpoint(spec, fd, init, facts))

    def _set_read_ahead(self, fd: int) -> None:
        try:
            mounting.set_read_ahead(fd, self._read_ahead_kb)
        except OSError as error:
            _log.warning("read-ahead stays at the kernel's default", extra={"error": str(error)})

    def _keep(self, mountpoint: Mountpoint) -> None:
        assert self._nursery is not None
        self._mounts[mountpoint.spec.snapshot_id] = mountpoint
        self._nursery.start_soon(self._look_after, mountpoint)

    async def _look_after(self, mountpoint: Mountpoint) -> None:
        while await self._sleep_until_wanted(mountpoint):
            mountpoint.state = State.WAKING
            mountpoint.wanted = trio.Event()
            await self._serve_once(mountpoint)
            mountpoint.state = State.ASLEEP
            try:
                os.write(mountpoint.fd, kernel.resend_notice())
            except OSError:
                break  # ENODEV: the mount ended while it was served
        await self._forget(mountpoint)

    async def _sleep_until_wanted(self, mountpoint: Mountpoint) -> bool:
        """Return True when a server is needed, False when the mount is gone."""
        while not mountpoint.wanted.is_set():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_after, nursery.cancel_scope, mountpoint.wanted.wait)
                await trio.lowlevel.wait_readable(mountpoint.fd)
                nursery.cancel_scope.cancel()
            if is_dead(mountpoint.fd):
                return False
            if mountpoint.wanted.is_set():
                break
            try:
                needs_server = await trio.to_thread.run_sync(
                    answer_one, mountpoint.fd, mountpoint.facts, abandon_on_cancel=True
                )
            except OSError:
                return False
            if needs_server:
                break
        return not is_dead(mountpoint.fd)

    async def _serve_once(self, mountpoint: Mountpoint) -> None:
        """Fork a server for the mount and wait for its end. A fork that fails is an end at once."""
        await trio.sleep(_backoff(mountpoint.short_lives))
        near, far = messages.pair()
        near.setblocking(False)
        started, fetchers = trio.current_time(), self._fetchers
        try:
            with far:
                child = await self._fork(mountpoint, far.fileno())
        except (ProcessFailed, OSError) as error:
            near.close()
            mountpoint.short_lives += 1
            _log.error(
                "no layer server could be started",
                extra={
                    "layer": mountpoint.spec.layer,
                    "snapshot": mountpoint.spec.snapshot_id,
                    "error": str(error),
                },
            )
            return
        mountpoint.control, mountpoint.pid, mountpoint.state = near, child.pid, State.AWAKE
        if self._fetchers != fetchers:
            self._connect(mountpoint)
        try:
            await trio.lowlevel.wait_readable(child.pidfd)
        finally:
            mountpoint.control, mountpoint.pid = None, 0
            near.close()
            os.close(child.pidfd)
        lived = trio.current_time() - started
        mountpoint.short_lives = mountpoint.short_lives + 1 if lived < _SHORT_LIFE_S else 0

    async def _fork(self, mountpoint: Mountpoint, control: int) -> Child:
        spec = mountpoint.spec
        fds = {"fuse": mountpoint.fd, "counters": mountpoint.counters_fd, "control": control}
        opened = []
        try:
            for name, path in (("tree", spec.tree), ("data", spec.data), ("spans", spec.spans)):
                opened.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
                fds[name] = opened[-1]
            fetcher = self._gate.connect(spec.layer)
            if fetcher is not None:
                opened.append(fetcher)
                fds["fetcher"] = fetcher
            arguments = server.ServeArguments(
                layer=spec.layer,
                init=mountpoint.init.to_text(),
                idle_timeout=self._idle_timeout,
                read_budget=self._read_budget,
            )
            uid = SERVER_UID_BASE + spec.snapshot_id % SERVER_UIDS
            return await self._forker.fork("serve", uid=uid, arguments=arguments.to_json(), fds=fds)
        finally:
            for fd in opened:
                os.close(fd)

    async def _forget(self, mountpoint: Mountpoint) -> None:
        mountpoint.state = State.GONE
        try:
            await trio.to_thread.run_sync(self._holder.drop, mountpoint.holder_name)
        except ProcessFailed as error:
            _log.warning("the holder keeps a mount that is gone", extra={"error": str(error)})
        counters = self.counters(mountpoint.spec.snapshot_id)
        del self._mounts[mountpoint.spec.snapshot_id]
        os.close(mountpoint.fd)
        os.close(mountpoint.counters_fd)
        mountpoint.gone.set()
        self._on_gone(mountpoint.spec, counters)


def _mountpoint(spec: MountSpec, fd: int, init: kernel.Init, facts: RootFacts) -> Mountpoint:
    return Mountpoint(spec, fd, init, facts, CounterPage.create(f"soci-counters-{spec.snapshot_id}", NAMES))


def _facts(path: str) -> RootFacts:
    """Read from a tree what the keeper answers by itself. Raises InvalidLayerFile, OSError."""
    with open(path, "rb") as file:
        tree = Tree(file.fileno())
    try:
        blocks = -(-tree.uncompressed_size // 4096)
        return RootFacts(root=tree.row(kernel.ROOT_ID), blocks=blocks, files=tree.entry_count)
    finally:
        tree.close()


async def _cancel_after(scope: trio.CancelScope, wait: Callable[[], object]) -> None:
    await wait()  # type: ignore[misc]
    scope.cancel()


def _backoff(short_lives: int) -> float:
    """Return seconds to wait before the next server: none at first, then more and more."""
    if short_lives < _FREE_TRIES:
        return 0.0
    return min(_FIRST_BACKOFF_S * 2.0 ** (short_lives - _FREE_TRIES), _MAX_BACKOFF_S)
