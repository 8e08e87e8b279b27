"""The span-state file of one layer: which spans are where, and since when.

The fetcher is its only writer; layer servers map it read-only. Everything that changes a span's state is in
this file, and nothing else may write to it.

States (one record per span):

    MISSING    nothing of it is stored, or nothing that may be trusted.
    FETCHED    its compressed bytes are in `blob` and had the digest that the zTOC asks for.
    INFLATED   and its uncompressed bytes are in `data`: a server may read them.
    SUSPECT    it was FETCHED or INFLATED when a fetcher ended uncleanly or the host went down; nobody may
               read it until the fetcher has hashed the stored bytes again.

Who moves them: only the fetcher, by the table `_MOVES`, which says when; any other move raises RuntimeError,
so that a race becomes a test failure. A waiter in a server never watches this file: it asks with `Want`
and is woken by a message; it looks here only to learn whether it has to ask at all.

Reading without a lock: a record's first word holds state and generation together and is stored at once
(one aligned 64-bit store). The fetcher writes the bytes of a span first and the word afterwards; to evict it
moves the word first (the generation goes up with every step away from INFLATED) and punches the hole
afterwards. A server therefore reads the word, reads the data, and reads the word again: if both words are the
same and say INFLATED, the bytes in between were whole, because any eviction since the first look has
changed the generation for good. If they differ, it asks.

Crashes: the file needs no fsync. While the host stays up its pages and those of `blob` and `data` survive any
process, and bytes always precede their state; still, an unclean end means that the last writer may have been
wrong about anything, so its spans become SUSPECT. When the host goes down the pages reach the disk in any
order; the boot id tells, and everything becomes SUSPECT, even after a clean close. The file is demoted in
place and never shrunk or replaced while servers may map it: they see SUSPECT at once and ask. One that was deleted, or
whose `data` was, is left as it is: its servers read what they have, and a new file has a new `data`.

Concurrency: `SpanFile` belongs to one thread of the fetcher. `SpanView` belongs to one thread of a server.
Deliberately not here: what to fetch or to evict, and any look at `blob` or `data`.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import time
from collections import Counter
from enum import IntEnum
from pathlib import Path
from typing import Final, Self

from snapshotter.errors import InvalidLayerFile
from snapshotter.units import Digest, digest_hex


class SpanState(IntEnum):
    """Where a span is; see the module docstring."""

    MISSING = 0
    FETCHED = 1
    INFLATED = 2
    SUSPECT = 3


VERSION: Final = 1
"""Version of the file. History: 1 = 4 KiB header, records `<BxxxIQ`."""

HEADER_SIZE: Final = 4096
RECORD: Final = struct.Struct("<BxxxIQ")  # state, generation, checksum of the inflated bytes

_MAGIC: Final = b"SPANSTAT"
_IDENTITY: Final = struct.Struct(
    "<8sII32s64s"
)  # magic, version, span count, layer digest, boot id (NUL padded)
_RECORD_WORDS: Final = RECORD.size // 8
_FIRST_RECORD_WORD: Final = HEADER_SIZE // 8

# Words of the header behind the identity; each is written by one aligned store.
_WORD_CLEAN: Final = 32
_WORD_HEADER_FETCHED: Final = 33
_WORD_COMPLETE: Final = 34
_WORD_VERIFIED: Final = 35
_WORD_FETCHED_BYTES: Final = 36
_WORD_INFLATED_BYTES: Final = 37
_WORD_BEGAN_MS: Final = 38
_WORD_OFFLINE_MS: Final = 39

_STATES: Final = tuple(SpanState)
_GENERATION_MASK: Final = 0xFFFFFFFF

_MISSING, _FETCHED, _INFLATED, _SUSPECT = SpanState
_MOVES: Final = frozenset(
    {
        (_MISSING, _FETCHED),  # a range reply had the right digest and is in `blob`
        (_FETCHED, _INFLATED),  # its bytes are in `data`
        (_INFLATED, _FETCHED),  # evicted from `data`, or found bad there
        (_FETCHED, _MISSING),  # evicted from `blob`, or found bad there
        (_INFLATED, _MISSING),  # both dropped at once
        (_SUSPECT, _FETCHED),  # the bytes in `blob` still have the digest
        (_SUSPECT, _INFLATED),  # and those in `data` the checksum
        (_SUSPECT, _MISSING),  # they have not
    }
)


def _new_map(fd: int, size: int, *, writable: bool) -> mmap.mmap:
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    return mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=protection)


def _file_size(span_count: int) -> int:
    return HEADER_SIZE + span_count * RECORD.size


class _Mapping:
    """The mapped file as words and bytes, and what both sides may ask of it."""

    def __init__(self, fd: int, span_count: int, *, writable: bool) -> None:
        self._span_count = span_count
        self._map = _new_map(fd, _file_size(span_count), writable=writable)
        self._bytes = memoryview(self._map)
        self._words = self._bytes.cast("Q")

    @property
    def span_count(self) -> int:
        """How many spans the layer has."""
        return self._span_count

    def word(self, span: int) -> int:
        """Return state (low byte) and generation (high half) of `span` in one number, for `read, pread, compare`.

        Raises IndexError when there is no such span.
        """
        if not 0 <= span < self._span_count:
            raise IndexError(f"span {span} of {self._span_count}")
        return self._words[_FIRST_RECORD_WORD + span * _RECORD_WORDS]

    def state(self, span: int) -> SpanState:
        """Return the state of `span`. Raises IndexError, or InvalidLayerFile when the record is damaged."""
        number = self.word(span) & 0xFF
        if number >= len(_STATES):
            raise InvalidLayerFile(f"span file: span {span} has the unknown state {number}")
        return _STATES[number]

    def generation(self, span: int) -> int:
        """Return how often `span` has left INFLATED (modulo 2**32). Raises IndexError."""
        return self.word(span) >> 32

    def states(self) -> bytes:
        """Return every state as one byte per span."""
        return bytes(self._bytes[HEADER_SIZE : _file_size(self._span_count) : RECORD.size])

    def counts(self) -> dict[SpanState, int]:
        """Return how many spans are in each state; damaged records count as MISSING."""
        seen = Counter(self.states())
        counts = {state: seen[state] for state in SpanState}
        counts[SpanState.MISSING] = self._span_count - sum(counts[s] for s in _STATES[1:])
        return counts

    @property
    def header_fetched(self) -> bool:
        """Whether the blob's bytes before span 0 are in `blob`."""
        return bool(self._words[_WORD_HEADER_FETCHED])

    @property
    def complete(self) -> bool:
        """Whether every byte of the blob is stored."""
        return bool(self._words[_WORD_COMPLETE])

    @property
    def verified(self) -> bool:
        """Whether the whole blob had the layer's digest when it was complete."""
        return bool(self._words[_WORD_VERIFIED])

    @property
    def fetched_bytes(self) -> int:
        """Compressed bytes held in `blob`, as the fetcher counts them."""
        return self._words[_WORD_FETCHED_BYTES]

    @property
    def inflated_bytes(self) -> int:
        """Uncompressed bytes held in `data`, as the fetcher counts them."""
        return self._words[_WORD_INFLATED_BYTES]

    @property
    def offline_after(self) -> float | None:
        """Seconds from the making of this file, which is when the layer was first mounted, to its first `verified`.

        None as long as it is not, and where the host went down in between.
        """
        return self._words[_WORD_OFFLINE_MS] / 1000 or None

    def _unmap(self) -> None:
        self._words.release()
        self._bytes.release()
        self._map.close()


