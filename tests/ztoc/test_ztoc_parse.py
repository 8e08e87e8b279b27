"""Each invariant of a zTOC has a mutation that trips it; and nothing but a Ztoc or InvalidZtoc ever comes out."""

from __future__ import annotations

import dataclasses
import functools
import random
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from snapshotter.errors import InvalidZtoc
from snapshotter.ztoc.build import build
from snapshotter.ztoc.entries import _REFERENCES
from snapshotter.ztoc.flatbuffers import Shape, Writer
from snapshotter.ztoc.model import Algorithm, FileEntry, Ztoc
from snapshotter.ztoc.parse import parse
from snapshotter.ztoc.serialize import _FILE, _TOC, serialize
from snapshotter.ztoc.spans import spans_of
from snapshotter.ztoc.zinfo import WINDOW_SIZE, parse_gzip, write_gzip, write_tar
from tests.support.gzip_forms import deflated
from tests.support.images import Entry, directory, symlink, tar

SPAN_SIZE = 4096
DIGEST = "sha256:" + "0" * 64

Mutation = Callable[[Ztoc], Ztoc]


@functools.cache
def small(algorithm: Algorithm = Algorithm.GZIP) -> bytes:
    """A zTOC of four entries and five spans."""
    source = random.Random(3)
    data = tar(
        [
            ("d/", directory()),
            ("d/a", source.randbytes(3000)),
            ("d/b", Entry(source.randbytes(4000), pax={"SCHILY.xattr.user.a": "b", "comment": "c"})),
            ("d/l", symlink("a")),
        ]
    )
    blob = deflated(data, level=6, flush=1, every=1000) if algorithm is Algorithm.GZIP else data
    return build([blob], algorithm=algorithm, span_size=SPAN_SIZE, build_tool="test").data


def compression(**values: Any) -> Mutation:
    return lambda ztoc: dataclasses.replace(ztoc, compression=dataclasses.replace(ztoc.compression, **values))


def whole(**values: Any) -> Mutation:
    return lambda ztoc: dataclasses.replace(ztoc, **values)


def entry(index: int, **values: Any) -> Mutation:
    def mutate(ztoc: Ztoc) -> Ztoc:
        entries = list(ztoc.entries)
        entries[index] = entries[index]._replace(**values)
        return dataclasses.replace(ztoc, entries=tuple(entries))

    return mutate


def point(index: int, **values: int) -> Mutation:
    """Change a checkpoint; all windows become zeros."""

    def mutate(ztoc: Ztoc) -> Ztoc:
        points = [one._replace(window_offset=0) for one in parse_gzip(ztoc.compression.zinfo).checkpoints]
        points[index] = points[index]._replace(**values)
        zinfo = write_gzip(SPAN_SIZE, [(*one[:3], bytes(WINDOW_SIZE)) for one in points])
        return compression(zinfo=zinfo)(ztoc)

    return mutate


def digest(index: int, text: str) -> Mutation:
    def mutate(ztoc: Ztoc) -> Ztoc:
        digests = list(ztoc.compression.span_digests)
        digests[index] = text
        return compression(span_digests=tuple(digests))(ztoc)

    return mutate


def test_the_base_is_what_the_mutations_take_it_for() -> None:
    for algorithm in Algorithm:
        ztoc = parse(small(algorithm))
        assert ([one.kind for one in ztoc.entries], ztoc.compression.max_span_id) == (
            ["dir", "reg", "reg", "symlink"],
            4,
        )
        assert serialize(ztoc) == small(algorithm)


