"""The writer of compiled trees: zTOC in, the bytes of `layer/layout.py` out.

Applying the entries (`layer/apply.py`) gives inodes and names; here they are laid out. Compiling is pure and
deterministic: the same zTOC and the same attributes of parent layers give the same bytes.

Concurrency: a pure function, run in a process of its own (`compile_files`), so that neither its memory nor its
time nor a surprise in a hostile zTOC is the daemon's.
"""

from __future__ import annotations

import gc
import os
import stat
import struct
import zlib
from array import array
from collections.abc import Mapping
from typing import Final

from snapshotter.errors import DigestMismatch, InvalidZtoc, UnsupportedLayer
from snapshotter.layer import layout
from snapshotter.layer.apply import Applied, DirAttributes, apply_entries
from snapshotter.layer.attributes import OPAQUE
from snapshotter.layer.header import NO_FINGERPRINT, fingerprint
from snapshotter.layer.layout import TreeFlags
from snapshotter.layer.scratch import Inode
from snapshotter.units import Digest, digest_hex, sha256_digest
from snapshotter.ztoc.model import Ztoc
from snapshotter.ztoc.parse import parse
from snapshotter.ztoc.spans import Span, spans_of

__all__ = ["DirAttributes", "compile_files", "compile_tree"]

_NO_ATTRIBUTES: Final[Mapping[bytes, DirAttributes]] = {}
_NO_DIGEST: Final = Digest("sha256:" + "0" * 64)
_MAX_HEAP: Final = 0xFFFFFFFF  # offsets in it have 32 bits
_REGULAR: Final = 0o10
_NODE_SIZE: Final = layout.NODE.size
_pack_node: Final = layout.NODE.pack_into


def compile_tree(
    ztoc: Ztoc,
    *,
    base: bool = False,
    inherited: Mapping[bytes, DirAttributes] = _NO_ATTRIBUTES,
    ztoc_digest: Digest = _NO_DIGEST,
) -> bytes:
    """Return the compiled tree of a layer.

    `base` says that it is the bottom layer of its image, where whiteouts remove instead of hide; `inherited` gives
    the attributes of directories in the parent layers, by path without leading slash, for those that this
    layer only implies (`Tree.implicit_dirs`); `ztoc_digest` is kept for whoever wonders.

    Raises UnsupportedLayer for what containerd would refuse or lazy layers cannot show, InvalidZtoc for numbers
    that no file can have.
    """
    applied = apply_entries(ztoc.entries, base=base, inherited=inherited)
    try:
        writer = _Writer(ztoc, applied)
        writer.add()
        return writer.finish(base=base, ztoc_digest=ztoc_digest)
    except (struct.error, OverflowError) as error:
        raise InvalidZtoc(f"zTOC: a number is out of range: {error}") from error


def compile_files(
    ztoc_fd: int,
    out_fd: int,
    *,
    digest: Digest,
    base: bool = False,
    inherited: Mapping[bytes, DirAttributes] = _NO_ATTRIBUTES,
) -> None:
    """Compile the zTOC file `ztoc_fd`, whose own digest is `digest`, into the empty file `out_fd`.

    Raises DigestMismatch, InvalidZtoc, UnsupportedLayer, OSError.
    """
    size = os.fstat(ztoc_fd).st_size
    if not size:
        raise InvalidZtoc("zTOC file is empty")
    # Nothing here makes cycles, and looking for them among a million values takes 40 % of the time.
    gc.disable()
    try:
        data = os.pread(ztoc_fd, size, 0)
        found = sha256_digest(data)
        if found != digest:
            raise DigestMismatch(f"zTOC file is {found} instead of {digest}")
        ztoc = parse(data)
        del data  # of a million files it would be a seventh of all memory
        tree = memoryview(compile_tree(ztoc, base=base, inherited=inherited, ztoc_digest=digest))
    finally:
        gc.enable()
    while tree:
        tree = tree[os.write(out_fd, tree) :]


class _Heap:
    """Names, targets and values, each different one stored once."""

    def __init__(self) -> None:
        self.size = 0
        self._offsets: dict[bytes, int] = {}

    def add(self, data: bytes) -> int:
        """Return the offset of `data`. Raises UnsupportedLayer when the heap is full."""
        offset = self._offsets.get(data)
        if offset is None:
            offset = self._offsets[data] = self.size
            self.size += len(data)
            if self.size > _MAX_HEAP:
                raise UnsupportedLayer("the names of this layer need more than 4 GiB")
        return offset

    def bytes(self) -> bytes:
        return b"".join(self._offsets)


