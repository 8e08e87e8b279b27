"""One lazy mount as the keeper sees it: what is mounted where, its descriptor, and who serves it now.

Also the parts of keeping that need no loop: making the mount, and looking at the requests of a sleeping
layer. They block and run in worker threads; none touches a path at or below the mount.

Concurrency: a mountpoint is changed by the keeper's task for it; the blocking functions are called by that task alone,
while no server lives, because a mount has one reader at a time.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import trio

from snapshotter.counters import CounterPage
from snapshotter.fuse import kernel, mounting
from snapshotter.fuse.counters import NAMES
from snapshotter.fuse.journal import Entry, Journal
from snapshotter.layer.tree import Node, Tree
from snapshotter.units import Digest


class State(StrEnum):
    """What a mount does at the moment."""

    ASLEEP = "asleep"
    WAKING = "waking"
    AWAKE = "awake"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class MountSpec:
    """What to mount: everything that outlives the process. Paths are absolute."""

    snapshot_id: int
    layer: Digest
    target: str
    tree: str
    data: str
    spans: str


@dataclass(frozen=True, slots=True)
class RootFacts:
    """What the keeper knows of a layer without looking into it: what `df` and `stat` of its root ask, and its size."""

    root: Node
    blocks: int
    files: int
    compressed_size: int

    @classmethod
    def read(cls, path: str) -> RootFacts:
        """Read from a tree what the keeper answers by itself. Raises InvalidLayerFile, OSError."""
        with open(path, "rb") as file:
            tree = Tree(file.fileno())
        try:
            return cls(
                root=tree.row(kernel.ROOT_ID),
                blocks=-(-tree.uncompressed_size // 4096),
                files=tree.entry_count,
                compressed_size=tree.compressed_size,
            )
        finally:
            tree.close()


@dataclass(slots=True)
class Mountpoint:
    """A mount, its descriptor and its memory."""

    spec: MountSpec
    fd: int
    init: kernel.Init
    journal_fd: int
    """Of the journal, where the kernel cannot send requests again; else -1."""
    journal: Journal
    facts: RootFacts
    counters_fd: int
    counters: CounterPage
    state: State = State.ASLEEP
    detached: bool = False
    pid: int = 0
    control: socket.socket | None = None
    short_lives: int = 0
    is_damaged: bool = False
    """Whether the last server ended before it had opened the layer's files."""
    strikes: dict[int, int] = field(default_factory=dict)
    """Short lives of servers by the unanswered request that they were given."""
    wanted: trio.Event = field(default_factory=trio.Event)
    gone: trio.Event = field(default_factory=trio.Event)

    @classmethod
    def of(cls, spec: MountSpec, device: Device, facts: RootFacts) -> Mountpoint:
        """Return the mountpoint of a mounted device, with counters at zero."""
        counters_fd = CounterPage.create(f"soci-counters-{spec.snapshot_id}", NAMES)
        counters = CounterPage(counters_fd, NAMES, writable=True)
        return cls(
            spec, device.fd, device.init, device.journal_fd, device.journal, facts, counters_fd, counters
        )

    @property
    def held(self) -> dict[str, int]:
        """What the holder keeps, by a name that says all that is needed to adopt it again; the journal comes first."""
        return held_names(self.spec.snapshot_id, self.init, fd=self.fd, journal_fd=self.journal_fd)

    @property
    def has_unanswered(self) -> bool:
        """Whether there are requests that the kernel will not send again by itself, or when asked."""
        return not self.init.has_resend and bool(self.journal.unanswered())

    @property
    def adoptions(self) -> int:
        """How often a server took the mount over."""
        return self.counters.words[self.counters.index("adoptions")]

    def close(self) -> None:
        """Close the descriptors and maps."""
        self.journal.close()
        self.counters.close()
        for fd in (self.fd, self.counters_fd, self.journal_fd):
            if fd >= 0:
                os.close(fd)


@dataclass(slots=True)
class Device:
    """A mounted /dev/fuse: its descriptor, what the kernel said in INIT, and its journal."""

    fd: int
    init: kernel.Init
    journal_fd: int
    journal: Journal

    def close(self) -> None:
        """Close what it has."""
        self.journal.close()
        os.close(self.fd)
        if self.journal_fd >= 0:
            os.close(self.journal_fd)


class HolderName(NamedTuple):
    """What the name of a held descriptor says."""

    snapshot_id: int
    init: kernel.Init
    is_journal: bool


_JOURNAL = "journal"


def held_names(snapshot_id: int, init: kernel.Init, *, fd: int, journal_fd: int) -> dict[str, int]:
    """Return a mount's descriptors by their names at the holder."""
    name = f"{snapshot_id}.{init.to_text()}"
    journal = {f"{name}.{_JOURNAL}": journal_fd} if journal_fd >= 0 else {}
    return journal | {name: fd}


def parse_holder_name(name: str) -> HolderName:
    """Return what a holder name says. Raises ValueError."""
    snapshot_id, init, *rest = name.split(".")
    if rest not in ([], [_JOURNAL]):
        raise ValueError(f"not the name of a mount's descriptor: {name!r}")
    return HolderName(int(snapshot_id), kernel.Init.from_text(init), bool(rest))


