"""Adoption: how a layer server takes over a mount with stock pyfuse3, as the first or as the fifth.

The mount exists, FUSE_INIT is answered long ago, and libfuse wants neither: it insists on mounting by
itself (but accepts `/dev/fd/N` as something mounted already) and on seeing an INIT. So it is given one end
of a socket pair as its device, we send the kernel's INIT into the other end, libfuse answers there, and
then the real descriptor is put in the socket's place with dup2. The last step asks the kernel for every
request that a predecessor left unanswered (FUSE_NOTIFY_RESEND), or, where the kernel is too old for that, finds them
in the mount's journal; from then on a relay (snapshotter/fuse/relay.py) does the reading.

This leans on one private name of pyfuse3, the module global `_wait_fuse_readable`, which its session loop
looks up before each read; hence the exact pin of pyfuse3, and the daemon's start-up test.

The same hook makes the loop faster: a poll(2) that finds a waiting request saves a round through trio's
scheduler (14.9 -> 19.4 k open+read+close per second, 43 -> 54 k random 4 KiB reads). While no request waits for
anything, the loop looks out a moment itself for the next one: whoever got an answer mostly asks again at once, and waking
a processor that has gone to rest takes longer than most answers.

Concurrency: one session per process (pyfuse3 keeps it in C globals); call `adopt` once, before `trio.run`.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Awaitable, Callable

import pyfuse3
import trio

from snapshotter.fuse import kernel
from snapshotter.fuse.operations import LayerOperations
from snapshotter.fuse.relay import Relay

_INIT_UNIQUE = 2

_HOOK = "_wait_fuse_readable"
"""The private name; tested by the daemon at every start."""

_PATIENCE_MS = 1
"""How long the loop stands still for the next request, with nobody waiting; then it is trio's again."""

_LOOKS = 100
"""How often the loop looks for the next request before it sleeps: some 0.07 ms. By turns with none: a cold start of 13.0 s took
12.4 s (medians of four, faster in three of four pairs), for 0.3 s more of the servers' processor time; opens per second
went from 26 k to 35 k (with 60). With 300 and 1000 looks it was as fast, with 60 no faster."""

_BURST = 32
"""Requests served in a row before other tasks get a turn (span arrivals, the idle clock): about half a
millisecond of work. Unmeasured; anything from 8 to 128 would do."""


def adopt(operations: LayerOperations, fuse_fd: int, init: kernel.Init, relay: Relay | None = None) -> None:
    """Make `operations` answer the mount behind `fuse_fd` once `pyfuse3.main` runs; the relay's copy stays the caller's.

    Raises RuntimeError when libfuse does not play along.
    """
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    device = near.detach()
    pyfuse3.init(operations, f"/dev/fd/{device}", {"fsname=soci"})
    far.send(kernel.synthetic_init(_INIT_UNIQUE, init))
    _install_hook(_Takeover(operations, device, fuse_fd, far, relay))


class _Takeover:
    """The replacement of pyfuse3's wait: two special turns, then a faster version of the original."""

    def __init__(
        self,
        operations: LayerOperations,
        device: int,
        fuse_fd: int,
        far: socket.socket,
        relay: Relay | None,
    ) -> None:
        self._operations = operations
        self._device = device
        self._fuse_fd = fuse_fd
        self._far = far
        self._relay = relay
        self._original: Callable[[], Awaitable[bool]] = getattr(pyfuse3, _HOOK)
        self._poll = select.poll()
        self._left = _BURST
        self._turn = 0
        self._is_taken = False
        self._is_called = False
        self._queue = trio.lowlevel.ParkingLot()

    async def wait(self) -> bool:
        """Return True when a request can be read, False when the session is over.

        pyfuse3 has a hundred tasks that ask; one of them waits here and the others stand in line. All at once, each
        would serve a burst before trio looks for anything else: span arrivals, the keeper's end.
        """
        while self._is_taken:
            await self._queue.park()
            self._is_called = False
        self._is_taken = True
        try:
            return await self._next()
        finally:
            self._is_taken = False
            if self._queue and not self._is_called:
                self._is_called = True
                self._queue.unpark()

    async def _next(self) -> bool:
        if self._turn == 0:
            self._turn = 1
            return True  # libfuse now reads our INIT from the socket
        if self._turn == 1:
            self._turn = 2
            self._take_over()
        if self._relay is not None and self._relay.replay():
            return True
        patience = 0 if self._operations.in_flight else _PATIENCE_MS
        while True:
            if self._look(patience):
                self._left -= 1
                if self._left:
                    if self._relay is None:
                        return True
                    try:
                        if self._relay.take():
                            return True
                    except InterruptedError:
                        pass  # the request was withdrawn; see spanlink
                    except OSError as error:
                        if error.errno == errno.ENODEV:
                            return False
                        raise
                else:
                    self._left = _BURST
                    await trio.lowlevel.checkpoint()
            elif not await self._original():
                return False
            patience = 0

    def _look(self, patience: int) -> bool:
        """Return whether a request waits, after up to `patience` milliseconds."""
        poll = self._poll.poll
        if patience:
            for _ in range(_LOOKS):
                if poll(0):
                    return True
        return bool(poll(patience))

    def _take_over(self) -> None:
        length, error, unique = kernel.OUT_HEADER.unpack_from(self._far.recv(4096))
        if error or unique != _INIT_UNIQUE:
            raise RuntimeError(f"libfuse refused FUSE_INIT: error {error}, unique {unique}, {length} bytes")
        self._poll.register(self._device, select.POLLIN)
        if self._relay is not None:
            self._relay.start(device=self._device, mount=self._fuse_fd, far=self._far)
            return
        os.dup2(self._fuse_fd, self._device, inheritable=False)
        os.close(self._fuse_fd)
        self._far.close()
        os.write(self._device, kernel.resend_notice())


def _install_hook(takeover: _Takeover) -> None:
    if not hasattr(pyfuse3, _HOOK):
        raise RuntimeError(f"pyfuse3 {pyfuse3.__version__} has no {_HOOK}: adoption is impossible")
    setattr(pyfuse3, _HOOK, takeover.wait)
