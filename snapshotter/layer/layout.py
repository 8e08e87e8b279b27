"""The bytes of a compiled tree: what `compile` writes and `Tree` reads.

Little endian throughout, and whole words are read as the host has them: for little-endian hosts only.

    header      HEADER_SIZE bytes; see Header
    nodes       one NODE per inode number from 1; a row with mode 0 is an unused number
    slots       hash table over (parent inode, name): one u64 per slot, crc32 << 32 | index of the entry + 1
    starts      uncompressed start of every span, u64, to be searched without unpacking anything
    spans       one SPAN per span
    entries     one ENTRY per directory entry; those of one directory are neighbours, sorted by name bytes
    xattrs      one XATTR per extended attribute; those of one inode are neighbours, sorted by name bytes
    implicit    inode numbers (u32) of the directories that no tar entry made
    heap        names, link targets, attribute names and values, without separators; equal names are stored once

Sections follow one another without gaps and their sizes follow from the counts in the header, so there is no
offset to check. Only the header is checked when a file is opened; everything else when it is used.

The hash is crc32 because it costs 0.1 us from Python where a keyed hash costs 1 us. Its collisions can be
made at will, so no lookup looks at more than PROBES slots: an entry that finds no free slot among those
stays out of the table, and whoever finds all of them taken searches the sorted entries instead.

Inode numbers are part of the format, because kernels remember them over restarts of a server: 1 is the root,
entry i of the zTOC is i + 2, and what no entry names (implicit directories) follows behind.

History of VERSION: 1 = first.
"""

from __future__ import annotations

import enum
import struct
import zlib
from itertools import accumulate
from typing import Final, NamedTuple, Self

from snapshotter.errors import InvalidLayerFile

VERSION: Final = 1
MAGIC: Final = b"SOCITREE"
ROOT_INO: Final = 1
FIRST_ENTRY_INO: Final = 2

NODE: Final = struct.Struct("<6IQqQQ16s4I")
"""mode, nlink, uid, gid, rdev, entry, size, mtime_ns, data_offset, header_start, fingerprint, first, count,
first_xattr, xattr_count. `entry` is one directory entry that leads here (NO_ENTRY for the root); `first` and
`count` are a directory's entries, or a symbolic link's target in the heap."""

NODE_ATTRIBUTES: Final = struct.Struct("<5I4xQq")
NODE_PUBLIC: Final = struct.Struct("<5I4xQqQQ16s")
NODE_EXTENT: Final = struct.Struct("<I20xQ8xQ")
NODE_REFERENCES: Final = struct.Struct("<20xI48x4I")
NO_ENTRY: Final = 0xFFFFFFFF

ENTRY: Final = struct.Struct("<4I")
"""name offset in the heap, name length, inode number, inode number of the directory."""

XATTR: Final = struct.Struct("<4I")
"""name offset in the heap, name length, value offset in the heap, value length."""

SPAN: Final = struct.Struct("<4QqI4x32s")
"""compressed start and end, uncompressed start and end, window offset in the zTOC, bits, sha256."""

SLOT_SIZE: Final = 8
START_SIZE: Final = 8
INO_SIZE: Final = 4

PROBES: Final = 16
"""Slots that a lookup may see. At most half of the slots are taken: names that are found need 1.4 to 1.7 on
average, and 51 of 102,041 (16 of a million in one directory) stayed out of the table."""

HEADER_SIZE: Final = 256
_HEADER: Final = struct.Struct("<8sI4x15Q32s")  # magic, version, then the fields of Header
_CHECK: Final = struct.Struct("<I")  # crc32 of the header before it


class TreeFlags(enum.IntFlag):
    """What a server may leave out when the flag is not set."""

    NONE = 0
    HAS_XATTRS = 1
    """Some inode has extended attributes (`trusted.overlay.opaque` among them)."""
    HAS_OPAQUE = 2
    """Some directory hides what the layers below have in it."""
    HAS_WHITEOUTS = 4
    """Some inode is a character device 0:0, which hides a name of the layers below."""
    HAS_IMPLICIT_DIRS = 8
    """Some directory has no tar entry: its attributes depend on the parent layers."""
    BASE = 16
    """Compiled for a bottom layer: whiteouts have been applied and are gone."""


class Header(NamedTuple):
    """The numbers at the head of a tree, in the order in which they are stored."""

    flags: int
    algorithm: int
    rows: int
    inode_count: int
    tar_entry_count: int
    content_bytes: int
    compressed_size: int
    uncompressed_size: int
    blob_header_end: int
    slot_count: int
    span_count: int
    entry_count: int
    xattr_count: int
    implicit_count: int
    heap_size: int
    ztoc_digest: bytes

    def pack(self) -> bytes:
        """Return the header's HEADER_SIZE bytes. Raises struct.error when a number does not fit."""
        body = _HEADER.pack(MAGIC, VERSION, *self).ljust(HEADER_SIZE - _CHECK.size, b"\0")
        return body + _CHECK.pack(zlib.crc32(body))

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Return the header in `data`. Raises InvalidLayerFile: not a tree, another version, damaged."""
        if len(data) < HEADER_SIZE or not data.startswith(MAGIC):
            raise InvalidLayerFile("tree file: not a tree")
        _, version, *fields = _HEADER.unpack_from(data)
        if version != VERSION:
            raise InvalidLayerFile(f"tree file: version {version} instead of {VERSION}")
        body = data[: HEADER_SIZE - _CHECK.size]
        if _CHECK.unpack_from(data, len(body))[0] != zlib.crc32(body):
            raise InvalidLayerFile("tree file: damaged header")
        return cls(*fields)


class Sections(NamedTuple):
    """Where each section starts, in file order; `end` is the size of the file."""

    nodes: int
    slots: int
    starts: int
    spans: int
    entries: int
    xattrs: int
    implicit: int
    heap: int
    end: int

    @classmethod
    def of(cls, header: Header) -> Self:
        """Return the sections of a file with this header."""
        sizes = (
            header.rows * NODE.size,
            header.slot_count * SLOT_SIZE,
            header.span_count * START_SIZE,
            header.span_count * SPAN.size,
            header.entry_count * ENTRY.size,
            header.xattr_count * XATTR.size,
            header.implicit_count * INO_SIZE,
            header.heap_size,
        )
        return cls(*accumulate(sizes, initial=HEADER_SIZE))