def make_mount(target: str) -> tuple[Device, int]:
    """Mount at `target` and read FUSE_INIT; return the device and the unique of the INIT.

    The INIT is not answered: first the descriptors have to be stored. Raises OSError, or ValueError when the
    kernel's protocol is too old; then nothing stays mounted.
    """
    with ExitStack() as undo:
        fd = mounting.open_device()
        undo.callback(os.close, fd)
        journal_fd = Journal.create("soci-journal")
        undo.callback(os.close, journal_fd)
        journal = Journal(journal_fd)
        undo.callback(journal.close)
        mounting.mount(fd, target)
        undo.callback(mounting.detach, target)
        journal.read(fd, 0)
        unique, init = kernel.parse_init(bytes(journal.packet(0)))
        undo.pop_all()
    if init.has_resend:
        journal.close()
        os.close(journal_fd)
        journal, journal_fd = Journal(), -1
    return Device(fd, init, journal_fd, journal), unique


def answer_init(device: Device, unique: int) -> None:
    """Answer FUSE_INIT: from now on the mount is in use. Raises OSError."""
    os.write(device.fd, kernel.init_reply(unique, device.init))
    device.journal.clear(0)


def readopt(device: Device) -> None:
    """Have requests that a former daemon left unanswered come again. Raises OSError when the mount is gone."""
    if device.init.has_resend:
        os.write(device.fd, kernel.resend_notice())
        return
    for slot, request in device.journal.unanswered():
        if request.opcode == kernel.INIT:  # it died between storing the descriptors and answering
            os.write(device.fd, kernel.init_reply(request.unique, device.init))
            device.journal.clear(slot)


def is_dead(fd: int) -> bool:
    """Return whether there is no FUSE connection behind a descriptor, or one that has ended."""
    what = os.fstat(fd)
    if not stat.S_ISCHR(what.st_mode) or what.st_rdev != mounting.DEVICE:
        return True
    poll = select.poll()
    poll.register(fd, 0)
    return bool(poll.poll(0))


def answer_one(mountpoint: Mountpoint) -> bool:
    """Read one request of a sleeping layer; return whether it needs a server.

    What needs none is dropped (FORGET, INTERRUPT) or answered (what `df` and `stat` of the mount ask): otherwise one
    memory reclaim or one `df` would wake every layer of the host. Anything else goes back into the queue, or stays
    in the journal. Blocks when the request that was announced is withdrawn, until a signal.
    Raises OSError: InterruptedError after a signal, ENODEV when the mount is gone.
    """
    fd, journal = mountpoint.fd, mountpoint.journal
    request = journal.read(fd, 0)
    reply = _reply(request, mountpoint)
    if reply is None:
        if mountpoint.init.has_resend:
            os.write(fd, kernel.resend_notice())
            journal.clear(0)
        return True
    if reply:
        with suppress(FileNotFoundError):  # whoever asked was killed meanwhile
            os.write(fd, reply)
    journal.clear(0)
    return False


def _reply(request: kernel.Request, mountpoint: Mountpoint) -> bytes | None:
    """Return the answer that needs no server; empty for no answer, None for what needs one."""
    unique = request.unique
    if request.opcode in kernel.WITHOUT_ANSWER:
        return b""
    if request.opcode == kernel.STATFS:
        return kernel.statfs_reply(unique, blocks=mountpoint.facts.blocks, files=mountpoint.facts.files)
    if request.opcode == kernel.GETATTR and request.nodeid == kernel.ROOT_ID:
        root = mountpoint.facts.root
        return kernel.attr_reply(
            unique, mode=root.mode, nlink=root.nlink, uid=root.uid, gid=root.gid,
            size=root.size, mtime_ns=root.mtime_ns, valid=kernel.FOREVER_S,
        )  # fmt: skip
    if request.opcode == kernel.OPENDIR:
        return kernel.open_reply(unique, request.nodeid)  # handles are inodes, also in operations.py
    if request.opcode == kernel.RELEASEDIR:
        return kernel.error_reply(unique, 0)
    if request.opcode == kernel.STATX:  # libfuse has no answer either: the kernel then asks with GETATTR
        return kernel.error_reply(unique, errno.ENOSYS)
    if request.opcode == kernel.INIT:  # sent again: a daemon died before it had answered
        return kernel.init_reply(unique, mountpoint.init)
    return None


def strike(mountpoint: Mountpoint, limit: int) -> list[kernel.Request]:
    """Count a server's short life against every request that it left; answer those that reach `limit` with EIO.

    Returns the latter. Raises OSError: InterruptedError after a signal (as `answer_one`), ENODEV.
    """
    fd, journal = mountpoint.fd, mountpoint.journal
    if not mountpoint.init.has_resend:
        return _strike(mountpoint, journal.unanswered(), limit)
    os.write(fd, kernel.resend_notice())
    try:
        return _strike(mountpoint, _queued(fd, journal), limit)
    finally:
        for slot, _request in journal.unanswered():
            journal.clear(slot)
        os.write(fd, kernel.resend_notice())


def _strike(mountpoint: Mountpoint, entries: list[Entry], limit: int) -> list[kernel.Request]:
    lives = {entry.request.unique & ~kernel.RESEND_UNIQUE_BIT: entry for entry in entries}
    mountpoint.strikes = {unique: mountpoint.strikes.get(unique, 0) + 1 for unique in lives}
    given_up = [lives[unique] for unique, count in mountpoint.strikes.items() if count >= limit]
    for slot, request in given_up:
        with suppress(FileNotFoundError):
            os.write(mountpoint.fd, kernel.error_reply(request.unique, errno.EIO))
        mountpoint.journal.clear(slot)
    return [request for _slot, request in given_up]


def _queued(fd: int, journal: Journal) -> list[Entry]:
    """Read what is in the kernel's queue, as far as there is room."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    entries = []
    for slot in reversed(journal.free_slots()):
        if not poll.poll(0):
            break
        request = journal.read(fd, slot)
        if request.opcode in kernel.WITHOUT_ANSWER:
            journal.clear(slot)
        else:
            entries.append(Entry(slot, request))
    return entries
