"""The writer, byte for byte: the published vector, an independent writer, and back through the parser."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotter.units import Digest, sha256_digest
from snapshotter.ztoc.flatbuffers import Shape, Table, Writer
from snapshotter.ztoc.model import KINDS, Algorithm, CompressionInfo, FileEntry, Ztoc
from snapshotter.ztoc.serialize import serialize, serialize_with_offset
from tests.support import ztoc_oracle

EMPTY = FileEntry(b"", "", 0, 0, b"", 0, 0, 0, b"", b"", "0001-01-01T00:00:00Z", 0, 0, ())


def ztoc_of(
    *entries: FileEntry, info: CompressionInfo, tool: str = "t", sizes: tuple[int, int] = (0, 0)
) -> Ztoc:
    return Ztoc("0.9", tool, *sizes, entries, (), info)


def test_the_published_vector() -> None:
    info = CompressionInfo(Algorithm.GZIP, 3, (), bytes(1 << 16))
    data = serialize(ztoc_of(EMPTY, EMPTY, info=info, tool="AWS SOCI CLI", sizes=(2_000_000, 2_500_000)))
    assert len(data) == 65_928
    assert sha256_digest(data) == "sha256:eba28fdf50b1b57543f57dd051b2468c1d4f57b64d2006c75aa4de1d03e6c7ec"


def numbers(bits: int, *, signed: bool = True) -> st.SearchStrategy[int]:
    low = -(1 << bits - 1) if signed else 0
    high = (1 << bits - signed) - 1
    return st.one_of(st.just(0), st.sampled_from([low, high, 1]), st.integers(low, high))


TEXT = st.binary(max_size=20)
PAX = st.dictionaries(TEXT, TEXT, max_size=3).map(lambda records: tuple(sorted(records.items())))

ENTRIES = st.builds(
    FileEntry,
    name=TEXT,
    kind=st.sampled_from(KINDS),
    offset=numbers(64),
    size=numbers(64),
    linkname=TEXT,
    mode=numbers(64),
    uid=numbers(32, signed=False),
    gid=numbers(32, signed=False),
    uname=TEXT,
    gname=TEXT,
    mod_time=st.sampled_from(["", "2024-01-02T03:04:05Z", "2024-01-02T03:04:05.123456789Z"]),
    devmajor=numbers(64),
    devminor=numbers(64),
    pax=PAX,
)


@settings(max_examples=200, deadline=None)
@given(
    entries=st.lists(ENTRIES, max_size=8),
    zinfo=st.binary(max_size=50),
    spans=st.integers(0, 4),
    algorithm=st.sampled_from(Algorithm),
    sizes=st.tuples(numbers(64), numbers(64)),
    tool=st.text(max_size=9),
)
def test_equals_an_independent_writer(
    entries: list[FileEntry],
    zinfo: bytes,
    spans: int,
    algorithm: Algorithm,
    sizes: tuple[int, int],
    tool: str,
) -> None:
    digests = tuple(Digest(f"sha256:{i:064x}") for i in range(spans))
    info = CompressionInfo(algorithm, spans - 1, digests, zinfo)
    data, zinfo_offset = serialize_with_offset(ztoc_of(*entries, info=info, tool=tool, sizes=sizes))
    written = None if algorithm is Algorithm.GZIP else int(algorithm)
    assert data == ztoc_oracle.serialize("0.9", tool, entries, (zinfo, digests, written), sizes)
    assert data[zinfo_offset : zinfo_offset + len(zinfo)] == zinfo
    assert int.from_bytes(data[zinfo_offset - 4 : zinfo_offset], "little") == len(zinfo)


def test_all_scalars_zero_needs_no_wide_alignment() -> None:
    data = serialize(ztoc_of(info=CompressionInfo(Algorithm.GZIP, 0, (), b"")))
    assert data == ztoc_oracle.serialize("0.9", "t", [], (b"", [], None), (0, 0), 0)
    assert len(data) % 8 == 4


@pytest.mark.parametrize("letter", ["b", "i", "I", "q"])
def test_every_kind_of_number_comes_back(letter: str) -> None:
    writer = Writer()
    filler = writer.string(b"xyz")
    shape = Shape([(0, "o", 0), (2, letter, 5), (1, "q", 0)])
    data = writer.finish(writer.table(shape, (filler, 7, -1)))
    table = Table.root(data, "it")
    assert (table.string(0), table.scalar(1, "q"), table.scalar(2, letter, 5)) == (b"xyz", -1, 7)
    assert table.scalar(3, letter, 5) == 5
    data = (writer := Writer()).finish(writer.table(shape, (0, 5, 0)))
    assert Table.root(data, "it").scalar(2, letter, 5) == 5
