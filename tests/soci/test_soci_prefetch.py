"""Prefetch artifacts: their bytes, and which spans a pattern comes to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.errors import InvalidIndex
from snapshotter.soci.imagefiles import ImageFiles
from snapshotter.soci.prefetch import SpanRange, parse, plan, ranges_of, write
from snapshotter.units import Digest
from snapshotter.ztoc.build import build
from snapshotter.ztoc.model import Algorithm, Ztoc
from tests.support.images import Entry, directory, hardlink, symlink, tar

SPAN = 1024


def ztoc(entries: dict[str, Entry | bytes]) -> Ztoc:
    return build([tar(entries)], algorithm=Algorithm.UNCOMPRESSED, span_size=SPAN).ztoc


LOWER = ztoc(
    {
        "./usr/": directory(),
        "./usr/lib/": directory(),
        "./usr/lib/a.so": b"a" * 100,
        "./usr/lib/b.so": b"b" * 100,
        "usr/lib/deep/er/c.so": b"c" * 100,
        "usr/lib/hard": hardlink("./usr/lib/a.so"),
        "lib": symlink("usr/lib"),
        "loop": symlink("loop"),
        "etc/old": b"old",
        "odd[1]": b"odd",
    }
)
UPPER = ztoc(
    {
        "usr/lib/b.so": b"B" * 100,
        "etc/.wh.old": b"",
        "etc/new": b"new",
        "opt/link": symlink("../lib/b.so"),
    }
)
IMAGE = ImageFiles([LOWER, UPPER])


def found(pattern: str) -> list[str]:
    return sorted(f"{layer}:{entry.name.decode().removeprefix('./')}" for layer, entry in IMAGE.find(pattern))


@pytest.mark.parametrize(
    ("pattern", "files"),
    [
        ("/usr/lib/a.so", ["0:usr/lib/a.so"]),
        ("./usr/lib/a.so", ["0:usr/lib/a.so"]),
        ("usr/lib/b.so", ["1:usr/lib/b.so"]),
        ("lib/b.so", ["1:usr/lib/b.so"]),
        ("opt/link", ["1:usr/lib/b.so"]),
        ("usr/lib/hard", ["0:usr/lib/a.so"]),
        ("/usr/lib/*.so", ["0:usr/lib/a.so", "1:usr/lib/b.so"]),
        ("/usr/**/*.so", ["0:usr/lib/a.so", "0:usr/lib/deep/er/c.so", "1:usr/lib/b.so"]),
        ("usr/lib/deep/", ["0:usr/lib/deep/er/c.so"]),
        ("lib", ["0:usr/lib/a.so", "0:usr/lib/deep/er/c.so", "1:usr/lib/b.so"]),
        ("etc", ["1:etc/new"]),
        ("odd[1]", ["0:odd[1]"]),
        ("etc/old", []),
        ("loop", []),
        ("nothing/*", []),
    ],
)
def test_patterns(pattern: str, files: list[str]) -> None:
    assert found(pattern) == files


def test_opaque_directories_hide_what_is_below() -> None:
    upper = ztoc({"usr/lib/.wh..wh..opq": b"", "usr/lib/only": b"1"})
    assert [entry.name for _, entry in ImageFiles([LOWER, upper]).find("usr/lib")] == [b"usr/lib/only"]


def test_bytes_are_go_s() -> None:
    data = write([SpanRange(10, 15), SpanRange(50, 55)])
    assert data == (
        b'{"version":"1.0","prefetch_spans":[{"start_span":10,"end_span":15},{"start_span":50,"end_span":55}]}'
    )
    assert parse(data) == (SpanRange(10, 15), SpanRange(50, 55))


def test_ranges_are_merged_and_end_behind_the_file() -> None:
    layer = ztoc({"a": b"1" * 512, "b": b"2" * 100, "c": b"3" * 10_000, "d": b"4"})
    entries = {entry.name: entry for entry in layer.entries}
    # The data of "a" ends at 1024, where span 1 begins.
    assert ranges_of(layer, [entries[b"a"]]) == [SpanRange(0, 1)]
    assert ranges_of(layer, [entries[b"b"], entries[b"a"]]) == [SpanRange(0, 1)]
    first, last = entries[b"d"].offset // SPAN, (entries[b"d"].offset + 1) // SPAN
    assert ranges_of(layer, [entries[b"d"], entries[b"a"]]) == [SpanRange(0, 1), SpanRange(first, last)]


def test_a_plan_is_one_artifact_per_layer() -> None:
    lower, upper = Digest("sha256:" + "1" * 64), Digest("sha256:" + "2" * 64)
    result = plan([(lower, LOWER), (upper, UPPER)], ["usr/lib/a.so", "etc/new", "absent", "usr/lib/b.so"])
    assert [one.layer for one in result.artifacts] == [lower, upper]
    assert result.unmatched == ("absent",)
    assert result.artifacts[0].descriptor.annotations == {"com.amazon.soci.image-layer-digest": lower}


@pytest.mark.parametrize(
    "text",
    [
        '{"version":"2.0","prefetch_spans":[{"start_span":1,"end_span":2}]}',
        '{"version":"1.0","prefetch_spans":[]}',
        '{"version":"1.0"}',
        '{"version":"1.0","prefetch_spans":[{"start_span":3,"end_span":2}]}',
        '{"version":"1.0","prefetch_spans":[{"start_span":-1,"end_span":2}]}',
        '{"version":"1.0","prefetch_spans":[7]}',
        "[]",
    ],
)
def test_what_is_no_artifact(text: str) -> None:
    with pytest.raises(InvalidIndex):
        parse(text.encode())


@given(st.binary(max_size=60), st.integers(0, 100))
def test_a_mutation_gives_a_value_or_the_error(junk: bytes, position: int) -> None:
    data = write([SpanRange(10, 15), SpanRange(50, 55)])
    for mutated in (junk, data[:position] + junk + data[position + len(junk) :]):
        try:
            ranges = parse(mutated)
        except InvalidIndex:
            continue
        assert ranges
        assert all(0 <= one.first <= one.last for one in ranges)


@given(st.text("ab*?[]./\udc80", max_size=12))
def test_any_pattern_gives_files(pattern: str) -> None:
    assert all(entry.kind == "reg" for _, entry in IMAGE.find(pattern))
