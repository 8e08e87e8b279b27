"""One file out of a layer, read through its zTOC exactly as a lazy mount would: span by span, each one verified."""

from __future__ import annotations

from collections.abc import Iterator

from snapshotter.errors import SpanDigestMismatch, UsageError
from snapshotter.soci.content import ContentSource
from snapshotter.soci.imagefiles import ImageFiles
from snapshotter.units import Digest, sha256_digest
from snapshotter.ztoc.inflate import inflate_span
from snapshotter.ztoc.model import FileEntry, Ztoc
from snapshotter.ztoc.spans import covering, spans_of

WINDOW_SIZE = 32768


def find_file(ztoc: Ztoc, name: str) -> FileEntry:
    """Return the regular file called `name`, with or without a leading `/` or `./`; the last one of several wins.

    Links are followed within the layer.
    Raises UsageError when there is none, saying what is there instead.
    """
    wanted = _clean(name.encode("utf-8", "surrogateescape"))
    found = [entry for entry in ztoc.entries if _clean(entry.name) == wanted]
    if not found:
        raise UsageError(f"file {name}: not in this zTOC; `soci ztoc info` lists its files")
    entry = found[-1]
    if entry.kind in {"symlink", "hardlink"}:
        linked = ImageFiles([ztoc]).file(entry.name)
        if linked is None:
            target = entry.linkname.decode("utf-8", "replace")
            raise UsageError(f"file {name}: a {entry.kind} to {target}, which is no file of this layer")
        return linked
    if entry.kind != "reg":
        raise UsageError(f"file {name}: not a regular file but a {entry.kind}")
    return entry


def read_file(
    entry: FileEntry, ztoc: Ztoc, ztoc_data: bytes, layer: Digest, source: ContentSource
) -> Iterator[bytes]:
    """Yield the content of `entry`; `ztoc` is `ztoc_data` parsed, `layer` the blob in `source` that it describes.

    Raises NotFound, SpanDigestMismatch naming the span, SpanInflateError.
    """
    spans = spans_of(ztoc)
    start, end = entry.offset, entry.offset + entry.size
    for number in covering([span.uncompressed_start for span in spans], start, end):
        span = spans[number]
        compressed = source.read_range(layer, span.compressed_start, span.compressed_end)
        found = sha256_digest(compressed)
        if found != span.digest:
            raise SpanDigestMismatch(f"layer {layer}: span {span.id} has digest {found}, not {span.digest}")
        window = None
        if span.window_offset >= 0:
            window = memoryview(ztoc_data)[span.window_offset : span.window_offset + WINDOW_SIZE]
        data = memoryview(
            inflate_span(
                compressed,
                algorithm=ztoc.compression.algorithm,
                bits=span.bits,
                window=window,
                length=span.uncompressed_end - span.uncompressed_start,
            )
        )
        first = max(start - span.uncompressed_start, 0)
        yield bytes(data[first : end - span.uncompressed_start])


def _clean(name: bytes) -> bytes:
    return name.removeprefix(b"./").strip(b"/")
