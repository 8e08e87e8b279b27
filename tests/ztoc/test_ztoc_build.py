"""The one-pass builder against the independent oracle, and reads through what it built against tarfile."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import random
import tarfile
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotter.errors import InvalidTar, UnsupportedLayer, UsageError
from snapshotter.ztoc.build import BuiltZtoc, build
from snapshotter.ztoc.inflate import inflate_span
from snapshotter.ztoc.model import Algorithm
from snapshotter.ztoc.parse import parse
from snapshotter.ztoc.spans import Span, covering, spans_of
from snapshotter.ztoc.tar import parse_header
from snapshotter.ztoc.zinfo import WINDOW_SIZE
from tests.support import raw_tar, ztoc_oracle
from tests.support.gzip_forms import FORMS, deflated, members
from tests.support.images import Entry, directory, hardlink, symlink, tar
from tests.support.random_layers import layers

TOOL = "a tool"
SPAN_SIZE = 20_000


@functools.cache
def some_tar() -> bytes:
    """A tar with text, noise, zeros and every kind of entry; its padding holds block borders, too."""
    source = random.Random(5)
    words = [source.randbytes(source.randrange(2, 9)).hex() for _ in range(300)]
    return tar(
        [
            ("./", directory()),
            ("./text", " ".join(source.choices(words, k=14_000)).encode()),
            ("./empty", b""),
            ("./noise", source.randbytes(30_000)),
            ("./zeros", bytes(50_000)),
            ("./link", symlink("text")),
            ("./hard", hardlink("./text")),
            ("./xattr", Entry(b"x", pax={"SCHILY.xattr.user.a": "b", "mtime": "1700000000.25"})),
            ("./" + "long" * 60, b"l" * 512),
            ("./last", source.randbytes(1000)),
        ]
    )


@functools.cache
def oracle(form: str) -> tuple[bytes, bytes]:
    """Return a layer blob of that form and its zTOC by the oracle."""
    blob = FORMS[form](some_tar())
    return blob, ztoc_oracle.build(blob, SPAN_SIZE, TOOL)


def built(blob: bytes, *, chunk: int = 1 << 16, backend: str | None = None) -> BuiltZtoc:
    chunks = [blob[at : at + chunk] for at in range(0, len(blob), chunk)]
    return build(chunks, algorithm=Algorithm.GZIP, span_size=SPAN_SIZE, build_tool=TOOL, backend=backend)


def inflated(result: BuiltZtoc, blob: bytes, span: Span, backend: str | None = None) -> bytes:
    """Return the bytes of one span, from nothing but its own compressed bytes and its window."""
    assert hashlib.sha256(blob[span.compressed_start : span.compressed_end]).hexdigest() == span.digest[7:]
    window = None
    if span.window_offset >= 0:
        window = result.data[span.window_offset : span.window_offset + WINDOW_SIZE]
    return bytes(
        inflate_span(
            memoryview(blob)[span.compressed_start : span.compressed_end],
            algorithm=result.ztoc.compression.algorithm,
            bits=span.bits,
            window=window,
            length=span.uncompressed_end - span.uncompressed_start,
            backend=backend,
        )
    )


def files_through_spans(result: BuiltZtoc, blob: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield name and content of each regular file, read by way of the spans that cover it."""
    spans = spans_of(result.ztoc)
    starts = [span.uncompressed_start for span in spans]
    for entry in result.ztoc.entries:
        if entry.kind != "reg":
            continue
        content = b""
        end = entry.offset + entry.size
        for i in covering(starts, entry.offset, end):
            data = inflated(result, blob, spans[i])
            content += data[max(entry.offset - starts[i], 0) : end - starts[i]]
        yield entry.name, content


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("backend", "chunk"), [("zlib-ng", 1 << 20), ("zlib-ng", 333), ("zlib", 4096)])
def test_equals_the_oracle(form: str, backend: str, chunk: int) -> None:
    blob, expected = oracle(form)
    result = built(blob, chunk=chunk, backend=backend)
    assert result.data == expected
    assert result.ztoc == parse(expected)
    assert result.digest == f"sha256:{hashlib.sha256(expected).hexdigest()}"
    assert result.layer_digest == f"sha256:{hashlib.sha256(blob).hexdigest()}"
    assert result.diff_id == f"sha256:{hashlib.sha256(some_tar()).hexdigest()}"
    assert result.layer_size == len(blob)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["isal", "zlib"])
