"""Prefetch artifacts: which spans of a layer to fetch first. Their format, and how names of files become spans.

Pure: zTOCs and patterns in, values and bytes out.

Bytes are written as Go's encoder would, so that the same files give the same digest whoever writes it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from snapshotter.errors import InvalidIndex
from snapshotter.oci.descriptor import Descriptor, expect
from snapshotter.oci.gojson import go_json, load_object
from snapshotter.oci.media_types import SOCI_PREFETCH
from snapshotter.soci.imagefiles import ImageFiles
from snapshotter.soci.index import LAYER_DIGEST
from snapshotter.units import Digest, sha256_digest
from snapshotter.ztoc.model import FileEntry, Ztoc
from snapshotter.ztoc.spans import spans_of

VERSION: Final = "1.0"
MAX_SIZE: Final = 4 << 20
"""Bytes of an artifact; a range takes some 30, and a layer has as many spans as it has 4 MiB of files."""


class SpanRange(NamedTuple):
    """Spans from `first` to `last`, both of them included, as in the artifact."""

    first: int
    last: int


class Prefetch(NamedTuple):
    """The artifact of one layer."""

    layer: Digest
    data: bytes

    @property
    def descriptor(self) -> Descriptor:
        """How an index lists it."""
        digest = sha256_digest(self.data)
        return Descriptor(SOCI_PREFETCH, digest, len(self.data), {LAYER_DIGEST: str(self.layer)})


class Plan(NamedTuple):
    """What a list of patterns comes to."""

    artifacts: tuple[Prefetch, ...]
    """In the order of the layers; a layer that has none of the files is absent."""
    unmatched: tuple[str, ...]
    """Patterns that name no file of an indexed layer."""


def plan(layers: Sequence[tuple[Digest, Ztoc]], patterns: Iterable[str]) -> Plan:
    """Return the artifacts for the files that `patterns` name in an image whose indexed layers are `layers`.

    Lowest layer first. For patterns see `ImageFiles.find`.
    """
    files = ImageFiles(ztoc for _, ztoc in layers)
    wanted: dict[int, list[FileEntry]] = {}
    unmatched = []
    for pattern in patterns:
        found = files.find(pattern)
        if not found:
            unmatched.append(pattern)
        for position, entry in found:
            wanted.setdefault(position, []).append(entry)
    artifacts = [
        Prefetch(layers[position][0], write(ranges_of(layers[position][1], entries)))
        for position, entries in sorted(wanted.items())
    ]
    # A layer may stand in an image twice; one artifact says all about it.
    unique: Mapping[Digest, Prefetch] = {one.layer: one for one in artifacts}
    return Plan(tuple(unique.values()), tuple(unmatched))


def ranges_of(ztoc: Ztoc, entries: Iterable[FileEntry]) -> list[SpanRange]:
    """Return the spans that hold `entries`, sorted and merged.

    As in the field, the last span is the one of the byte behind the file: of a file that ends on a border one more.
    """
    starts = [span.uncompressed_start for span in spans_of(ztoc)]
    found = sorted(
        SpanRange(bisect_right(starts, entry.offset) - 1, bisect_right(starts, entry.offset + entry.size) - 1)
        for entry in entries
    )
    merged: list[SpanRange] = []
    for one in found:
        if merged and one.first <= merged[-1].last + 1:
            merged[-1] = SpanRange(merged[-1].first, max(merged[-1].last, one.last))
        else:
            merged.append(one)
    return merged


def write(ranges: Sequence[SpanRange]) -> bytes:
    """Return the artifact."""
    spans = [{"start_span": one.first, "end_span": one.last} for one in ranges]
    return go_json({"version": VERSION, "prefetch_spans": spans})


def parse(data: bytes) -> tuple[SpanRange, ...]:
    """Return the ranges of an artifact. Raises InvalidIndex naming the field."""
    obj = load_object(data, limit=MAX_SIZE, what="prefetch artifact")
    if obj.get("version") != VERSION:
        raise InvalidIndex(f"prefetch artifact: version {obj.get('version')!r}, not {VERSION}")
    listed: list[object] = expect(obj.get("prefetch_spans"), list, "prefetch_spans")
    if not listed:
        raise InvalidIndex("prefetch_spans: empty")
    ranges = []
    for position, one in enumerate(listed):
        where = f"prefetch_spans[{position}]"
        members = expect(one, dict, where)
        first = expect(members.get("start_span", 0), int, f"{where}.start_span")
        last = expect(members.get("end_span", 0), int, f"{where}.end_span")
        if not 0 <= first <= last:
            raise InvalidIndex(f"{where}: {first} to {last} is no range of spans")
        ranges.append(SpanRange(first, last))
    return tuple(ranges)
