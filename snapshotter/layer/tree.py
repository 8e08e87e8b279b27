"""The reader of a compiled tree: what a layer looks like as a file system, straight from the mapped file.

`layer/layout.py` describes the bytes and keeps the version history; `layer/compile.py` writes them. Opening
reads the header and nothing else; every answer is computed from a few rows, so that a server that wakes up has
no state to build and a million files cost no memory here.

A number that leads out of its section raises InvalidLayerFile, whatever the file holds; a number that is in
bounds but wrong cannot be told from a right one, which is what the digest of the zTOC it was made from is for.

Concurrency: immutable after construction; every method may be called from any thread. `close` may not run
beside anything else. It deliberately knows nothing of requests, caches, or of what is fetched.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from typing import Final, NamedTuple

from snapshotter.errors import InvalidLayerFile
from snapshotter.layer import layout
from snapshotter.layer.layout import TreeFlags
from snapshotter.units import Digest
from snapshotter.ztoc.model import Algorithm
from snapshotter.ztoc.spans import Span, covering

__all__ = ["Attributes", "Node", "Tree", "TreeFlags"]

_MAX_DEPTH: Final = 4096  # no path of 4 KiB has more names; a damaged file could loop
_LISTING_BATCH: Final = 512  # entries unpacked at a time: 8 KiB, and no view of the map outlives a step

Attributes = tuple[int, int, int, int, int, int, int]
"""mode (with the file type), nlink, uid, gid, rdev, size in bytes, mtime in nanoseconds."""


class Node(NamedTuple):
    """One inode. For a regular file, its bytes are `[data_offset, data_offset + size)` of the tar stream.

    Its tar header is `[header_start, data_offset)` of the tar stream and has `fingerprint`
    (`layer/header.py`); other kinds have 0 and zero bytes there.
    """

    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    mtime_ns: int
    data_offset: int
    header_start: int
    fingerprint: bytes


class Tree:
    """A compiled tree, mapped from `fd`, which the caller may close afterwards.

    Raises InvalidLayerFile when the file is not a tree of this version or has another size than its header says.
    """

    def __init__(self, fd: int) -> None:
        size = os.fstat(fd).st_size
        header = layout.Header.unpack(os.pread(fd, layout.HEADER_SIZE, 0))
        sections = layout.Sections.of(header)
        if sections.end != size or header.slot_count & (header.slot_count - 1) or not header.slot_count:
            raise InvalidLayerFile(f"tree file: {size} bytes where its header says {sections.end}")
        self.flags = TreeFlags(header.flags)
        try:
            self.algorithm = Algorithm(header.algorithm)
        except ValueError as error:
            raise InvalidLayerFile("tree file: unknown compression algorithm") from error
        self.compressed_size = header.compressed_size
        self.uncompressed_size = header.uncompressed_size
        self.blob_header_end = header.blob_header_end
        """Compressed bytes before span 0, which belong to no span."""
        self.node_count = header.inode_count
        """Inodes that exist, the root included (what statfs calls files)."""
        self.highest_ino = header.rows
        self.entry_count = header.tar_entry_count
        """Entries of the zTOC."""
        self.content_bytes = header.content_bytes
        """Bytes of all regular files together, each inode once."""
        self.span_count = header.span_count
        self.ztoc_digest = Digest("sha256:" + header.ztoc_digest.hex())
        """Digest of the zTOC that this tree was compiled from."""
        self._header = header
        self._at = sections
        self._map = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        self._bytes = memoryview(self._map)
        self._slots = self._bytes[sections.slots : sections.starts].cast("Q")
        self._starts = self._bytes[sections.starts : sections.spans].cast("Q")
        self._slot_mask = header.slot_count - 1
        self._rows = header.rows
        self._entry_count = header.entry_count

    def close(self) -> None:
        """Unmap the file; the tree is not usable afterwards."""
        for view in (self._starts, self._slots, self._bytes):
            view.release()
        self._map.close()

    def attributes(self, ino: int) -> Attributes:
        """Return the attributes of `ino` as a bare tuple, for hot paths. Raises KeyError for an unknown number."""
        if not 0 < ino <= self._rows:
            raise KeyError(ino)
        row: Attributes = layout.NODE_ATTRIBUTES.unpack_from(
            self._map, layout.HEADER_SIZE + (ino - 1) * layout.NODE.size
        )
        if not row[0]:
            raise KeyError(ino)
        return row

    def row(self, ino: int) -> Node:
        """Return the inode `ino`. Raises KeyError for an unknown number."""
        if not 0 < ino <= self._rows:
            raise KeyError(ino)
        node = Node._make(
            layout.NODE_PUBLIC.unpack_from(self._map, layout.HEADER_SIZE + (ino - 1) * layout.NODE.size)
        )
        if not node.mode:
            raise KeyError(ino)
        return node

    def extent(self, ino: int) -> tuple[int, int]:
        """Return data_offset and size of `ino`, for hot paths. Raises KeyError for an unknown number."""
        if not 0 < ino <= self._rows:
            raise KeyError(ino)
        mode, size, offset = layout.NODE_EXTENT.unpack_from(
            self._map, layout.HEADER_SIZE + (ino - 1) * layout.NODE.size
        )
        if not mode:
            raise KeyError(ino)
        return offset, size

    def lookup(self, parent: int, name: bytes) -> int:
        """Return the inode called `name` in the directory `parent`, 0 when there is none."""
        key = zlib.crc32(name, parent)
        slots, mask = self._slots, self._slot_mask
        for position in range(key, key + layout.PROBES):
            slot = slots[position & mask]
            if not slot:
                return 0
            if slot >> 32 == key:
                offset, length, ino, directory = self._entry((slot & 0xFFFFFFFF) - 1)
                if directory == parent and length == len(name) and self._heap(offset, length) == name:
                    return ino
        return self._search(parent, name)

    def children(self, ino: int, start: int = 0) -> Iterator[tuple[int, bytes, int]]:
        """Yield (index of the next one, name, inode) for the entries of the directory `ino` from index `start` on.

        In the order of the name bytes; nothing for an inode that is no directory. Raises KeyError for an unknown one.
        """
        first, count = self._directory(ino)
        index = start
        while index < count:
            batch = range(first + index, first + min(index + _LISTING_BATCH, count))
            packed = self._section(
                self._at.entries, layout.ENTRY.size, batch.start, len(batch), self._entry_count
            )
            for name_offset, name_length, child, _ in layout.ENTRY.iter_unpack(packed):
                index += 1
                yield index, self._heap(name_offset, name_length), child

    def readlink(self, ino: int) -> bytes:
        """Return the target of a symbolic link. Raises KeyError when `ino` is none."""
        if self.attributes(ino)[0] >> 12 != 0o12:
            raise KeyError(ino)
        _, offset, length, _, _ = self._references(ino)
        return self._heap(offset, length)

    def xattr(self, ino: int, name: bytes) -> bytes | None:
        """Return the value of one extended attribute, None when absent. Raises KeyError for an unknown inode."""
        for name_offset, name_length, value_offset, value_length in self._xattrs(ino):
            if name_length == len(name) and self._heap(name_offset, name_length) == name:
                return self._heap(value_offset, value_length)
        return None

    def xattr_names(self, ino: int) -> tuple[bytes, ...]:
        """Return the names of the extended attributes of `ino`, sorted. Raises KeyError for an unknown inode."""
        return tuple(self._heap(offset, length) for offset, length, _, _ in self._xattrs(ino))

    def span(self, index: int) -> Span:
        """Return span `index`. Raises IndexError when the layer has no such span."""
        if not 0 <= index < self.span_count:
            raise IndexError(f"span {index} of {self.span_count}")
        compressed_start, compressed_end, start, end, window, bits, digest = layout.SPAN.unpack_from(
            self._map, self._at.spans + index * layout.SPAN.size
        )
        text = Digest("sha256:" + digest.hex())
        return Span(index, compressed_start, compressed_end, start, end, bits, window, text)

    def spans_for(self, start: int, end: int) -> range:
        """Return the spans that hold `[start, end)` of the tar stream; empty for an empty range."""
        return covering(self._starts, start, end)

    def implicit_dirs(self) -> Iterator[tuple[bytes, int]]:
        """Yield (path, inode) of every directory that was made because an entry below needed it."""
        packed = self._map[self._at.implicit : self._at.heap]
        for (ino,) in struct.iter_unpack("<I", packed):
            if not 0 < ino <= self._rows:
                raise InvalidLayerFile(f"tree file: implicit directory {ino} is not an inode")
            yield self.path(ino), ino

    def path(self, ino: int) -> bytes:
        """Return one path of `ino` without a leading slash (b"" for the root). Raises KeyError for an unknown inode."""
        if not 0 < ino <= self._rows:
            raise KeyError(ino)
        names: list[bytes] = []
        while ino != layout.ROOT_INO:
            offset, length, _, parent = self._entry(self._references(ino)[0])
            names.append(self._heap(offset, length))
            if not 0 < parent <= self._rows or len(names) > _MAX_DEPTH:
                raise InvalidLayerFile(f"tree file: inode {ino} is not below the root")
            ino = parent
        return b"/".join(reversed(names))

    def _search(self, parent: int, name: bytes) -> int:
        """Find `name` by bisection, for names that crowded out of the table."""
        try:
            first, count = self._directory(parent)
        except KeyError:
            return 0
        low, high = first, first + count
        while low < high:
            middle = (low + high) // 2
            offset, length, ino, _ = self._entry(middle)
            here = self._heap(offset, length)
            if here == name:
                return ino
            low, high = (middle + 1, high) if here < name else (low, middle)
        return 0

    def _entry(self, index: int) -> tuple[int, int, int, int]:
        if not 0 <= index < self._entry_count:
            raise InvalidLayerFile(f"tree file: no directory entry {index}")
        row: tuple[int, int, int, int] = layout.ENTRY.unpack_from(
            self._map, self._at.entries + index * layout.ENTRY.size
        )
        return row

    def _references(self, ino: int) -> tuple[int, int, int, int, int]:
        """Return entry, first, count, first_xattr and xattr_count of `ino`. Raises KeyError."""
        if not 0 < ino <= self._rows:
            raise KeyError(ino)
        row: tuple[int, int, int, int, int] = layout.NODE_REFERENCES.unpack_from(
            self._map, layout.HEADER_SIZE + (ino - 1) * layout.NODE.size
        )
        return row

    def _directory(self, ino: int) -> tuple[int, int]:
        """Return first and count of the entries of `ino`; (0, 0) when it is no directory. Raises KeyError."""
        if self.attributes(ino)[0] >> 12 != 0o4:
            return 0, 0
        return self._references(ino)[1:3]

    def _xattrs(self, ino: int) -> Iterator[tuple[int, int, int, int]]:
        self.attributes(ino)
        _, _, _, first, count = self._references(ino)
        if not count:
            return iter(())
        packed = self._section(self._at.xattrs, layout.XATTR.size, first, count, self._header.xattr_count)
        return layout.XATTR.iter_unpack(packed)

    def _section(self, section: int, size: int, first: int, count: int, limit: int) -> bytes:
        """Return the rows `[first, first + count)` of a section of `limit` rows. Raises InvalidLayerFile."""
        if first + count > limit:
            raise InvalidLayerFile(f"tree file: rows {first} to {first + count} of {limit}")
        start = section + first * size
        return self._map[start : start + count * size]

    def _heap(self, offset: int, length: int) -> bytes:
        """Return `length` bytes of the heap. Raises InvalidLayerFile when they are not in it."""
        start = self._at.heap + offset
        if start + length > self._at.end:
            raise InvalidLayerFile("tree file: a name lies outside the heap")
        return self._map[start : start + length]
