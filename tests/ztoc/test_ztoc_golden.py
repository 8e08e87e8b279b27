"""What the reference tool wrote: read completely, and made again to the same digest.

The blob of the fourth zTOC is too large to keep. Its tar is not: it is regenerated, and everything that
depends on it (entries, windows, the end of the archive) is made again; checkpoint positions and span digests,
which depend on the compressed bytes, are taken over from the golden zTOC.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import zstandard

from snapshotter.units import sha256_digest
from snapshotter.ztoc.build import build
from snapshotter.ztoc.inflate import inflate_span
from snapshotter.ztoc.model import Algorithm
from snapshotter.ztoc.parse import parse
from snapshotter.ztoc.serialize import serialize
from snapshotter.ztoc.spans import spans_of
from snapshotter.ztoc.tar import TarScanner, parse_header
from snapshotter.ztoc.zinfo import WINDOW_SIZE, parse_gzip, write_gzip
from tests.support import ztoc_oracle
from tests.support.images import tar
from tests.support.nasty import lower_entries

GOLDEN = Path(__file__).parents[1] / "data/golden"
BUILD_TOOL = "AWS SOCI CLI v0.1"
NASTY = "4e37792301b20d72ae84d002c78e1d8607458f50b7dd1aa23aeb9fdabb092ca3"

PAIRS = {
    "548d7f39f1ca3b3ad522c9a79e2f3ca7fc98bdaf0dcaec1f942595b2324ce655": (
        "073aef406892ce1ab13a72ff4fae26de5efb06094f7db03c347c7a7f5db78888"
    ),
    "3e61d98471b189cd9a303eda610e22ee5b8da8c7d57379308cbedd41ccdb29a4": (
        "5623b459f8fa0a702b1e8ba5c2bc3094edada5b42665a95454cfa69c70186f86"
    ),
    "1d55d564821eafe593473a6f1b023f7116b77298c95f06dc278795873aa7faab": (
        "611f55b9f8401739af4b4d34afecc0bff7398bbab7e964c5bf338b3f1a44aaad"
    ),
}
"""zTOC -> layer blob, by the hex of their sha256."""


def golden_ztoc(name: str) -> bytes:
    return (GOLDEN / "ztoc" / name).read_bytes()


def golden_nasty() -> bytes:
    packed = (GOLDEN / "ztoc" / f"{NASTY}.zst").read_bytes()
    return zstandard.ZstdDecompressor().decompress(packed)


@pytest.mark.parametrize("backend", ["zlib-ng", "zlib"])
@pytest.mark.parametrize(("ztoc", "blob"), PAIRS.items())
def test_rebuilt_to_the_same_digest(ztoc: str, blob: str, backend: str) -> None:
    data = (GOLDEN / "blobs" / blob).read_bytes()
    built = build([data], algorithm=Algorithm.GZIP, build_tool=BUILD_TOOL, backend=backend)
    assert built.digest == f"sha256:{ztoc}"
    assert built.layer_digest == f"sha256:{blob}"
    assert built.layer_size == len(data)


@pytest.mark.parametrize(("ztoc", "blob"), PAIRS.items())
def test_the_oracle_agrees(ztoc: str, blob: str) -> None:
    data = (GOLDEN / "blobs" / blob).read_bytes()
    assert sha256_digest(ztoc_oracle.build(data, 1 << 22, BUILD_TOOL)) == f"sha256:{ztoc}"


@pytest.mark.parametrize(("ztoc", "blob"), PAIRS.items())
def test_every_file_reads_as_tarfile_reads_it(ztoc: str, blob: str) -> None:
    data = (GOLDEN / "blobs" / blob).read_bytes()
    raw = golden_ztoc(ztoc)
    parsed = parse(raw)
    (span,) = spans_of(parsed)
    out = inflate_span(
        data[span.compressed_start : span.compressed_end],
        algorithm=Algorithm.GZIP,
        bits=span.bits,
        window=raw[span.window_offset : span.window_offset + WINDOW_SIZE],
        length=span.uncompressed_end,
    )
    files = [entry for entry in parsed.entries if entry.kind == "reg"]
    read = [(entry.name, bytes(out[entry.offset : entry.offset + entry.size])) for entry in files]
    assert read == ztoc_oracle.contents(bytes(out))


@pytest.mark.parametrize("name", [*PAIRS, NASTY])
def test_parsed_and_written_again(name: str) -> None:
    data = golden_nasty() if name == NASTY else golden_ztoc(name)
    assert sha256_digest(data) == f"sha256:{name}"
    assert serialize(parse(data)) == data


def test_the_large_one_is_made_again_from_its_tar() -> None:
    golden = parse(golden_nasty())
    stream = tar(lower_entries(full=True))
    scanner = TarScanner()
    scanner.feed(stream)
    scanner.close()
    assert tuple(scanner.entries) == golden.entries
    assert scanner.end_offset == golden.uncompressed_size

    extended = bytes(WINDOW_SIZE) + stream
    points = [
        (point[0], point[1], point[2], extended[point[1] : point[1] + WINDOW_SIZE])
        for point in parse_gzip(golden.compression.zinfo).checkpoints
    ]
    info = dataclasses.replace(golden.compression, zinfo=write_gzip(1 << 22, points))
    made = dataclasses.replace(golden, entries=tuple(scanner.entries), compression=info)
    assert sha256_digest(serialize(made)) == f"sha256:{NASTY}"

    for entry, start in zip(golden.entries, golden.header_starts, strict=True):
        assert parse_header(stream[start : entry.offset])._replace(offset=entry.offset) == entry


def test_the_large_one_ends_in_a_span_behind_the_archive() -> None:
    golden = parse(golden_nasty())
    last = spans_of(golden)[-1]
    assert last.uncompressed_start == last.uncompressed_end > golden.uncompressed_size
    assert last.compressed_end - last.compressed_start == 15
