"""An independent maker of zTOCs, to compare the real one with: straight, slow, and with other means.

Checkpoints come from the system's zlib fed one byte at a time with all output kept; entries from the
standard library's tarfile; the FlatBuffer from a writer that keeps a reversed byte string. It shares
nothing with snapshotter/ztoc but the value types.

Entries must be what tarfile and Go agree on: directory names end in a slash (tarfile drops it), other
names do not, and nothing is sparse.

Concurrency: plain functions; nothing is shared.
"""

from __future__ import annotations

import ctypes
import gzip
import hashlib
import io
import struct
import tarfile
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import ROUND_DOWN, Decimal

from snapshotter.ztoc.model import FileEntry

WINDOW = 32768

Point = tuple[int, int, int, bytes]
"""(compressed offset, uncompressed offset, bits, window)"""

Field = tuple[int, str, int]
"""(slot, struct letter or "o" for an offset, value)"""

_KINDS = {
    tarfile.REGTYPE: "reg",
    tarfile.AREGTYPE: "reg",
    tarfile.DIRTYPE: "dir",
    tarfile.SYMTYPE: "symlink",
    tarfile.LNKTYPE: "hardlink",
    tarfile.CHRTYPE: "char",
    tarfile.BLKTYPE: "block",
    tarfile.FIFOTYPE: "fifo",
}
_AUTO_HEADER = 47
_Z_BLOCK = 5
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class _Stream(ctypes.Structure):
    _fields_ = (
        ("next_in", ctypes.c_char_p),
        ("avail_in", ctypes.c_uint),
        ("total_in", ctypes.c_ulong),
        ("next_out", ctypes.c_void_p),
        ("avail_out", ctypes.c_uint),
        ("total_out", ctypes.c_ulong),
        ("unused", ctypes.c_void_p * 5),
        ("data_type", ctypes.c_int),
        ("checksum", ctypes.c_ulong),
        ("reserved", ctypes.c_ulong),
    )


def build(blob: bytes, span_size: int, build_tool: str) -> bytes:
    """Return the zTOC of a gzip layer."""
    tar = gzip.decompress(blob)
    points = checkpoints(blob, span_size)
    starts = [at - (bits > 0) for at, _, bits, _ in points]
    ends = [at for at, _, _, _ in points[1:]] + [len(blob)]
    digests = ["sha256:" + hashlib.sha256(blob[a:b]).hexdigest() for a, b in zip(starts, ends, strict=True)]
    zinfo = struct.pack("<iq", len(points), span_size)
    zinfo += b"".join(struct.pack("<qqB", *point[:3]) + point[3] for point in points)
    return serialize("0.9", build_tool, entries(tar), (zinfo, digests, None), (len(blob), archive_end(tar)))


def checkpoints(blob: bytes, span_size: int) -> list[Point]:
    """Return the checkpoints of a gzip stream, counting on over its members."""
    library = ctypes.CDLL("libz.so.1")
    stream = _Stream()
    handle = ctypes.byref(stream)
    library.zlibVersion.restype = ctypes.c_char_p
    assert library.inflateInit2_(handle, _AUTO_HEADER, library.zlibVersion(), ctypes.sizeof(stream)) == 0
    room = ctypes.create_string_buffer(1 << 16)
    out = bytearray()
    points: list[Point] = []
    ended = False
    for at in range(len(blob)):
        if ended:
            assert library.inflateReset2(handle, _AUTO_HEADER) == 0
        stream.next_in, stream.avail_in = blob[at : at + 1], 1
        while True:
            stream.next_out, stream.avail_out = ctypes.addressof(room), len(room)
            code = library.inflate(handle, _Z_BLOCK)
            assert code in {0, 1, -5}, code
            out += ctypes.string_at(room, len(room) - stream.avail_out)
            ended = code == 1
            border = code == 0 and stream.data_type & 128 and not stream.data_type & 64
            if border and (not points or len(out) - points[-1][1] > span_size):
                window = (bytes(WINDOW) + out)[-WINDOW:]
                points.append((at + 1 - stream.avail_in, len(out), stream.data_type & 7, window))
            if ended or code == -5:
                break
    library.inflateEnd(handle)
    assert ended
    return points