class _Writer:
    """The sections of one tree while they grow."""

    def __init__(self, ztoc: Ztoc, applied: Applied) -> None:
        self._ztoc = ztoc
        self._applied = applied
        self._rows = applied.highest_ino
        self._nodes = bytearray(self._rows * layout.NODE.size)
        self._entries = array("I")
        self._keys = array("I")
        self._xattrs = array("I")
        self._xattr_count = 0
        self._implicit = array("I")
        self._heap = _Heap()
        self._flags = TreeFlags.NONE
        self._inode_count = 0
        self._content_bytes = 0

    def add(self) -> None:
        """Lay out everything from the root on, one directory after another, so that entries of one are neighbours."""
        directories = [(self._applied.root, layout.NO_ENTRY)]
        others: list[tuple[Inode, int]] = []
        for directory, entry in directories:  # grows while it is walked
            first, subdirectories = len(self._keys), len(directories)
            self._add_entries(directory, directories, others)
            directory.links = 2 + len(directories) - subdirectories
            self._add_node(directory, entry, first, len(self._keys) - first)
            if directory.number >= layout.FIRST_ENTRY_INO + len(self._ztoc.entries):
                self._implicit.append(directory.number)
                self._flags |= TreeFlags.HAS_IMPLICIT_DIRS
        for inode, entry in others:
            self._add_node(inode, entry, self._heap.add(inode.target), len(inode.target))
        self._inode_count = len(directories) + len(others)

    def finish(self, *, base: bool, ztoc_digest: Digest) -> bytes:
        """Return the whole file."""
        ztoc, spans = self._ztoc, spans_of(self._ztoc)
        slots = self._hash_table()
        heap = self._heap.bytes()
        header = layout.Header(
            flags=self._flags | (TreeFlags.BASE if base else TreeFlags.NONE),
            algorithm=ztoc.compression.algorithm,
            rows=self._rows,
            inode_count=self._inode_count,
            tar_entry_count=len(ztoc.entries),
            content_bytes=self._content_bytes,
            compressed_size=ztoc.compressed_size,
            uncompressed_size=ztoc.uncompressed_size,
            blob_header_end=spans[0].compressed_start if spans else 0,
            slot_count=len(slots),
            span_count=len(spans),
            entry_count=len(self._keys),
            xattr_count=self._xattr_count,
            implicit_count=len(self._implicit),
            heap_size=len(heap),
            ztoc_digest=bytes.fromhex(digest_hex(ztoc_digest)),
        )
        starts = array("Q", [span.uncompressed_start for span in spans])
        packed = b"".join(map(_pack_span, spans))
        sections = (self._nodes, slots, starts, packed, self._entries, self._xattrs, self._implicit, heap)
        return b"".join((header.pack(), *sections))

    def _add_entries(
        self, directory: Inode, directories: list[tuple[Inode, int]], others: list[tuple[Inode, int]]
    ) -> None:
        """Add the entries of one directory; what is met for the first time goes to one of the lists."""
        parent, heap_add, keys, entries = directory.number, self._heap.add, self._keys, self._entries
        for name, inode in sorted((directory.children or {}).items()):
            if inode.children is not None:
                directories.append((inode, len(keys)))
            else:
                inode.links += 1
                if inode.links == 1:
                    others.append((inode, len(keys)))
            keys.append(zlib.crc32(name, parent))
            entries.extend((heap_add(name), len(name), inode.number, parent))

    def _add_node(self, inode: Inode, entry: int, first: int, count: int) -> None:
        data_offset, header_start, mark = 0, 0, NO_FINGERPRINT
        mode, number = inode.mode, inode.entry
        if mode >> 12 == _REGULAR:
            source = self._ztoc.entries[number]
            data_offset, header_start = source.offset, self._ztoc.header_starts[number]
            mark = fingerprint(source, self._applied.moments[number])
            self._content_bytes += inode.size
        elif inode.rdev == 0 and stat.S_ISCHR(mode):
            self._flags |= TreeFlags.HAS_WHITEOUTS
        first_xattr = self._xattr_count
        if inode.xattrs:
            self._add_xattrs(inode.xattrs)
        _pack_node(
            self._nodes,
            (inode.number - 1) * _NODE_SIZE,
            mode,
            inode.links,
            inode.uid,
            inode.gid,
            inode.rdev,
            entry,
            inode.size,
            inode.mtime_ns,
            data_offset,
            header_start,
            mark,
            first,
            count,
            first_xattr,
            self._xattr_count - first_xattr,
        )

    def _add_xattrs(self, xattrs: dict[bytes, bytes]) -> None:
        self._flags |= TreeFlags.HAS_XATTRS
        if OPAQUE in xattrs:
            self._flags |= TreeFlags.HAS_OPAQUE
        for name, value in sorted(xattrs.items()):
            self._xattrs.extend((self._heap.add(name), len(name), self._heap.add(value), len(value)))
        self._xattr_count += len(xattrs)

    def _hash_table(self) -> array[int]:
        """Return the slots: at least twice as many as entries; who finds no free one stays out."""
        count = 1 << max(4, (2 * len(self._keys)).bit_length())
        mask = count - 1
        slots = array("Q", bytes(count * layout.SLOT_SIZE))
        for number, key in enumerate(self._keys, 1):
            position = key & mask
            if slots[position]:
                for position in range(key + 1, key + layout.PROBES):
                    if not slots[position & mask]:
                        break
                else:
                    continue
            slots[position & mask] = key << 32 | number
        return slots


def _pack_span(span: Span) -> bytes:
    return layout.SPAN.pack(
        span.compressed_start,
        span.compressed_end,
        span.uncompressed_start,
        span.uncompressed_end,
        span.window_offset,
        span.bits,
        bytes.fromhex(digest_hex(span.digest)),
    )