@pytest.mark.parametrize(
    ("mutation", "message"),
    [
        (whole(compressed_size=-1), "impossible sizes -1 and"),
        (whole(uncompressed_size=-1), "and -1"),
        (whole(compressed_size=100), r"span \d: compressed range"),
        (entry(0, offset=0), "entry b'd/': no whole header between 0 and its data at 0"),
        (entry(0, offset=511), "between 0 and its data at 511"),
        (entry(0, offset=513), "between 0 and its data at 513"),
        (entry(1, offset=-512), "entry b'd/a': no whole header between 0 and its data at -512"),
        (entry(1, size=4100), "entry b'd/b': no whole header"),
        (entry(1, size=-1), "entry b'd/a': -1 bytes at 1024"),
        (entry(1, kind="socket"), "file 1: unknown type b'socket'"),
        (entry(3, kind="reg", size=1 << 40), "entry b'd/l': 1099511627776 bytes at"),
        (compression(max_span_id=3), "5 spans in the zinfo, 5 digests, max span id 3"),
        (compression(max_span_id=5), "max span id 5"),
        (compression(span_digests=()), "0 digests"),
        (compression(span_digests=(DIGEST,) * 6), "6 digests"),
        (digest(0, "sha256:" + "F" * 64), "span 0: not a sha256 digest"),
        (digest(4, "sha256:"), "span 4: not a sha256 digest: b'sha256:'"),
        (digest(2, ""), "span 2: not a sha256 digest: b''"),
        (digest(3, "sha512:" + "0" * 64), "span 3"),
        (digest(1, DIGEST + "\N{SNOWMAN}"), "span 1"),
        (compression(algorithm=0), "unknown compression algorithm 0"),
        (compression(algorithm=-3), "unknown compression algorithm -3"),
        (compression(algorithm=Algorithm.UNCOMPRESSED), "zinfo: "),
        (compression(zinfo=b""), "zinfo: 0 bytes"),
        (point(0, uncompressed_out=1), r"span 0: out of order: uncompressed range \[1,"),
        (point(2, uncompressed_out=0), "span 1: out of order"),
        (point(4, uncompressed_out=0), "span 3: out of order"),
        (point(3, compressed_in=1 << 30), r"span 3: compressed range \[107374182., \d+\) is empty"),
        (point(4, compressed_in=1 << 40), r"span 4: compressed range \[109951162777., \d+\) is empty"),
        (point(1, compressed_in=10), r"span 0: compressed range \[10, 10\) is empty"),
        (point(1, uncompressed_out=1 << 40), "span 0: .* cannot inflate to 1099511627776"),
    ],
)
def test_invariants(mutation: Mutation, message: str) -> None:
    with pytest.raises(InvalidZtoc, match=message):
        parse(serialize(mutation(parse(small()))))


@pytest.mark.parametrize(
    ("mutation", "message"),
    [
        (whole(compressed_size=20_481), "a layer of 20480 bytes, but the zTOC is for 20481"),
        (whole(uncompressed_size=20_481), "with 20481 of archive"),
        (compression(zinfo=write_tar(1000, 20_480)), "21 spans in the zinfo, 5 digests"),
        (compression(zinfo=write_tar(0, 20_480)), "impossible span size 0"),
        (compression(zinfo=write_tar(4096, -1)), "or layer size -1"),
        (compression(zinfo=b"\xff" * 48), "zinfo: lies outside the buffer"),
        (compression(max_span_id=1 << 30), "max span id 1073741824"),
    ],
)
def test_invariants_of_uncompressed_layers(mutation: Mutation, message: str) -> None:
    with pytest.raises(InvalidZtoc, match=message):
        parse(serialize(mutation(parse(small(Algorithm.UNCOMPRESSED)))))


@pytest.mark.parametrize(
    "mutation",
    [
        whole(version="1.0"),
        whole(version="\udcff", build_tool=""),
        entry(0, mod_time="yesterday"),
        entry(0, mod_time="\udcff"),
        entry(0, size=1 << 50),
        entry(3, size=1000),
        entry(1, name=b"", uname=b"\xff", devmajor=-1, mode=-1),
        point(1, uncompressed_out=0, bits=0),
        point(4, uncompressed_out=60_000),
    ],
)
def test_what_is_let_pass(mutation: Mutation) -> None:
    data = serialize(mutation(parse(small())))
    assert serialize(parse(data)) == data


def test_a_span_behind_the_archive_has_length_zero() -> None:
    ztoc = parse(serialize(point(4, uncompressed_out=60_000)(parse(small()))))
    assert spans_of(ztoc)[4].uncompressed_end == spans_of(ztoc)[4].uncompressed_start == 60_000


def test_a_size_recorded_for_a_link_does_not_move_the_next_header() -> None:
    plain = parse(small())
    sized = parse(serialize(entry(0, size=5000)(plain)))
    assert sized.header_starts == plain.header_starts == (0, 512, 4096, 9728)


def test_entries_are_sorted_by_offset() -> None:
    plain = parse(small())
    shuffled = serialize(whole(entries=plain.entries[::-1])(plain))
    assert parse(shuffled).entries == plain.entries


def test_any_buffer_will_do_and_is_not_kept() -> None:
    data = bytearray(small())
    parsed = parse(memoryview(data))
    data[:] = bytes(len(data))
    assert parsed == parse(small())


