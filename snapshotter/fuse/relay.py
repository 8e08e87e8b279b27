"""Between the kernel and libfuse, for kernels that send a request only once (see snapshotter/fuse/journal.py).

libfuse reads requests and writes answers on one descriptor number, the device. While a relay is in use the device is
the mount's descriptor, except for one moment: the relay reads a request into the journal, puts it into a
socket, puts the socket's other end in the device's place, and lets libfuse read. The handler of that request is
the next code of ours that runs, and the first thing it does (`begin`) is to put the mount's descriptor back, so
every answer goes straight to the kernel. libfuse gets nothing that it would answer before a handler runs:
what is not in PASSED_ON is answered here.

A request's slot is cleared one step after its handler has returned (`end`, then `settle`): pyfuse3 writes the answer in
between without letting any other code run.

Concurrency: one trio loop; `take` and `begin` follow each other without a checkpoint.
"""

from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress

from snapshotter.counters import CounterPage
from snapshotter.fuse import kernel
from snapshotter.fuse.journal import Journal

PASSED_ON = frozenset(
    {
        kernel.LOOKUP, kernel.GETATTR, kernel.READLINK, kernel.OPEN, kernel.READ, kernel.RELEASE, kernel.OPENDIR,
        kernel.READDIRPLUS, kernel.RELEASEDIR, kernel.STATFS, kernel.GETXATTR, kernel.LISTXATTR, kernel.FLUSH,
    }
)  # fmt: skip
"""What LayerOperations has a handler for; anything else is answered ENOSYS, as libfuse and pyfuse3 would."""

_NO_SLOT = -1


class Relay:
    """Hands requests to libfuse, and remembers them until they are answered."""

    def __init__(self, journal: Journal, counters: CounterPage) -> None:
        self._journal = journal
        self._counters = counters
        self._replays = [entry.slot for entry in journal.unanswered()]
        self._free = journal.free_slots()
        self._done: list[int] = []
        self._offered = _NO_SLOT
        self._device = self._mount = self._near = -1
        self._far: socket.socket

    def start(self, *, device: int, mount: int, far: socket.socket) -> None:
        """Take over: `device` is libfuse's descriptor and still one end of a socket, whose other end is `far`."""
        self._device, self._mount, self._far = device, mount, far
        self._near = os.dup(device)
        os.dup2(mount, device, inheritable=False)

    def replay(self) -> bool:
        """Offer a request that a predecessor left, if there is one more; return whether libfuse has one to read."""
        while self._replays:
            slot = self._replays.pop()
            if self._offer(slot, kernel.parse_request(self._journal.packet(slot))):
                return True
        return False

    def take(self) -> bool:
        """Read a request that is waiting; return whether libfuse has one to read. Raises OSError (see Journal.read)."""
        self.settle()
        slot = self._free.pop()
        try:
            request = self._journal.read(self._mount, slot)
        except BaseException:
            self._free.append(slot)
            raise
        return self._offer(slot, request)

    def begin(self) -> int:
        """Be told that a handler starts; return what to give to `end`."""
        os.dup2(self._mount, self._device, inheritable=False)
        slot, self._offered = self._offered, _NO_SLOT
        return slot

    def end(self, slot: int) -> None:
        """Be told that a handler returns: its answer is written before any other code of ours runs."""
        self._done.append(slot)

    def settle(self) -> None:
        """Clear the slots of handlers that have returned. To be called by nobody who is called by a handler."""
        while self._done:
            slot = self._done.pop()
            self._journal.clear(slot)
            self._free.append(slot)

    def _offer(self, slot: int, request: kernel.Request) -> bool:
        if request.opcode in PASSED_ON:
            self._far.send(self._journal.packet(slot))
            self._offered = slot
            os.dup2(self._near, self._device, inheritable=False)
            return True
        if request.opcode in kernel.WITHOUT_ANSWER:
            self._counters.add("requests_forget" if request.opcode != kernel.INTERRUPT else "requests_other")
        else:
            self._counters.add("requests_other")
            with suppress(OSError):  # ENOENT: a predecessor has answered
                os.write(self._mount, kernel.error_reply(request.unique, errno.ENOSYS))
        self._journal.clear(slot)
        self._free.append(slot)
        return False
