"""The keeper: makes the mounts, holds their descriptors, and sees to it that somebody answers them.

For each mount there is one task with one loop, whatever happens:

    asleep --(a request that needs a server, or `wake`)--> waking --(forked)--> awake
      ^                                                                           |
      +-- the server ended: idle, killed or crashed; RESEND, or what the journal holds --+

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
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import trio

from snapshotter import messages
from snapshotter.errors import NotFound, SnapshotterError
from snapshotter.fuse import kernel, mounting
from snapshotter.fuse.arguments import ServeArguments
from snapshotter.fuse.blocking import Blocking
from snapshotter.fuse.forker import Child, Forker
from snapshotter.fuse.held import HeldDevices
from snapshotter.fuse.holding import HolderClient
from snapshotter.fuse.mountpoint import (
    Mountpoint,
    MountSpec,
    RootFacts,
    State,
    answer_init,
    answer_one,
    is_dead,
    make_mount,
    strike,
)
from snapshotter.fuse.restoring import Mend, Restorer
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

_STRIKES = 10
"""Servers that end young over the same unanswered request before it is answered with EIO; with the pauses, 5 s."""

_ASKED_PAUSE_S = 0.1
"""A server may ask for a socket to the fetcher this often."""


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
        getxattr_unsupported: bool = True,
        on_gone: Callable[[MountSpec, Mapping[str, int]], None],
        mend: Mend | None = None,
    ) -> None:
        self._held = HeldDevices(holder)
        self._forker = forker
        self._gate = gate
        self._idle_timeout = idle_timeout
        self._read_budget = read_budget
        self._read_ahead_kb = read_ahead_kb
        self._getxattr_unsupported = getxattr_unsupported
        self._on_gone = on_gone
        self._mend = mend
        self._mounts: dict[int, Mountpoint] = {}
        self._blocking = Blocking()
        self._nursery: trio.Nursery | None = None
        self._fetchers = 0
        """How many fetchers there have been: a server that was forked meanwhile has a socket to a dead one."""

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look after the mounts until cancelled. They stay mounted; their servers end with the daemon."""
        with self._blocking.ready():
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

        Order: mount, store the descriptors, answer INIT. A crash between any two leaves a dead mount, which
        `restore` detaches and makes again, or one whose INIT is still to be answered, which it does.
        """
        if spec.snapshot_id in self._mounts:
            raise ValueError(
                f"snapshot {spec.snapshot_id} is mounted already, or its last mount has not ended yet"
            )
        facts = await trio.to_thread.run_sync(RootFacts.read, spec.tree)
        device, unique = await trio.to_thread.run_sync(make_mount, spec.target)
        mountpoint = Mountpoint.of(spec, device, facts)
        try:
            await self._held.put(mountpoint)
            answer_init(device, unique)
        except BaseException:
            mounting.detach(spec.target)
            mountpoint.close()
            with trio.CancelScope(shield=True):
                await self._held.forget(mountpoint.held)
            raise
        self._set_read_ahead(spec.target)
        self._keep(mountpoint)
        return mountpoint

    async def restore(self, specs: Iterable[MountSpec]) -> list[MountSpec]:
        """Take back what the holder kept, mount again what it did not keep; return what could not be mounted.

        What has to be mended first is not waited for.
        """
        assert self._nursery is not None
        restorer = Restorer(self._held, self._nursery, mount=self.mount, keep=self._keep, mend=self._mend)
        return await restorer.restore(specs)

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
        """Return the counters of one mount by name; from any thread. Raises KeyError."""
        try:
            return self._mounts[snapshot_id].counters.snapshot()
        except ValueError:  # it ended between the two
            raise KeyError(snapshot_id) from None

    async def holder_changed(self) -> None:
        """Give a new holder everything that the old one had. Raises ProcessFailed."""
        for mountpoint in list(self._mounts.values()):
            await self._held.put(mountpoint)

    def _set_read_ahead(self, target: str) -> None:
        try:
            mounting.set_read_ahead(target, self._read_ahead_kb)
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
                if mountpoint.short_lives:
                    await self._strike(mountpoint)
                elif mountpoint.init.has_resend:
                    os.write(mountpoint.fd, kernel.resend_notice())
            except OSError:
                break  # ENODEV: the mount ended while it was served
        await self._forget(mountpoint)

    async def _sleep_until_wanted(self, mountpoint: Mountpoint) -> bool:
        """Return True when a server is needed, False when the mount is gone."""
        while not (mountpoint.wanted.is_set() or mountpoint.has_unanswered):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_after, nursery.cancel_scope, mountpoint.wanted.wait)
                await trio.lowlevel.wait_readable(mountpoint.fd)
                nursery.cancel_scope.cancel()
            if is_dead(mountpoint.fd):
                return False
            if mountpoint.wanted.is_set():
                break
            try:
                if await self._blocking.run(lambda: answer_one(mountpoint)):
                    break
            except InterruptedError:
                continue  # whoever asked was killed in time
            except OSError:
                return False
        return not is_dead(mountpoint.fd)

    async def _strike(self, mountpoint: Mountpoint) -> None:
        """Give up requests that no server survives, so that their readers get an error. Raises OSError."""
        try:
            given_up = await self._blocking.run(lambda: strike(mountpoint, _STRIKES))
        except InterruptedError:
            return  # the next short life counts again
        for request in given_up:
            mountpoint.counters.add("given_up_requests")
            _log.error(
                "a request that no layer server survives was answered with an error",
                extra={
                    "layer": mountpoint.spec.layer,
                    "snapshot": mountpoint.spec.snapshot_id,
                    "opcode": request.opcode,
                    "inode": request.nodeid,
                    "servers": _STRIKES,
                },
            )

    async def _serve_once(self, mountpoint: Mountpoint) -> None:
        """Fork a server for the mount and wait for its end. A fork that fails is an end at once."""
        await trio.sleep(_backoff(mountpoint.short_lives))
        near, far = messages.pair()
        near.setblocking(False)
        started, fetchers = trio.current_time(), self._fetchers
        adoptions = mountpoint.adoptions
        with near:
            try:
                with far:
                    child = await self._fork(mountpoint, far.fileno())
            except (SnapshotterError, OSError, trio.TooSlowError) as error:
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
            try:
                if self._fetchers != fetchers:
                    self._connect(mountpoint)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._listen, mountpoint, near)
                    await trio.lowlevel.wait_readable(child.pidfd)
                    nursery.cancel_scope.cancel()
            finally:
                mountpoint.control, mountpoint.pid = None, 0
                os.close(child.pidfd)
        mountpoint.is_damaged = mountpoint.adoptions == adoptions
        lived = trio.current_time() - started
        # One that never adopted has crashed, however long a busy host took over it.
        is_short = lived < _SHORT_LIFE_S or mountpoint.is_damaged
        mountpoint.short_lives = mountpoint.short_lives + 1 if is_short else 0

    async def _listen(self, mountpoint: Mountpoint, control: socket.socket) -> None:
        """Give the server another socket to the fetcher whenever it says that it has lost its own."""
        while True:
            await trio.lowlevel.wait_readable(control)
            try:
                received = messages.receive(control)
            except (OSError, ValueError):
                return
            if received is None:
                return
            for fd in received[1]:
                os.close(fd)
            self._connect(mountpoint)
            await trio.sleep(_ASKED_PAUSE_S)

    async def _fork(self, mountpoint: Mountpoint, control: int) -> Child:
        spec = mountpoint.spec
        fds = {"fuse": mountpoint.fd, "counters": mountpoint.counters_fd, "control": control}
        if mountpoint.journal_fd >= 0:
            fds["journal"] = mountpoint.journal_fd
        opened = []
        try:
            if self._mend is not None and (mountpoint.is_damaged or not _are_there(spec)):
                await self._try_to_mend(self._mend, spec)
            for name, path in _files(spec):
                opened.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
                fds[name] = opened[-1]
            fetcher = self._gate.connect(spec.layer)
            if fetcher is not None:
                opened.append(fetcher)
                fds["fetcher"] = fetcher
            arguments = ServeArguments(
                layer=spec.layer,
                init=mountpoint.init.to_text(),
                idle_timeout=self._idle_timeout,
                read_budget=self._read_budget,
                getxattr_unsupported=self._getxattr_unsupported,
            )
            uid = SERVER_UID_BASE + spec.snapshot_id % SERVER_UIDS
            return await self._forker.fork("serve", uid=uid, arguments=arguments.to_json(), fds=fds)
        finally:
            for fd in opened:
                os.close(fd)

    async def _try_to_mend(self, mend: Mend, spec: MountSpec) -> None:
        """Mend a layer for a server. What cannot be mended may do all the same: only the server knows."""
        try:
            await mend(spec)
        except NotFound:
            pass  # nobody wants it any more, or it is the start-up test's
        except (SnapshotterError, OSError, trio.TooSlowError) as error:
            _log.warning(
                "files of a layer could not be mended",
                extra={"layer": spec.layer, "error": str(error) or type(error).__name__},
            )

    async def _forget(self, mountpoint: Mountpoint) -> None:
        mountpoint.state = State.GONE
        await self._held.forget(mountpoint.held)
        del self._mounts[mountpoint.spec.snapshot_id]
        counters = mountpoint.counters.snapshot()
        mountpoint.close()
        mountpoint.gone.set()
        self._on_gone(mountpoint.spec, counters)


def _files(spec: MountSpec) -> tuple[tuple[str, str], ...]:
    return ("tree", spec.tree), ("data", spec.data), ("spans", spec.spans)


def _are_there(spec: MountSpec) -> bool:
    return all(os.path.exists(path) for _name, path in _files(spec))


async def _cancel_after(scope: trio.CancelScope, wait: Callable[[], object]) -> None:
    await wait()  # type: ignore[misc]
    scope.cancel()


def _backoff(short_lives: int) -> float:
    """Return seconds to wait before the next server: none at first, then more and more."""
    if short_lives < _FREE_TRIES:
        return 0.0
    return min(_FIRST_BACKOFF_S * 2.0 ** (short_lives - _FREE_TRIES), _MAX_BACKOFF_S)