def test_where_the_zinfo_is() -> None:
    ztoc = parse(small())
    blob = ztoc.compression.zinfo
    assert small()[ztoc.zinfo_offset : ztoc.zinfo_offset + len(blob)] == blob
    for span, one in zip(spans_of(ztoc), parse_gzip(blob).checkpoints, strict=True):
        window = blob[one.window_offset : one.window_offset + WINDOW_SIZE]
        assert small()[span.window_offset : span.window_offset + WINDOW_SIZE] == window


# What follows breaks the container instead of the values in it.


def with_files(add: Callable[[Writer], list[int]]) -> bytes:
    """Return the zTOC `small`, its list of files replaced by the tables that `add` writes."""
    ztoc = parse(small())
    writer = Writer()
    toc = writer.table(_TOC, (writer.offsets(add(writer)),))
    zinfo = writer.byte_vector(ztoc.compression.zinfo)
    digests = writer.offsets([writer.string(one.encode()) for one in ztoc.compression.span_digests])
    info = writer.table(Shape([(1, "i", 0), (2, "o", 0), (3, "o", 0)]), (4, digests, zinfo))
    root = Shape([(4, "o", 0), (2, "q", 0), (3, "q", 0), (5, "o", 0)])
    return writer.finish(writer.table(root, (toc, ztoc.compressed_size, ztoc.uncompressed_size, info)))


def file_table(writer: Writer, *, offset: int = 512, pax: int | None = None, **places: int) -> int:
    """Write a file whose texts are all empty but for `places`; a place of 0 leaves a field out."""
    empty, kind = writer.string(b""), writer.string(b"fifo")
    vector = writer.offsets([]) if pax is None else pax
    values = {"name": empty, "linkname": empty, "uname": empty, "gname": empty, "mod_time": empty, **places}
    texts = values["linkname"], 0, 0, 0, values["uname"], values["gname"], values["mod_time"]
    return writer.table(_FILE, (values["name"], kind, offset, 0, *texts, 0, 0, vector))


def test_an_archive_without_files() -> None:
    assert parse(with_files(lambda _: [])).entries == ()


@pytest.mark.parametrize("field", ["name", "linkname", "uname", "gname", "mod_time", "pax"])
def test_an_absent_text(field: str) -> None:
    with pytest.raises(InvalidZtoc, match="file 0: lacks a text field"):
        parse(with_files(lambda writer: [file_table(writer, **{field: 0})]))


def test_two_files_in_one_table() -> None:
    with pytest.raises(InvalidZtoc, match="two files share a table"):
        parse(with_files(lambda writer: [file_table(writer)] * 2))


def test_a_text_used_many_times_is_not_copied_without_bound() -> None:
    def many(writer: Writer) -> list[int]:
        name = writer.string(bytes(1 << 20))
        return [file_table(writer, offset=512 + 512 * i, name=name) for i in range(2000)]

    data = with_files(many)
    tracemalloc.start()
    with pytest.raises(InvalidZtoc, match=r"file \d+: the texts so far are larger than the buffer"):
        parse(data)
    assert tracemalloc.get_traced_memory()[1] < 20 * len(data)
    tracemalloc.stop()


def test_a_pax_record_used_many_times_is_not_copied_without_bound() -> None:
    def many(writer: Writer) -> list[int]:
        text = writer.string(bytes(1 << 20))
        record = writer.table(Shape([(0, "o", 0), (1, "o", 0)]), (text, text))
        return [file_table(writer, pax=writer.offsets([record] * 2000))]

    with pytest.raises(InvalidZtoc, match="file 0, PAX records: the texts so far"):
        parse(with_files(many))


def test_texts_may_be_shared_within_reason() -> None:
    def shared(writer: Writer) -> list[int]:
        name = writer.string(b"root")
        return [file_table(writer, offset=512 * (i + 1), uname=name, gname=name) for i in range(100)]

    assert {one.uname for one in parse(with_files(shared)).entries} == {b"root"}


@pytest.mark.parametrize("present", [(0,), (1,), ()])
def test_a_pax_record_without_key_or_value(present: tuple[int, ...]) -> None:
    def incomplete(writer: Writer) -> list[int]:
        text = writer.string(b"text")
        record = writer.table(Shape([(slot, "o", 0) for slot in present]), [text] * len(present))
        return [file_table(writer, pax=writer.offsets([record]))]

    with pytest.raises(InvalidZtoc, match="PAX records: lacks a key or value"):
        parse(with_files(incomplete))


