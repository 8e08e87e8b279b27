"""The few words of the FUSE kernel protocol that we speak ourselves: INIT, STATFS, GETATTR of a root, OPENDIR, RESEND.

libfuse speaks the rest. The daemon must answer FUSE_INIT before any layer server exists, and it answers
the few requests that would otherwise wake a sleeping layer for nothing. Layouts and numbers are those of
`include/uapi/linux/fuse.h`; all integers are in host order, which for every machine we support is little
endian.

Pure: bytes in, values out. Nothing here reads or writes a descriptor.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

IN_HEADER = struct.Struct("<IIQQIIIHH")
"""len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding."""

OUT_HEADER = struct.Struct("<IiQ")
"""len, error, unique."""

_INIT_IN = struct.Struct("<IIIII")
"""major, minor, max_readahead, flags, flags2; the rest of the 64 bytes is unused."""

INIT_IN_SIZE = 64
_INIT_OUT = struct.Struct("<IIIIHHIIHHIIH")
INIT_OUT_SIZE = 64
_OPEN_OUT = struct.Struct("<QII")
_KSTATFS = struct.Struct("<QQQQQIIII24x")
_ATTR_OUT = struct.Struct("<QII QQQQQQIIIIIIIIII")

LOOKUP, FORGET, GETATTR, READLINK, OPEN, READ, STATFS, RELEASE = 1, 2, 3, 5, 14, 15, 17, 18
GETXATTR, LISTXATTR, FLUSH, INIT, OPENDIR, RELEASEDIR = 22, 23, 25, 26, 27, 29
INTERRUPT, BATCH_FORGET, READDIRPLUS, STATX = 36, 42, 44, 52
NOTIFY_RESEND = 7

WITHOUT_ANSWER = frozenset({FORGET, BATCH_FORGET, INTERRUPT})
"""What the kernel expects no answer to. INTERRUPT says that the reader got a signal, not that it was killed: an answer
of EINTR would surface in programs that handle signals, so the request is answered as if nothing had come."""

MAJOR = 7
OLDEST_MINOR = 36
"""INIT_EXT and 64-byte init_in came with 7.36 (Linux 5.17)."""

ROOT_ID = 1

RESEND_UNIQUE_BIT = 1 << 63
"""Set by the kernel in `unique` of a request that it sends again."""


class Flag:
    """INIT flags, by bit number (the upper 32 travel in flags2)."""

    ASYNC_READ = 1 << 0
    BIG_WRITES = 1 << 5
    DO_READDIRPLUS = 1 << 13
    ASYNC_DIO = 1 << 15
    PARALLEL_DIROPS = 1 << 18
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    INIT_EXT = 1 << 30
    HAS_RESEND = 1 << 39


WANTED = (
    Flag.ASYNC_READ
    | Flag.BIG_WRITES
    | Flag.DO_READDIRPLUS
    | Flag.ASYNC_DIO
    | Flag.PARALLEL_DIROPS
    | Flag.MAX_PAGES
    | Flag.CACHE_SYMLINKS
    | Flag.INIT_EXT
    | Flag.HAS_RESEND
)

MAX_READ = 1 << 20
"""Largest read request in bytes (256 pages, the kernel's limit by default)."""

MAX_BACKGROUND = 64
"""Read-ahead requests in flight per layer; libfuse's default of 12 starves parallel readers of missing spans."""


class Request(NamedTuple):
    """The header of one request from the kernel."""

    opcode: int
    unique: int
    nodeid: int


class Init(NamedTuple):
    """What the kernel said in FUSE_INIT; every later server of the mount is told the same."""

    minor: int
    max_readahead: int
    flags: int

    @property
    def has_resend(self) -> bool:
        """Whether unanswered requests can be asked for again (Linux 6.9)."""
        return bool(self.flags & Flag.HAS_RESEND)

    def to_text(self) -> str:
        """Return a form that fits a file name or FDNAME: letters, digits, dashes."""
        return f"{self.minor}-{self.max_readahead}-{self.flags:x}"

    @classmethod
    def from_text(cls, text: str) -> Init:
        """Read what `to_text` wrote. Raises ValueError."""
        minor, readahead, flags = text.split("-")
        return cls(int(minor), int(readahead), int(flags, 16))


def parse_request(data: bytes | memoryview) -> Request:
    """Return the header of a request. Raises ValueError when it is shorter than a header."""
    if len(data) < IN_HEADER.size:
        raise ValueError(f"FUSE request of {len(data)} bytes is shorter than its header")
    _len, opcode, unique, nodeid, *_rest = IN_HEADER.unpack_from(data)
    return Request(opcode, unique, nodeid)


def parse_init(data: bytes) -> tuple[int, Init]:
    """Return (unique, what the kernel offers) of a FUSE_INIT request. Raises ValueError for anything else."""
    request = parse_request(data)
    if request.opcode != INIT or len(data) < IN_HEADER.size + _INIT_IN.size:
        raise ValueError(f"expected FUSE_INIT, got opcode {request.opcode} in {len(data)} bytes")
    major, minor, readahead, flags, flags2 = _INIT_IN.unpack_from(data, IN_HEADER.size)
    if major != MAJOR or minor < OLDEST_MINOR:
        raise ValueError(f"kernel speaks FUSE {major}.{minor}; {MAJOR}.{OLDEST_MINOR} or newer is needed")
    return request.unique, Init(minor, readahead, flags | flags2 << 32)


def init_reply(unique: int, init: Init) -> bytes:
    """Return our answer to FUSE_INIT: what we want of what the kernel offers."""
    flags = init.flags & WANTED
    body = _INIT_OUT.pack(
        MAJOR,
        init.minor,
        max(init.max_readahead, MAX_READ),
        flags & 0xFFFFFFFF,
        MAX_BACKGROUND,
        MAX_BACKGROUND * 3 // 4,
        4096,  # max_write: nobody writes, and the kernel asks for read buffers larger than this
        1,  # time_gran
        MAX_READ >> 12,  # max_pages
        0,  # map_alignment
        flags >> 32,
        0,  # max_stack_depth
        0,  # request_timeout
    )
    return _reply(unique, body.ljust(INIT_OUT_SIZE, b"\0"))


def synthetic_init(unique: int, init: Init) -> bytes:
    """Return a FUSE_INIT request as the kernel would have sent it, for libfuse in a new server."""
    body = _INIT_IN.pack(
        MAJOR, init.minor, init.max_readahead, init.flags & 0xFFFFFFFF, init.flags >> 32
    ).ljust(INIT_IN_SIZE, b"\0")
    return IN_HEADER.pack(IN_HEADER.size + len(body), INIT, unique, 0, 0, 0, 0, 0, 0) + body


def statfs_reply(unique: int, *, blocks: int, files: int) -> bytes:
    """Return the answer to STATFS: `blocks` of 4 KiB in use, none free, `files` inodes."""
    return _reply(unique, _KSTATFS.pack(blocks, 0, 0, files, 0, 4096, NAME_MAX, 4096, 0))


def attr_reply(
    unique: int, *, mode: int, nlink: int, uid: int, gid: int, size: int, mtime_ns: int, valid: int
) -> bytes:
    """Return the answer to GETATTR of the root directory; `valid` is how long it holds, in seconds."""
    seconds, nanoseconds = divmod(mtime_ns, 1_000_000_000)
    times = (seconds, seconds, seconds, nanoseconds, nanoseconds, nanoseconds)
    body = _ATTR_OUT.pack(
        valid, 0, 0, ROOT_ID, size, (size + 511) // 512, *times, mode, nlink, uid, gid, 0, 4096, 0
    )
    return _reply(unique, body)


def open_reply(unique: int, handle: int) -> bytes:
    """Return the answer to OPENDIR."""
    return _reply(unique, _OPEN_OUT.pack(handle, 0, 0))


def error_reply(unique: int, number: int) -> bytes:
    """Return the answer that a request failed with this errno; with 0, that it is done."""
    return OUT_HEADER.pack(OUT_HEADER.size, -number, unique)


def resend_notice() -> bytes:
    """Return the message that makes the kernel send every unanswered request again."""
    return OUT_HEADER.pack(OUT_HEADER.size, NOTIFY_RESEND, 0)


NAME_MAX = 255
FOREVER_S = 1 << 32
"""Seconds for which entries and attributes hold: layers never change."""


def _reply(unique: int, body: bytes) -> bytes:
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), 0, unique) + body