class SpanView(_Mapping):
    """A server's read-only look at the states. Closing `fd` afterwards is fine; the map stays.

    Raises InvalidLayerFile when the file is not a span file of this version.
    """

    def __init__(self, fd: int) -> None:
        size = os.fstat(fd).st_size
        identity = _read_identity(fd, size)
        if identity is None:
            raise InvalidLayerFile("span file: wrong magic, version or size; it is made again by the fetcher")
        super().__init__(fd, identity[0], writable=False)

    def close(self) -> None:
        """Unmap the file."""
        self._unmap()


class SpanFile(_Mapping):
    """The fetcher's side: the only writer. Make one with `create_or_open`."""

    def __init__(self, fd: int, span_count: int) -> None:
        super().__init__(fd, span_count, writable=True)
        self._fd = fd
        self.is_new = False
        """Whether there was none, or none of this layer and version."""

    @classmethod
    def create_or_open(cls, path: Path, span_count: int, *, boot_id: str, digest: Digest) -> Self:
        """Open the span file at `path`, making or mending it, and mark it in use.

        What an unclean end or another boot left as FETCHED or INFLATED is SUSPECT afterwards. A file of another
        layer, span count or version starts afresh, in place. Its blocks are reserved: on a full disk this fails,
        instead of a store into the map (SIGBUS) later. Raises BlockingIOError when another fetcher still has it,
        OSError when the file system refuses.
        """
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size = os.fstat(fd).st_size
            identity = _read_identity(fd, size)
            os.posix_fallocate(fd, 0, _file_size(span_count))
            file = cls(fd, span_count)
        except BaseException:
            os.close(fd)
            raise
        file._take_over(identity, boot_id=boot_id, digest=digest)
        return file

    def fileno(self) -> int:
        """Return the file's descriptor, which stays its own."""
        return self._fd

    def checksum(self, span: int) -> int:
        """Return the checksum that was stored with INFLATED; 0 when `span` has none. Raises IndexError."""
        self.word(span)
        return self._words[_FIRST_RECORD_WORD + span * _RECORD_WORDS + 1]

    def set_fetched(self, span: int) -> None:
        """Say that the compressed bytes of `span` are in `blob` and have their digest.

        From MISSING or SUSPECT; RuntimeError otherwise.
        """
        self._refuse_unless(span, {SpanState.MISSING, SpanState.SUSPECT}, SpanState.FETCHED)
        self._move(span, SpanState.FETCHED, checksum=0)

    def set_inflated(self, span: int, checksum: int) -> None:
        """Say that the uncompressed bytes of `span` are in `data`; `checksum` (64 bits) is theirs.

        From FETCHED, or from SUSPECT after both digest and checksum were found right; RuntimeError otherwise.
        """
        self._move(span, SpanState.INFLATED, checksum=checksum)

    def evict_data(self, span: int) -> None:
        """Take `span` back from INFLATED to FETCHED, before its bytes in `data` are dropped; else RuntimeError."""
        self._refuse_unless(span, {SpanState.INFLATED}, SpanState.FETCHED)
        self._move(span, SpanState.FETCHED, checksum=0)

    def set_missing(self, span: int) -> None:
        """Give `span` up, before its bytes are dropped. From any state; MISSING stays MISSING."""
        if self.state(span) is not SpanState.MISSING:
            self._move(span, SpanState.MISSING, checksum=0)
            self.set_complete(False)

    def set_header_fetched(self, value: bool) -> None:
        """Say whether the bytes before span 0 are in `blob`."""
        self._words[_WORD_HEADER_FETCHED] = value

    def set_complete(self, value: bool) -> None:
        """Say whether every byte of the blob is stored; False takes `verified` back too."""
        if not value:
            self._words[_WORD_VERIFIED] = 0
        self._words[_WORD_COMPLETE] = value

    def set_verified(self, value: bool) -> None:
        """Say whether the complete blob had the layer's digest. The first time tells `offline_after`."""
        if value and self._words[_WORD_BEGAN_MS]:
            self._words[_WORD_OFFLINE_MS] = max(_uptime_ms() - self._words[_WORD_BEGAN_MS], 1)
            self._words[_WORD_BEGAN_MS] = 0
        self._words[_WORD_VERIFIED] = value

    def set_fetched_bytes(self, count: int) -> None:
        """Store how many compressed bytes are held."""
        self._words[_WORD_FETCHED_BYTES] = count

    def set_inflated_bytes(self, count: int) -> None:
        """Store how many uncompressed bytes are held."""
        self._words[_WORD_INFLATED_BYTES] = count

    def suspect(self, *, everything: bool = False) -> None:
        """Trust nothing that is said to be stored; with `everything`, nor that the rest is not."""
        if everything:
            for span in range(self._span_count):
                self._words[_FIRST_RECORD_WORD + span * _RECORD_WORDS] |= SpanState.FETCHED
            self._words[_WORD_HEADER_FETCHED] = 1
        self._suspect_everything()

    def close(self) -> None:
        """Mark the file clean and unmap it."""
        self._words[_WORD_CLEAN] = 1
        self.abandon()

    def abandon(self) -> None:
        """Unmap the file as a crash would: the next to open it finds everything suspect."""
        self._unmap()
        os.close(self._fd)

    def _refuse_unless(self, span: int, allowed: set[SpanState], new: SpanState) -> None:
        old = self.state(span)
        if old not in allowed:
            raise RuntimeError(f"illegal move of span {span}: {old.name} to {new.name}")

    def _move(self, span: int, new: SpanState, *, checksum: int) -> None:
        old = self.state(span)
        if (old, new) not in _MOVES:
            raise RuntimeError(f"illegal move of span {span}: {old.name} to {new.name}")
        at = _FIRST_RECORD_WORD + span * _RECORD_WORDS
        generation = self._words[at] >> 32
        if old is SpanState.INFLATED:
            generation = (generation + 1) & _GENERATION_MASK
            self._words[at] = new | generation << 32
            self._words[at + 1] = checksum
        else:
            self._words[at + 1] = checksum
            self._words[at] = new | generation << 32

    def _take_over(self, identity: tuple[int, bytes, bytes] | None, *, boot_id: str, digest: Digest) -> None:
        ours = (self._span_count, bytes.fromhex(digest_hex(digest)), boot_id.encode()[:64])
        if identity is None or identity[:2] != ours[:2]:
            self.is_new = True
            self._reset_records()
            self._words[_WORD_BEGAN_MS] = _uptime_ms()
        elif identity[2] != ours[2] or not self._words[_WORD_CLEAN]:
            self._suspect_everything()
            if identity[2] != ours[2]:
                self._words[_WORD_BEGAN_MS] = 0  # another boot's clock
        self._words[_WORD_CLEAN] = 0
        _IDENTITY.pack_into(self._bytes, 0, _MAGIC, VERSION, ours[0], ours[1], ours[2])

    def _reset_records(self) -> None:
        """Make every span MISSING; generations go up, so that a server in the middle of a read notices."""
        for span in range(self._span_count):
            at = _FIRST_RECORD_WORD + span * _RECORD_WORDS
            if self._words[at]:
                self._words[at] = ((self._words[at] >> 32) + 1 & _GENERATION_MASK) << 32
            self._words[at + 1] = 0
        for word in range(_WORD_CLEAN, _WORD_OFFLINE_MS + 1):
            self._words[word] = 0

    def _suspect_everything(self) -> None:
        """Demote what may be stored; checksums stay, to be compared, and the blob has to be verified again.

        `header_fetched` stays: those few bytes have no digest of their own, are not needed to inflate anything,
        and verifying the blob covers them; without them a layer that is complete could not be so offline.
        """
        for span in range(self._span_count):
            at = _FIRST_RECORD_WORD + span * _RECORD_WORDS
            state, generation = self._words[at] & 0xFF, self._words[at] >> 32
            demoted = SpanState.MISSING if state == 0 or state >= len(_STATES) else SpanState.SUSPECT
            self._words[at] = demoted | (generation + 1 & _GENERATION_MASK) << 32
        for word in (_WORD_COMPLETE, _WORD_VERIFIED):
            self._words[word] = 0


def _uptime_ms() -> int:
    """Return the time since the host's boot: no clock that is set can make it jump."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


def is_of_boot(path: Path, boot_id: str) -> bool:
    """Return whether there is a span file whose states were last changed in the boot `boot_id` of the host.

    If so, a server may read by them before a fetcher has opened it: no page of what they tell of can have been lost.
    """
    try:
        with path.open("rb") as file:
            identity = _read_identity(file.fileno(), os.fstat(file.fileno()).st_size)
    except OSError:
        return False
    return identity is not None and identity[2] == boot_id.encode()[:64]


def boot_id() -> str:
    """Return what the kernel calls this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _read_identity(fd: int, size: int) -> tuple[int, bytes, bytes] | None:
    """Return span count, layer digest and boot id; None when this is no whole file of this version."""
    if size < HEADER_SIZE:
        return None
    magic, version, span_count, digest, boot_id = _IDENTITY.unpack(os.pread(fd, _IDENTITY.size, 0))
    if magic != _MAGIC or version != VERSION or size < _file_size(span_count):
        return None
    return span_count, digest, boot_id.rstrip(b"\0")
