"""The tar stream -> its entries, as Go's archive/tar sees them.

A header region is everything from the end of one entry's data to the start of the next one's: PAX
and GNU pseudo-entries, the header block itself, and the map of a sparse file. It consists of whole
blocks, so one machine that takes block after block serves both the scan of a stream and the check
of a single region against a zTOC.

Entries that Go's reader returns but the format cannot hold (global PAX headers, old GNU sparse files
and the like) are UnsupportedLayer; everything else that is wrong is InvalidTar.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from snapshotter.errors import InvalidTar, UnsupportedLayer
from snapshotter.heap import without_collector
from snapshotter.ztoc import pax
from snapshotter.ztoc.model import TAR_BLOCK, Buffer, FileEntry
from snapshotter.ztoc.tarheader import Header, decode, rfc3339, text

_KINDS = {
    b"0": "reg",
    b"\0": "reg",
    b"1": "hardlink",
    b"2": "symlink",
    b"3": "char",
    b"4": "block",
    b"5": "dir",
    b"6": "fifo",
}

_PSEUDO = frozenset({b"x", b"L", b"K"})

_ZEROS = bytes(TAR_BLOCK)
_UINT32 = 0xFFFFFFFF


class TarScanner:
    """Push parser over a tar stream: `feed` its chunks, `close`, then read `entries` and `end_offset`.

    `entries` are in tar order. `end_offset` is where the archive ends: behind its two zero blocks, or
    at the end of a stream that stops at a header border, or in the padding before one. What follows
    the zero blocks is not looked at. After an error the scanner is of no further use.
    """

    def __init__(self) -> None:
        self.entries: list[FileEntry] = []
        self.end_offset = 0
        self._region = _HeaderRegion()
        self._position = 0
        self._skip = 0
        """Bytes of data and padding still to pass over; the last `_padding` of them may be missing."""
        self._padding = 0
        self._partial = bytearray()
        self._zero_seen = False
        self._ended = False

    def feed(self, chunk: Buffer) -> None:
        """Take the next bytes of the stream; they are not kept. Raises InvalidTar or UnsupportedLayer."""
        with without_collector():
            self._feed(memoryview(chunk))

    def _feed(self, view: memoryview) -> None:
        size = len(view)
        at = 0
        while at < size and not self._ended:
            if self._skip:
                step = min(self._skip, size - at)
                self._skip -= step
                at += step
            elif self._partial or size - at < TAR_BLOCK:
                step = min(TAR_BLOCK - len(self._partial), size - at)
                self._partial += view[at : at + step]
                at += step
                if len(self._partial) == TAR_BLOCK:
                    block = bytes(self._partial)
                    self._partial.clear()
                    self._take(block, self._position + at)
            else:
                at += TAR_BLOCK
                self._take(bytes(view[at - TAR_BLOCK : at]), self._position + at)
        self._position += size

    def close(self) -> None:
        """Say that the stream ends here. Raises InvalidTar when that is in the middle of something."""
        if self._ended:
            return
        if self._skip > self._padding:
            raise InvalidTar(
                f"tar stream ends at {self._position}, {self._skip - self._padding} bytes before the end of"
                f" {self.entries[-1].name!r}"
            )
        if (self._partial or not self._region.at_header) and not self._region.ends_with(self._partial):
            raise InvalidTar(f"tar stream ends at {self._position} within a header")
        self.end_offset = self._position
        self._ended = True

    def _take(self, block: bytes, end: int) -> None:
        """Take the block that ends at stream offset `end`."""
        region = self._region
        if region.at_header and (self._zero_seen or block == _ZEROS):
            self._take_zeros(block, end)
            return
        try:
            entry = region.add(block, end)
        except (InvalidTar, UnsupportedLayer) as error:
            raise type(error)(f"tar stream at {end - TAR_BLOCK}: {error}") from None
        if entry is not None:
            self.entries.append(entry)
            self._padding = -region.data_size % TAR_BLOCK
            self._skip = region.data_size + self._padding

    def _take_zeros(self, block: bytes, end: int) -> None:
        if block != _ZEROS:
            raise InvalidTar(f"tar stream at {end - TAR_BLOCK}: a header behind a zero block")
        if self._zero_seen:
            self._ended = True
            self.end_offset = end
        self._zero_seen = True


def parse_header(region: bytes) -> FileEntry:
    """Return the entry whose header region is `region`, `offset` being the region's length.

    Raises InvalidTar when the region ends before the entry's data begins, or goes on behind that;
    UnsupportedLayer for an entry that cannot be in a zTOC.
    """
    machine = _HeaderRegion()
    for end in range(TAR_BLOCK, len(region) + 1, TAR_BLOCK):
        entry = machine.add(region[end - TAR_BLOCK : end], end)
        if entry is not None:
            if end != len(region):
                raise InvalidTar(f"tar header of {entry.name!r} ends at {end} of {len(region)} bytes")
            return entry
    raise InvalidTar(f"no tar header ends within {len(region)} bytes")


class _HeaderRegion:
    """The machine that takes header regions block by block.

    What pseudo-entries say is kept until the next real header, into which it is merged.
    """

    def __init__(self) -> None:
        self.data_size = 0
        """Bytes of data that follow the region just completed."""
        self._take_payload: Callable[[bytes, int], FileEntry | None] | None = None
        """Who takes the next block when it is not a header."""
        self._flag = b""
        self._missing = 0
        self._payload = bytearray()
        self._records: dict[bytes, bytes] = {}
        self._long_name = b""
        self._long_link = b""
        self._sparse_entry: FileEntry | None = None
        self._sparse_map = pax.SparseMapReader()

    @property
    def at_header(self) -> bool:
        """Whether the next block is a header, and not part of a payload."""
        return self._take_payload is None

    def add(self, block: bytes, end: int) -> FileEntry | None:
        """Take the block that ends at `end`; return the entry when that completes the region."""
        if self._take_payload is not None:
            return self._take_payload(block, end)
        header = decode(block)
        if header.flag in _PSEUDO:
            self._begin_pseudo(header)
            return None
        if header.flag not in _KINDS:
            raise UnsupportedLayer(f"entry {header.name!r} of type {header.flag!r} cannot be in a zTOC")
        if self._records or self._long_name or self._long_link:
            return self._merge(header, end)
        return self._entry(header, rfc3339(header.mtime), end)

    def ends_with(self, partial: Buffer) -> bool:
        """Return whether a stream may end behind `partial`, the begin of a block: only padding is missing.

        Raises InvalidTar when what is complete by that is wrong.
        """
        if self._take_payload is None or self._sparse_entry is not None or len(partial) < self._missing:
            return False
        self._take_payload(bytes(partial), 0)
        return True

    def _begin_pseudo(self, header: Header) -> None:
        if header.size > pax.MAX_PAYLOAD:
            raise InvalidTar(f"extended header of {header.size} bytes")
        self._flag = header.flag
        self._missing = header.size
        self._payload = bytearray()
        self._take_payload = self._pseudo_block
        if not header.size:
            self._pseudo_block(b"", 0)

    def _pseudo_block(self, block: bytes, _end: int) -> None:
        part = block[: self._missing]
        self._payload += part
        self._missing -= len(part)
        if self._missing:
            return
        self._take_payload = None
        payload = bytes(self._payload)
        if self._flag == b"x":
            self._records = pax.parse_records(payload)
        elif self._flag == b"L":
            self._long_name = text(payload)
        else:
            self._long_link = text(payload)

    def _merge(self, header: Header, end: int) -> FileEntry | None:
        """Complete a header with what stood before it. An empty PAX value leaves the field as it is."""
        flag, name, linkname, size, mtime, mode, uid, gid, uname, gname, major, minor = header
        mod_time = (mtime, 0)
        for key, value in self._records.items():
            if not value:
                continue
            match key:
                case b"mtime":
                    mod_time = pax.time(value, key)
                case b"atime" | b"ctime":
                    pax.time(value, key)
                case b"path":
                    name = value
                case b"linkpath":
                    linkname = value
                case b"uname":
                    uname = value
                case b"gname":
                    gname = value
                case b"uid":
                    uid = pax.integer(value, key)
                case b"gid":
                    gid = pax.integer(value, key)
                case b"size":
                    size = pax.integer(value, key)
        name, linkname = self._long_name or name, self._long_link or linkname
        owner = uid, gid, uname, gname
        merged = Header(flag, name, linkname, size, mtime, mode, *owner, major, minor)
        return self._entry(merged, rfc3339(*mod_time), end)

    def _entry(self, header: Header, mod_time: str, end: int) -> FileEntry | None:
        kind = _KINDS[header.flag]
        if header.flag == b"\0" and header.name.endswith(b"/"):
            kind = "dir"
        # Links, directories and devices have no data, whatever their size field says; recording it,
        # as some writers do, would put the derived start of the next header in the wrong place.
        size = header.size if kind == "reg" else 0
        if size < 0:
            raise InvalidTar(f"PAX header of {header.name!r}: negative size")
        records = self._records
        entry = FileEntry(
            header.name,
            kind,
            end,
            size,
            header.linkname,
            header.mode,
            header.uid & _UINT32,
            header.gid & _UINT32,
            header.uname,
            header.gname,
            mod_time,
            header.devmajor,
            header.devminor,
            tuple(sorted(records.items())) if records else (),
        )
        self.data_size = size
        self._records = {}
        self._long_name = self._long_link = b""
        dialect = pax.sparse_dialect(records)
        return entry if dialect is None else self._sparse(entry, records, dialect)

    def _sparse(self, entry: FileEntry, records: Mapping[bytes, bytes], dialect: int) -> FileEntry | None:
        """Give a sparse file its logical name and size, and check its map, now or when it has been read."""
        if entry.kind != "reg":
            raise InvalidTar(f"entry {entry.name!r}: a {entry.kind} with a sparse map")
        entry = entry._replace(
            name=records.get(b"GNU.sparse.name") or entry.name, size=pax.sparse_size(records, entry.size)
        )
        if dialect == 0:
            pax.check_sparse_map(pax.sparse_records(records), entry.size)
            return entry
        self._sparse_entry = entry
        self._sparse_map = pax.SparseMapReader()
        self._take_payload = self._sparse_block
        return None

    def _sparse_block(self, block: bytes, end: int) -> FileEntry | None:
        self.data_size -= len(block)
        if self._sparse_entry is None or self.data_size < 0:
            raise InvalidTar("sparse map ends outside its file")
        if not self._sparse_map.add(block):
            return None
        entry = self._sparse_entry._replace(offset=end)
        pax.check_sparse_map(self._sparse_map.numbers(), entry.size)
        self._sparse_entry = self._take_payload = None
        return entry