def test_every_span_inflates_alone(form: str, backend: str) -> None:
    blob, _ = oracle(form)
    result = built(blob)
    data = some_tar()
    for span in spans_of(result.ztoc):
        expected = data[span.uncompressed_start : span.uncompressed_end]
        assert inflated(result, blob, span, backend) == expected


@pytest.mark.parametrize("form", ["level 6", "fixed codes", "member per file", "stored blocks"])
def test_files_read_through_spans_equal_tarfile(form: str) -> None:
    blob, _ = oracle(form)
    assert list(files_through_spans(built(blob), blob)) == ztoc_oracle.contents(some_tar())


def test_the_forms_cover_what_they_are_for() -> None:
    bits = {span.bits for form in FORMS for span in spans_of(built(oracle(form)[0]).ztoc)}
    assert bits == set(range(8))
    crossing = built(oracle("member per file")[0]).ztoc
    assert len(spans_of(crossing)) > 5
    assert len(spans_of(built(oracle("extra field")[0]).ztoc)) > 1
    first = spans_of(built(oracle("all header fields")[0]).ztoc)[0]
    assert first.compressed_start == 10 + 2 + 300 + 10 + 11 + 2


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_tar_formats_equal_the_oracle(form: int) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form, errors="surrogateescape") as archive:
        for i in range(40):
            info = tarfile.TarInfo("/".join([f"d{i}"] * (i + 1)) + "/\udcff\udcfe")
            info.size, info.mtime, info.uid, info.uname = i * 100, i * 10_000_000, i, f"user{i}"
            archive.addfile(info, io.BytesIO(bytes([i]) * info.size))
    blob = gzip.compress(stream.getvalue())
    assert built(blob).data == ztoc_oracle.build(blob, SPAN_SIZE, TOOL)


@settings(max_examples=60, deadline=None)
@given(layer=layers(), form=st.sampled_from(["level 6", "tiny blocks", "empty members"]))
def test_random_layers_equal_the_oracle(layer: list[tuple[str, Entry]], form: str) -> None:
    stream = tar(layer)
    result = built(FORMS[form](stream))
    assert [entry._replace(name=b"") for entry in result.ztoc.entries] == [
        entry._replace(name=b"") for entry in ztoc_oracle.entries(stream)
    ]
    assert parse(result.data) == result.ztoc
    for entry, start in zip(result.ztoc.entries, result.ztoc.header_starts, strict=True):
        assert parse_header(stream[start : entry.offset])._replace(offset=entry.offset) == entry


@pytest.mark.parametrize("chunk", [511, 10_240, 1 << 21])
@pytest.mark.parametrize("span_size", [512, 51_200, 60_000, 102_400, 204_800, 1 << 22])
def test_uncompressed(span_size: int, chunk: int) -> None:
    data = tar({"f": random.Random(1).randbytes(200_000)})
    assert len(data) == 204_800
    chunks = (data[at : at + chunk] for at in range(0, len(data), chunk))
    result = build(chunks, algorithm=Algorithm.UNCOMPRESSED, span_size=span_size, build_tool=TOOL)
    spans = spans_of(parse(result.data))
    assert [span.compressed_start for span in spans] == list(range(0, len(data), span_size))
    assert b"".join(data[span.compressed_start : span.compressed_end] for span in spans) == data
    for span in spans:
        assert inflated(result, data, span) == data[span.uncompressed_start : span.uncompressed_end]
    assert result.layer_digest == result.diff_id == f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert list(files_through_spans(result, data)) == ztoc_oracle.contents(data)


def test_an_uncompressed_zinfo_says_the_size_of_the_blob_and_not_of_the_archive() -> None:
    result = build([tar({"f": b"x"})], algorithm=Algorithm.UNCOMPRESSED)
    assert result.ztoc.uncompressed_size == 4 * 512
    (span,) = spans_of(result.ztoc)
    assert (span.compressed_end, span.uncompressed_end) == (10_240, 4 * 512)


def test_an_empty_layer_without_compression_has_no_spans() -> None:
    result = build([], algorithm=Algorithm.UNCOMPRESSED)
    assert (result.ztoc.entries, result.ztoc.compression.max_span_id) == ((), -1)
    assert parse(result.data) == result.ztoc


def test_chunks_of_any_buffer_type_and_size() -> None:
    blob, expected = oracle("level 6")
    chunks = [b"", bytearray(blob[:5]), memoryview(blob)[5:], b""]
    result = build(chunks, algorithm=Algorithm.GZIP, span_size=SPAN_SIZE, build_tool=TOOL)
    assert result.data == expected


