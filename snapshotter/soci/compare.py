"""How two zTOCs differ, in words. Pure: values in, lines out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest

from snapshotter.ztoc.model import FileEntry, Ztoc
from snapshotter.ztoc.spans import Span, spans_of

MAX_LINES = 20
"""Per kind of difference; what two different layers have to say about each other is of no use to anybody."""


def differences(one: Ztoc, other: Ztoc) -> list[str]:
    """Return a line per difference, nothing when both describe the same layer in the same way."""
    lines = [
        f"{name}: {before} -> {after}"
        for name, before, after in (
            ("version", one.version, other.version),
            ("build tool", one.build_tool, other.build_tool),
            ("layer size", one.compressed_size, other.compressed_size),
            ("tar size", one.uncompressed_size, other.uncompressed_size),
            ("compression", one.compression.algorithm.name, other.compression.algorithm.name),
            ("number of spans", len(spans_of(one)), len(spans_of(other))),
            ("number of files", len(one.entries), len(other.entries)),
        )
        if before != after
    ]
    lines += _limited(span_differences(spans_of(one), spans_of(other)))
    lines += _limited(entry_differences(one.entries, other.entries))
    if not lines and one.compression.zinfo != other.compression.zinfo:
        lines.append("checkpoint windows differ")
    return lines


def span_differences(one: Sequence[Span], other: Sequence[Span]) -> Iterator[str]:
    """Yield a line per span that both have and that is not the same."""
    for before, after in zip(one, other, strict=False):
        if before[:6] != after[:6]:
            yield (
                f"span {before.id}: compressed [{before.compressed_start}, {before.compressed_end}) from tar offset"
                f" {before.uncompressed_start} -> [{after.compressed_start}, {after.compressed_end}) from"
                f" {after.uncompressed_start}"
            )
        elif before.digest != after.digest:
            yield f"span {before.id}: digest {before.digest} -> {after.digest}"


def entry_differences(one: Sequence[FileEntry], other: Sequence[FileEntry]) -> Iterator[str]:
    """Yield a line per file that is in one of the two, or in both and not the same."""
    if [entry.name for entry in one] == [entry.name for entry in other]:
        pairs = list(zip_longest(one, other))
    else:
        later = {entry.name: entry for entry in other}
        earlier = {entry.name for entry in one}
        yield from (
            f"file {_text(entry.name)}: only in the first" for entry in one if entry.name not in later
        )
        yield from (
            f"file {_text(entry.name)}: only in the second" for entry in other if entry.name not in earlier
        )
        pairs = [(entry, later[entry.name]) for entry in one if entry.name in later]
    for before, after in pairs:
        for field, left, right in zip(FileEntry._fields, before, after, strict=True):
            if left != right and (field != "pax" or sorted(left) != sorted(right)):
                yield f"file {_text(before.name)}: {field} {_text(left)} -> {_text(right)}"


def _limited(lines: Iterator[str]) -> list[str]:
    found = list(lines)
    if len(found) > MAX_LINES:
        found[MAX_LINES:] = [f"and {len(found) - MAX_LINES} more of the kind"]
    return found


def _text(value: object) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
