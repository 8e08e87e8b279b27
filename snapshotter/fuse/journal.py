"""Requests that were read from the kernel and are not answered yet, in memory that outlives who read them.

A kernel without FUSE_NOTIFY_RESEND (before Linux 6.9) hands each request out once: if its reader is killed, nobody
can ask for it again, and whoever waits for the answer cannot even be killed. So there each mount has a
journal, a memfd that the holder keeps beside the mount's descriptor, and every request is read straight into it:
it is in held memory at the instant at which read(2) returns. The next server finds it there.

A slot is free when the length at its start is 0. It is cleared after the answer was written; who is killed in
between leaves a request that is answered twice, and the kernel takes the second answer for nothing (ENOENT).

With a kernel that can send requests again a journal is only a buffer, in private memory.

Concurrency: one process at a time uses a journal: the keeper while the layer sleeps, its server while awake.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from typing import NamedTuple

from snapshotter.fuse import kernel

SLOTS = 128
"""Requests in hand at once; more than pyfuse3 has tasks (99), so a free one is always found."""

SLOT_SIZE = 20 << 10
"""Bytes of one request: the largest is an ioctl with 16 KiB. Only the first page is ever used by what we serve."""

SIZE = SLOTS * SLOT_SIZE
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_WORDS_PER_SLOT = SLOT_SIZE // 4

_libc = ctypes.CDLL(None, use_errno=True)
_libc.read.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
_libc.read.restype = ctypes.c_ssize_t


class Entry(NamedTuple):
    """An unanswered request and where it is."""

    slot: int
    request: kernel.Request


class Journal:
    """The slots of one mount; behind `fd` (a memfd of `create`), or in private memory without one."""

    def __init__(self, fd: int = -1) -> None:
        self._map = mmap.mmap(fd, SIZE)
        self._bytes = memoryview(self._map)
        self._lengths = self._bytes.cast("I")
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    @staticmethod
    def create(label: str) -> int:
        """Return the descriptor of a new journal, empty; its size is fixed. The caller owns it."""
        fd = os.memfd_create(label, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, SIZE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        return fd

    def read(self, device: int, slot: int) -> kernel.Request:
        """Read the next request into a free slot. May block.

        Raises OSError: InterruptedError after a signal (os.read would go on waiting), ENODEV when the mount is gone.
        """
        self.clear(
            slot
        )  # and have its page in memory: a fault while the kernel copies could cost the request
        if _libc.read(device, self._address + slot * SLOT_SIZE, SLOT_SIZE) < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"read of a FUSE device: {os.strerror(number)}")
        return kernel.parse_request(self.packet(slot))

    def packet(self, slot: int) -> memoryview:
        """Return the bytes of a slot's request."""
        start = slot * SLOT_SIZE
        return self._bytes[start : start + min(self._lengths[slot * _WORDS_PER_SLOT], SLOT_SIZE)]

    def clear(self, slot: int) -> None:
        """Free a slot: one aligned store, so it is done or not done."""
        self._lengths[slot * _WORDS_PER_SLOT] = 0

    def unanswered(self) -> list[Entry]:
        """Return what is there to be answered; a slot that holds no request is cleared."""
        found = []
        for slot in range(SLOTS):
            if self._lengths[slot * _WORDS_PER_SLOT]:
                try:
                    found.append(Entry(slot, kernel.parse_request(self.packet(slot))))
                except ValueError:
                    self.clear(slot)
        return found

    def free_slots(self) -> list[int]:
        """Return the free slots, the lowest last: it is used first, and few pages are ever touched."""
        return [s for s in reversed(range(SLOTS)) if not self._lengths[s * _WORDS_PER_SLOT]]

    def close(self) -> None:
        """Unmap it."""
        self._lengths.release()
        self._bytes.release()
        self._map.close()