def archive_end(tar: bytes) -> int:
    """Return where the archive ends: behind two zero blocks, or at the end of a stream without them."""
    with _opened(tar) as archive:
        last = archive.getmembers()[-1]
        end = last.offset_data + (-(-last.size // 512) * 512 if last.isreg() else 0)
    return min(end + 1024, len(tar))


def entries(tar: bytes) -> list[FileEntry]:
    """Return the entries of a tar."""
    with _opened(tar) as archive:
        return [_entry(member) for member in archive.getmembers()]


def contents(tar: bytes) -> list[tuple[bytes, bytes]]:
    """Return name and content of the regular files of a tar, in its order."""
    found = []
    with _opened(tar) as archive:
        for member in archive.getmembers():
            if member.isreg():
                file = archive.extractfile(member)
                assert file is not None
                found.append((_bytes(member.name), file.read()))
    return found


def _opened(tar: bytes) -> tarfile.TarFile:
    return tarfile.open(fileobj=io.BytesIO(tar), mode="r:", encoding="utf-8", errors="surrogateescape")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _entry(member: tarfile.TarInfo) -> FileEntry:
    return FileEntry(
        name=_bytes(member.name) + (b"/" if member.isdir() else b""),
        kind=_KINDS[member.type],
        offset=member.offset_data,
        size=member.size if member.isreg() else 0,
        linkname=_bytes(member.linkname),
        mode=member.mode,
        uid=member.uid & 0xFFFFFFFF,
        gid=member.gid & 0xFFFFFFFF,
        uname=_bytes(member.uname),
        gname=_bytes(member.gname),
        mod_time=_rfc3339(Decimal(member.pax_headers.get("mtime") or int(member.mtime))),
        devmajor=member.devmajor,
        devminor=member.devminor,
        pax=tuple(sorted((_bytes(key), _bytes(value)) for key, value in member.pax_headers.items())),
    )


def _rfc3339(seconds: Decimal) -> str:
    seconds = seconds.quantize(Decimal("1e-9"), ROUND_DOWN)
    whole = seconds // 1 if seconds == seconds // 1 or seconds > 0 else seconds // 1 - 1
    nanoseconds = int((seconds - whole).scaleb(9))
    text = (_EPOCH + timedelta(seconds=int(whole))).strftime("%Y-%m-%dT%H:%M:%S").zfill(19)
    return text + (f".{nanoseconds:09d}".rstrip("0") if nanoseconds else "") + "Z"


def serialize(
    version: str,
    build_tool: str,
    files: Sequence[FileEntry],
    compression: tuple[bytes, Sequence[str], int | None],
    sizes: tuple[int, int],
    max_span_id: int | None = None,
) -> bytes:
    """Return a zTOC; `compression` is (zinfo, span digests, algorithm or None for the default)."""
    zinfo, span_digests, algorithm = compression
    writer = _ReversedWriter()
    first = writer.string(version.encode()), writer.string(build_tool.encode())
    places = [_add_file(writer, file) for file in reversed(files)]
    toc = writer.table([(0, "o", writer.vector(places[::-1]))])
    blob = writer.bytes_(zinfo)
    digests = writer.vector([writer.string(digest.encode()) for digest in span_digests])
    last = len(span_digests) - 1 if max_span_id is None else max_span_id
    fields: list[Field] = [(1, "i", last), (2, "o", digests), (3, "o", blob)]
    if algorithm is not None:
        fields.append((0, "b", algorithm))
    info = writer.table(fields)
    root: list[Field] = [(0, "o", first[0]), (1, "o", first[1]), (4, "o", toc)]
    root += [(2, "q", sizes[0]), (3, "q", sizes[1]), (5, "o", info)]
    return writer.finish(writer.table(root))


def _add_file(writer: _ReversedWriter, file: FileEntry) -> int:
    texts = [file.name, file.kind.encode(), file.linkname, file.uname, file.gname, file.mod_time.encode()]
    name, kind, linkname, uname, gname, mod_time = [writer.string(text) for text in texts]
    records = [
        writer.table([(0, "o", writer.string(key)), (1, "o", writer.string(value))])
        for key, value in sorted(dict(file.pax).items())
    ]
    pax = writer.vector(records)
    fields: list[Field] = [(0, "o", name), (1, "o", kind), (2, "q", file.offset), (3, "q", file.size)]
    fields += [(4, "o", linkname), (5, "q", file.mode), (6, "I", file.uid), (7, "I", file.gid)]
    fields += [(8, "o", uname), (9, "o", gname), (10, "o", mod_time)]
    fields += [(11, "q", file.devmajor), (12, "q", file.devminor), (13, "o", pax)]
    return writer.table(fields)


class _ReversedWriter:
    """A FlatBuffers builder that appends bytes in reverse order, one number at a time."""

    def __init__(self) -> None:
        self._reversed = bytearray()
        self._align = 4
        self._vtables: dict[bytes, int] = {}

    def _pad(self, size: int, ahead: int = 0) -> None:
        self._align = max(self._align, size)
        self._reversed += bytes(-(len(self._reversed) + ahead) % size)

    def _put(self, data: bytes) -> int:
        self._reversed += data[::-1]
        return len(self._reversed)

    def _number(self, letter: str, value: int) -> int:
        self._pad(struct.calcsize("<" + letter))
        return self._put(struct.pack("<" + letter, value))

    def _reference(self, place: int) -> int:
        self._pad(4)
        return self._put(struct.pack("<I", len(self._reversed) + 4 - place))

    def string(self, text: bytes) -> int:
        self._pad(4, len(text) + 1)
        self._put(text + b"\0")
        return self._number("I", len(text))

    def bytes_(self, data: bytes) -> int:
        self._pad(4, len(data))
        self._put(data)
        return self._number("I", len(data))

    def vector(self, places: Sequence[int]) -> int:
        self._pad(4)
        for place in reversed(places):
            self._reference(place)
        return self._number("I", len(places))

    def table(self, fields: Sequence[Field]) -> int:
        tail = len(self._reversed)
        at: dict[int, int] = {}
        for slot, letter, value in fields:
            if value:
                at[slot] = self._reference(value) if letter == "o" else self._number(letter, value)
        place = self._number("i", 0)
        slots = [place - at[slot] if slot in at else 0 for slot in range(max(at, default=-1) + 1)]
        vtable = struct.pack(f"<{len(slots) + 2}H", 4 + 2 * len(slots), place - tail, *slots)
        if vtable not in self._vtables:
            self._vtables[vtable] = self._put(vtable)
        self._reversed[place - 4 : place] = struct.pack("<i", self._vtables[vtable] - place)[::-1]
        return place

    def finish(self, root: int) -> bytes:
        self._pad(self._align, 4)
        self._reference(root)
        return bytes(self._reversed[::-1])
