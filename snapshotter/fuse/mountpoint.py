"""One lazy mount as the keeper sees it: what is mounted where, its descriptor, and who serves it now.

Also the parts of keeping that need no loop: making the mount, and looking at one request of a sleeping
layer. Both block and run in worker threads; neither touches a path at or below the mount.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum

import trio

from snapshotter.fuse import kernel, mounting
from snapshotter.layer.tree import Node
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
    """What the keeper answers for a sleeping layer: `df` and the root's attributes."""

    root: Node
    blocks: int
    files: int


@dataclass(slots=True)
class Mountpoint:
    """A mount and its descriptor; changed by the keeper's task for it alone."""

    spec: MountSpec
    fd: int
    init: kernel.Init
    facts: RootFacts
    counters_fd: int
    state: State = State.ASLEEP
    detached: bool = False
    pid: int = 0
    control: socket.socket | None = None
    short_lives: int = 0
    wanted: trio.Event = field(default_factory=trio.Event)
    gone: trio.Event = field(default_factory=trio.Event)

    @property
    def holder_name(self) -> str:
        """The name under which the holder keeps the descriptor: all that is needed to adopt it again."""
        return f"{self.spec.snapshot_id}.{self.init.to_text()}"


def parse_holder_name(name: str) -> tuple[int, kernel.Init]:
    """Return (snapshot id, INIT) of a holder name. Raises ValueError."""
    snapshot_id, _, init = name.partition(".")
    return int(snapshot_id), kernel.Init.from_text(init)


def make_mount(target: str) -> tuple[int, int, kernel.Init]:
    """Mount at `target` and read FUSE_INIT; return (descriptor, unique of the INIT, INIT).

    The INIT is not answered: first the descriptor has to be stored. Raises OSError, or ValueError when the
    kernel's protocol is too old; then nothing stays mounted.
    """
    fd = mounting.open_device()
    try:
        mounting.mount(fd, target)
        try:
            unique, init = kernel.parse_init(os.read(fd, kernel.READ_BUFFER))
        except BaseException:
            mounting.detach(target)
            raise
    except BaseException:
        os.close(fd)
        raise
    return fd, unique, init


def is_dead(fd: int) -> bool:
    """Return whether the connection behind a FUSE descriptor has ended."""
    poll = select.poll()
    poll.register(fd, 0)
    return bool(poll.poll(0))


def answer_one(fd: int, facts: RootFacts) -> bool:
    """Read one request of a sleeping layer; return whether it needs a server.

    What needs none is dropped (FORGET, INTERRUPT) or answered (what `df` and `stat` of the
    mount ask): otherwise one
    memory reclaim or one `df` would wake every layer of the host. Anything else goes back into the queue.
    May block until the next request when the one that was announced is withdrawn; it is right then, too, even if
    a server is awake by that time. Raises OSError (ENODEV when the mount is gone).
    """
    request = kernel.parse_request(os.read(fd, kernel.READ_BUFFER))
    if request.opcode in {kernel.FORGET, kernel.BATCH_FORGET, kernel.INTERRUPT}:
        return False
    if request.opcode == kernel.STATFS:
        reply = kernel.statfs_reply(request.unique, blocks=facts.blocks, files=facts.files)
    elif request.opcode == kernel.GETATTR and request.nodeid == kernel.ROOT_ID:
        root = facts.root
        reply = kernel.attr_reply(
            request.unique, mode=root.mode, nlink=root.nlink, uid=root.uid, gid=root.gid,
            size=root.size, mtime_ns=root.mtime_ns, valid=kernel.FOREVER_S,
        )  # fmt: skip
    elif request.opcode == kernel.OPENDIR:
        reply = kernel.open_reply(request.unique, request.nodeid)  # handles are inodes, also in operations.py
    elif request.opcode == kernel.RELEASEDIR:
        reply = kernel.error_reply(request.unique, 0)
    elif request.opcode == kernel.STATX:  # libfuse has no answer either: the kernel then asks with GETATTR
        reply = kernel.error_reply(request.unique, errno.ENOSYS)
    else:
        os.write(fd, kernel.resend_notice())
        return True
    with suppress(FileNotFoundError):  # whoever asked was killed meanwhile
        os.write(fd, reply)
    return False