def test_digests_used_many_times_are_not_copied_without_bound() -> None:
    ztoc = parse(small(Algorithm.UNCOMPRESSED))
    writer = Writer()
    text = writer.string(b"0" * 10_000)
    info = Shape([(0, "b", 1), (2, "o", 0)])
    table = writer.table(info, (2, writer.offsets([text] * 10_000)))
    toc = writer.table(_TOC, (writer.offsets([]),))
    root = writer.table(Shape([(4, "o", 0), (5, "o", 0)]), (toc, table))
    with pytest.raises(InvalidZtoc, match="compression info, field 2: strings are larger than the buffer"):
        parse(writer.finish(root))
    assert ztoc.entries


def vtable_of(data: bytes, table: int) -> int:
    return table - struct.unpack_from("<i", data, table)[0]


def file_position(data: bytes) -> int:
    """Return where the table of the first file is."""
    name = data.index(b"\4\0\0\0fifo")
    places = [at for at in range(0, name, 4) if 0 <= vtable_of(data, at) <= name]
    return next(at for at in places if struct.unpack_from("<H", data, vtable_of(data, at))[0] == 4 + 2 * 14)


@pytest.mark.parametrize(
    ("slot", "offset", "message"),
    [
        (3, 4, r"field \d+ overlaps another"),
        (0, 2, r"field 13 overlaps another"),
        (12, 60_000, "a field lies outside its table"),
    ],
)
def test_fields_that_overlap_or_lie_outside(slot: int, offset: int, message: str) -> None:
    data = bytearray(with_files(lambda writer: [file_table(writer)]))
    struct.pack_into("<H", data, vtable_of(data, file_position(data)) + 4 + 2 * slot, offset)
    with pytest.raises(InvalidZtoc, match=f"file 0: .*{message}"):
        parse(data)


@pytest.mark.parametrize("slot", [*_REFERENCES])
def test_references_that_point_outside(slot: int) -> None:
    data = bytearray(with_files(lambda writer: [file_table(writer)]))
    table = file_position(data)
    place = table + struct.unpack_from("<H", data, vtable_of(data, table) + 4 + 2 * slot)[0]
    for target in (0xFFFFFFFF, len(data) - place, len(data) - place - 2):
        struct.pack_into("<I", data, place, target)
        with pytest.raises(InvalidZtoc, match="file 0"):
            parse(data)


def parse_or_refuse(data: bytes) -> None:
    try:
        ztoc = parse(data)
    except InvalidZtoc:
        return
    assert isinstance(ztoc, Ztoc)
    assert all(isinstance(one, FileEntry) for one in ztoc.entries)
    assert len(spans_of(ztoc)) == len(ztoc.compression.span_digests)


@functools.cache
def slim(algorithm: Algorithm) -> tuple[bytes, tuple[int, ...]]:
    """Return a zTOC, and those of its positions where a change can matter: all but most of the windows."""
    data = small(algorithm)
    ztoc = parse(data)
    skip: set[int] = set()
    for span in spans_of(ztoc):
        if span.window_offset >= 0:
            skip |= set(range(span.window_offset + 4, span.window_offset + WINDOW_SIZE - 4))
    return data, tuple(at for at in range(len(data)) if at not in skip)


@settings(max_examples=600, deadline=None)
@given(algorithm=st.sampled_from(Algorithm), at=st.integers(0, 10_000), value=st.integers(0, 255))
def test_any_changed_byte_gives_a_ztoc_or_the_error(algorithm: Algorithm, at: int, value: int) -> None:
    data, positions = slim(algorithm)
    place = positions[at % len(positions)]
    parse_or_refuse(data[:place] + bytes([value]) + data[place + 1 :])


@settings(max_examples=300, deadline=None)
@given(
    algorithm=st.sampled_from(Algorithm),
    at=st.integers(0, 10_000),
    value=st.sampled_from([0, 1, 4, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFC]),
)
def test_any_changed_word_gives_a_ztoc_or_the_error(algorithm: Algorithm, at: int, value: int) -> None:
    data, positions = slim(algorithm)
    place = positions[at % len(positions)] & ~3
    changed = bytearray(data)
    changed[place : place + 4] = struct.pack("<I", value)
    parse_or_refuse(bytes(changed))


@settings(max_examples=150, deadline=None)
@given(algorithm=st.sampled_from(Algorithm), length=st.integers(0, 1 << 18))
@example(Algorithm.GZIP, 0)
@example(Algorithm.GZIP, 3)
@example(Algorithm.GZIP, 4)
def test_any_prefix_gives_a_ztoc_or_the_error(algorithm: Algorithm, length: int) -> None:
    data = small(algorithm)
    parse_or_refuse(data[: length % len(data)])


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_give_a_ztoc_or_the_error(data: bytes) -> None:
    parse_or_refuse(data)