def test_large_output_and_windows_over_buffer_borders() -> None:
    source = random.Random(2)
    data = tar({"f": b"".join(source.randbytes(300) * 9 for _ in range(2000))})
    blob = deflated(data, flush=1, every=100_000)
    for backend in ("zlib-ng", "zlib"):
        result = build([blob], algorithm=Algorithm.GZIP, span_size=300_000, backend=backend)
        spans = spans_of(result.ztoc)
        assert len(spans) > 10
        for span in spans:
            assert inflated(result, blob, span) == data[span.uncompressed_start : span.uncompressed_end]


def test_padding_may_have_a_checkpoint_of_its_own() -> None:
    data = tar({"f": b"x"}) + bytes(100_000)
    blob = deflated(data, level=0)
    result = build([blob], algorithm=Algorithm.GZIP, span_size=30_000)
    assert result.ztoc.uncompressed_size == 4 * 512
    spans = spans_of(parse(result.data))
    assert [span.uncompressed_end >= span.uncompressed_start for span in spans] == [True] * len(spans)
    assert spans[-1].uncompressed_start > result.ztoc.uncompressed_size
    assert inflated(result, blob, spans[0])[: 4 * 512] == data[: 4 * 512]


def test_span_size_zero_takes_every_border() -> None:
    blob = deflated(some_tar(), flush=1, every=10_000)
    result = build([blob], algorithm=Algorithm.GZIP, span_size=0)
    assert result.data == ztoc_oracle.build(blob, 0, "soci-lazy-snapshotter v0.1")


@pytest.mark.parametrize(
    ("algorithm", "span_size"),
    [(Algorithm.GZIP, -1), (Algorithm.UNCOMPRESSED, 0), (Algorithm.UNCOMPRESSED, -5)],
)
def test_impossible_span_sizes(algorithm: Algorithm, span_size: int) -> None:
    with pytest.raises(UsageError, match=str(span_size)):
        build([], algorithm=algorithm, span_size=span_size)


def damaged(name: str) -> bytes:
    blob = deflated(some_tar())
    two = members(some_tar(), [70_000])
    return {
        "empty": b"",
        "only a header": blob[:10],
        "truncated data": blob[: len(blob) // 2],
        "truncated trailer": blob[:-1],
        "wrong checksum": blob[:-8] + bytes([blob[-8] ^ 1]) + blob[-7:],
        "wrong length": blob[:-1] + bytes([blob[-1] ^ 1]),
        "damaged block": blob[:5000] + bytes(300) + blob[5300:],
        "second member truncated": two[:-20],
        "garbage behind": blob + b"garbage",
        "one byte behind": blob + b"\x1f",
        "zeros behind": blob + bytes(512),
        "a zlib stream": deflated(some_tar(), window_bits=15),
        "no gzip at all": some_tar(),
    }[name]


@pytest.mark.parametrize("backend", ["zlib-ng", "zlib"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", "ends at 0"),
        ("only a header", "ends at 10"),
        ("truncated data", "in the middle of a member"),
        ("truncated trailer", "in the middle of a member"),
        ("wrong checksum", "incorrect data check"),
        ("wrong length", "incorrect length check"),
        ("damaged block", "gzip stream: "),
        ("second member truncated", "in the middle of a member"),
        ("garbage behind", "incorrect header check"),
        ("one byte behind", "in the middle of a member"),
        ("zeros behind", "incorrect header check"),
        ("a zlib stream", "incorrect header check"),
        ("no gzip at all", "incorrect header check"),
    ],
)
def test_damaged_gzip_streams(name: str, message: str, backend: str) -> None:
    with pytest.raises(InvalidTar, match=message):
        built(damaged(name), backend=backend)


def test_damaged_and_unsupported_tars() -> None:
    with pytest.raises(InvalidTar, match="ends at 1300, 236 bytes before the end of b'f'"):
        built(gzip.compress(raw_tar.entry(bytes(1024))[:1300]))
    with pytest.raises(UnsupportedLayer, match="at 0: entry b'pax_global_header' of type b'g'"):
        built(gzip.compress(raw_tar.entry(b"", name=b"pax_global_header", flag=b"g")))


def test_no_thread_is_left_behind() -> None:
    before = threading.active_count()
    built(oracle("level 6")[0])
    with pytest.raises(InvalidTar):
        built(damaged("wrong checksum"))
    with pytest.raises(ZeroDivisionError):
        build((deflated(some_tar())[: 1 // i] for i in (1, 0)), algorithm=Algorithm.GZIP)
    assert threading.active_count() == before
