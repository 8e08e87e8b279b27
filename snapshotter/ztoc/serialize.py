"""Ztoc -> bytes, laid out as the reference writer does it, because the digest is the identity.

The order in which things are added is part of the format: files from the last to the first, in each
its strings, its PAX records, their vector, its table; then the file list, the zinfo, the span
digests and the tables that hold them.
"""

from __future__ import annotations

from snapshotter.heap import without_collector
from snapshotter.ztoc.flatbuffers import U32_SIZE, Shape, Writer
from snapshotter.ztoc.model import Algorithm, CompressionInfo, FileEntry, Ztoc

_PAX_RECORD = Shape(((0, "o", 0), (1, "o", 0)))
_FILE = Shape(
    (
        (0, "o", 0),  # name
        (1, "o", 0),  # type
        (2, "q", 0),  # uncompressed offset
        (3, "q", 0),  # uncompressed size
        (4, "o", 0),  # linkname
        (5, "q", 0),  # mode
        (6, "I", 0),  # uid
        (7, "I", 0),  # gid
        (8, "o", 0),  # uname
        (9, "o", 0),  # gname
        (10, "o", 0),  # mod time
        (11, "q", 0),  # devmajor
        (12, "q", 0),  # devminor
        (13, "o", 0),  # PAX records
    )
)
_TOC = Shape(((0, "o", 0),))
_COMPRESSION_INFO = Shape(
    (
        (1, "i", 0),  # max span id
        (2, "o", 0),  # span digests
        (3, "o", 0),  # zinfo
        (0, "b", Algorithm.GZIP),  # algorithm
    )
)
_ZTOC = Shape(
    (
        (0, "o", 0),  # version
        (1, "o", 0),  # build tool
        (4, "o", 0),  # TOC
        (2, "q", 0),  # compressed size
        (3, "q", 0),  # uncompressed size
        (5, "o", 0),  # compression info
    )
)


def serialize(ztoc: Ztoc) -> bytes:
    """Return the zTOC as bytes; its sha256 is the zTOC's digest."""
    return serialize_with_offset(ztoc)[0]


def serialize_with_offset(ztoc: Ztoc) -> tuple[bytes, int]:
    """Return the zTOC as bytes, and the position of the zinfo blob in them."""
    with without_collector():
        return _serialize(ztoc)


def _serialize(ztoc: Ztoc) -> tuple[bytes, int]:
    writer = Writer()
    version = writer.string(_text(ztoc.version))
    build_tool = writer.string(_text(ztoc.build_tool))
    files = [_add_file(writer, entry) for entry in reversed(ztoc.entries)]
    files.reverse()
    toc = writer.table(_TOC, (writer.offsets(files),))
    compression, zinfo = _add_compression(writer, ztoc.compression)
    root = writer.table(
        _ZTOC, (version, build_tool, toc, ztoc.compressed_size, ztoc.uncompressed_size, compression)
    )
    data = writer.finish(root)
    return data, len(data) - zinfo + U32_SIZE


def _add_file(writer: Writer, entry: FileEntry) -> int:
    texts = (entry.name, entry.kind.encode(), entry.linkname, entry.uname, entry.gname, _text(entry.mod_time))
    name, kind, linkname, uname, gname, mod_time = writer.strings(texts)
    pax = writer.offsets([writer.table(_PAX_RECORD, writer.strings(record)) for record in sorted(entry.pax)])
    return writer.table(
        _FILE,
        (
            name,
            kind,
            entry.offset,
            entry.size,
            linkname,
            entry.mode,
            entry.uid,
            entry.gid,
            uname,
            gname,
            mod_time,
            entry.devmajor,
            entry.devminor,
            pax,
        ),
    )


def _add_compression(writer: Writer, info: CompressionInfo) -> tuple[int, int]:
    zinfo = writer.byte_vector(info.zinfo)
    digests = writer.offsets(writer.strings([digest.encode() for digest in info.span_digests]))
    table = writer.table(_COMPRESSION_INFO, (info.max_span_id, digests, zinfo, info.algorithm))
    return table, zinfo


def _text(text: str) -> bytes:
    # The inverse of how `parse` decodes: bytes that are no UTF-8 come back as they were.
    return text.encode("utf-8", "surrogateescape")
