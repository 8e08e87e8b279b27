"""Span geometry: which bytes of the layer blob hold which bytes of the tar stream.

A span runs from one checkpoint to the next. When a gzip checkpoint lies inside a byte, that byte
belongs to the span before and to the span behind, so neighbours may share one compressed byte;
uncompressed ranges never overlap. Pure arithmetic on a Ztoc that `parse` or `build` made, both of
which have checked what is relied upon here.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from snapshotter.units import Digest
from snapshotter.ztoc.model import Algorithm, Ztoc
from snapshotter.ztoc.zinfo import parse_gzip, parse_tar


class Span(NamedTuple):
    """The unit of fetching, verifying, inflating and caching.

    `[compressed_start, compressed_end)` are bytes of the blob, `digest` is theirs;
    `[uncompressed_start, uncompressed_end)` are bytes of the tar stream, the end of the last span
    being clamped so that a span is never of negative length (padding behind the end of the archive
    may hold a checkpoint of its own). `bits` high bits of the first compressed byte belong to the
    span (0: all of it). `window_offset` is where its 32 KiB window lies in the serialized zTOC,
    -1 when it needs none.
    """

    id: int
    compressed_start: int
    compressed_end: int
    uncompressed_start: int
    uncompressed_end: int
    bits: int
    window_offset: int
    digest: Digest


def spans_of(ztoc: Ztoc) -> tuple[Span, ...]:
    """Return the spans of a layer in order.

    Raises InvalidZtoc when the zinfo does not parse, which cannot happen for a value from `parse`.
    """
    if ztoc.compression.algorithm is Algorithm.GZIP:
        return _gzip_spans(ztoc)
    return _tar_spans(ztoc)


def covering(starts: Sequence[int], start: int, end: int) -> range:
    """Return the ids of the spans that hold the bytes `[start, end)` of the tar stream.

    `starts` are the uncompressed starts of all spans in order, the first of them 0. An empty
    `[start, end)` gives an empty range; a range that ends on a border does not touch the span that
    begins there. Of several spans that start at `start`, all but the last are empty and left out.
    """
    if start >= end:
        return range(0)
    return range(bisect_right(starts, start) - 1, bisect_left(starts, end))


def _gzip_spans(ztoc: Ztoc) -> tuple[Span, ...]:
    points = parse_gzip(ztoc.compression.zinfo).checkpoints
    last = len(points) - 1
    spans = []
    for i, point in enumerate(points):
        if i < last:
            compressed_end, uncompressed_end = points[i + 1][:2]
        else:
            compressed_end = ztoc.compressed_size
            uncompressed_end = max(point.uncompressed_out, ztoc.uncompressed_size)
        spans.append(
            Span(
                id=i,
                compressed_start=point.compressed_in - (1 if point.bits else 0),
                compressed_end=compressed_end,
                uncompressed_start=point.uncompressed_out,
                uncompressed_end=uncompressed_end,
                bits=point.bits,
                window_offset=-1 if point.window_offset < 0 else ztoc.zinfo_offset + point.window_offset,
                digest=ztoc.compression.span_digests[i],
            )
        )
    return tuple(spans)


def _tar_spans(ztoc: Ztoc) -> tuple[Span, ...]:
    size = parse_tar(ztoc.compression.zinfo).span_size
    last = ztoc.compression.max_span_id
    spans = []
    for i, digest in enumerate(ztoc.compression.span_digests):
        start = i * size
        end = start + size if i < last else ztoc.compressed_size
        uncompressed_end = end if i < last else max(start, ztoc.uncompressed_size)
        spans.append(Span(i, start, end, start, uncompressed_end, 0, -1, digest))
    return tuple(spans)
