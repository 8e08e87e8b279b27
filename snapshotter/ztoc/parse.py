"""Serialized zTOC -> Ztoc. Every invariant is checked here, once, over all elements, the last included.

A zTOC comes from a registry, so every number in it is a claim. The outcome is a value that the rest
of the system relies on without looking again, or InvalidZtoc naming the element; work and memory
are in proportion to the size of the buffer, whatever it says.

What is refused beyond what cannot be read at all: a digest that is none, an unknown algorithm or
file type, entries that overlap or do not leave room for their headers, data behind the end of the
archive, a zinfo that does not have one checkpoint per span and digest, spans out of order or outside
the blob or larger than deflate can make them. What is let pass because it harms nobody: any version
string, a modification time that is no time, a size recorded for a link or directory, and several
checkpoints at tar offset 0 (older builders write those).
"""

from __future__ import annotations

import operator

from snapshotter.errors import InvalidZtoc
from snapshotter.heap import without_collector
from snapshotter.units import Digest, parse_digest
from snapshotter.ztoc.entries import read_entries
from snapshotter.ztoc.flatbuffers import Table
from snapshotter.ztoc.model import (
    TAR_BLOCK,
    Algorithm,
    Buffer,
    CompressionInfo,
    FileEntry,
    Ztoc,
    header_starts,
)
from snapshotter.ztoc.spans import Span, spans_of
from snapshotter.ztoc.zinfo import parse_gzip, parse_tar

_MAX_RATIO = 1032
"""Deflate makes at most 258 bytes out of two bits. Bounds what a span may claim to inflate to."""


def parse(data: Buffer) -> Ztoc:
    """Return the zTOC in `data`. Raises InvalidZtoc naming the element that breaks a rule.

    The value holds no reference to `data`.
    """
    with without_collector():
        return _parse(bytes(data))


def _parse(data: bytes) -> Ztoc:
    root = Table.root(data, "zTOC")
    compressed_size, uncompressed_size = root.scalar(2, "q"), root.scalar(3, "q")
    if compressed_size < 0 or uncompressed_size < 0:
        raise InvalidZtoc(f"zTOC: impossible sizes {compressed_size} and {uncompressed_size}")
    entries = tuple(sorted(read_entries(data, root.table(4, "TOC")), key=operator.attrgetter("offset")))
    starts = header_starts(entries)
    _check_entries(entries, starts, uncompressed_size)
    compression, zinfo_offset = _read_compression(data, root.table(5, "compression info"))
    ztoc = Ztoc(
        version=root.string(0).decode("utf-8", "surrogateescape"),
        build_tool=root.string(1).decode("utf-8", "surrogateescape"),
        compressed_size=compressed_size,
        uncompressed_size=uncompressed_size,
        entries=entries,
        header_starts=starts,
        compression=compression,
        zinfo_offset=zinfo_offset,
    )
    _check_span_count(ztoc)
    _check_spans(spans_of(ztoc))
    return ztoc


def _check_entries(entries: tuple[FileEntry, ...], starts: tuple[int, ...], uncompressed_size: int) -> None:
    for entry, start in zip(entries, starts, strict=True):
        offset, size = entry.offset, entry.size
        if offset - start < TAR_BLOCK or offset % TAR_BLOCK:
            raise InvalidZtoc(
                f"entry {entry.name!r}: no whole header between {start} and its data at {offset}"
            )
        if entry.kind == "reg" and not 0 <= size <= uncompressed_size - offset:
            raise InvalidZtoc(f"entry {entry.name!r}: {size} bytes at {offset} are not within the archive")


def _read_compression(data: bytes, table: Table) -> tuple[CompressionInfo, int]:
    number = table.scalar(0, "b", Algorithm.GZIP)
    try:
        algorithm = Algorithm(number)
    except ValueError:
        raise InvalidZtoc(f"zTOC: unknown compression algorithm {number}") from None
    start, end = table.byte_vector(3)
    digests = tuple(_digest(text, i) for i, text in enumerate(table.strings(2)))
    return CompressionInfo(algorithm, table.scalar(1, "i"), digests, data[start:end]), start


def _digest(text: bytes, span: int) -> Digest:
    try:
        return parse_digest(text.decode("ascii"))
    except ValueError:
        raise InvalidZtoc(f"span {span}: not a sha256 digest: {text[:100]!r}") from None


def _check_span_count(ztoc: Ztoc) -> None:
    """Check that zinfo, digests and max_span_id agree on the number of spans."""
    info = ztoc.compression
    if info.algorithm is Algorithm.GZIP:
        count = len(parse_gzip(info.zinfo).checkpoints)
    else:
        zinfo = parse_tar(info.zinfo)
        if zinfo.size != ztoc.compressed_size or ztoc.uncompressed_size > zinfo.size:
            raise InvalidZtoc(
                f"zinfo: a layer of {zinfo.size} bytes,"
                f" but the zTOC is for {ztoc.compressed_size} with {ztoc.uncompressed_size} of archive"
            )
        count = -(-zinfo.size // zinfo.span_size)
    if not count == info.max_span_id + 1 == len(info.span_digests):
        raise InvalidZtoc(
            f"zTOC: {count} spans in the zinfo, {len(info.span_digests)} digests, max span id {info.max_span_id}"
        )


def _check_spans(spans: tuple[Span, ...]) -> None:
    """Check that spans are in order, begin at 0, and are neither empty nor impossibly large.

    The end of a span is the start of the next (or of nothing), so comparing each with itself is enough.
    """
    last = len(spans) - 1
    for span in spans:
        start, end = span.uncompressed_start, span.uncompressed_end
        compressed = span.compressed_end - span.compressed_start
        if compressed <= 0:
            raise InvalidZtoc(
                f"span {span.id}: compressed range [{span.compressed_start}, {span.compressed_end}) is empty"
            )
        if (span.id == 0 and start != 0) or end < start or (end == start and start > 0 and span.id < last):
            raise InvalidZtoc(f"span {span.id}: out of order: uncompressed range [{start}, {end})")
        if end - start > compressed * _MAX_RATIO:
            raise InvalidZtoc(f"span {span.id}: {compressed} bytes cannot inflate to {end - start}")
