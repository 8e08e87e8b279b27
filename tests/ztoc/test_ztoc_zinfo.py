"""The zinfo blobs: both versions of the gzip one, the uncompressed one, and what is neither."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.errors import InvalidZtoc
from snapshotter.ztoc.zinfo import (
    WINDOW_SIZE,
    Checkpoint,
    TarZinfo,
    parse_gzip,
    parse_tar,
    write_gzip,
    write_tar,
)

POINTS = [
    (10, 0, 0, bytes(WINDOW_SIZE)),
    (5000, 30_000, 3, b"w" * WINDOW_SIZE),
    (9000, 70_000, 7, b"v" * WINDOW_SIZE),
]
POINT_SIZE = 17 + WINDOW_SIZE


@pytest.mark.parametrize("version", [1, 2])
def test_both_versions_come_back(version: int) -> None:
    blob = write_gzip(4096, POINTS, version=version)
    assert len(blob) == 12 + POINT_SIZE * (3 if version == 2 else 2)
    zinfo = parse_gzip(blob)
    assert (zinfo.version, zinfo.span_size) == (version, 4096)
    assert [one[:3] for one in zinfo.checkpoints] == [one[:3] for one in POINTS]
    for checkpoint, (*_, window) in zip(zinfo.checkpoints[2 - version :], POINTS[2 - version :], strict=True):
        at = checkpoint.window_offset
        assert blob[at : at + WINDOW_SIZE] == window


def test_version_1_implies_the_first_checkpoint() -> None:
    assert parse_gzip(write_gzip(1, POINTS, version=1)).checkpoints[0] == Checkpoint(10, 0, 0, -1)
    assert parse_gzip(write_gzip(1, POINTS[:1], version=1)).checkpoints == (Checkpoint(10, 0, 0, -1),)


def test_the_layout() -> None:
    blob = write_gzip(9, POINTS[1:2])
    assert struct.unpack_from("<iqqqB", blob) == (1, 9, 5000, 30_000, 3)
    assert parse_gzip(blob).checkpoints == (Checkpoint(5000, 30_000, 3, 12 + 17),)


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"", "0 bytes are too few"),
        (bytes(11), "11 bytes are too few"),
        (struct.pack("<iq", 0, 1), "0 checkpoints"),
        (struct.pack("<iq", -1, 1), "-1 checkpoints"),
        (struct.pack("<iq", 1, -1), "span size -1"),
        (write_gzip(1, POINTS)[:-1], "do not hold 3 checkpoints in any version"),
        (write_gzip(1, POINTS) + b"x", "do not hold 3 checkpoints"),
        (struct.pack("<iq", 5, 1) + write_gzip(1, POINTS)[12:], "do not hold 5 checkpoints"),
        (struct.pack("<iq", 2, 1) + write_gzip(1, POINTS)[12:], "do not hold 2 checkpoints"),
        (struct.pack("<iq", 0x7FFFFFFF, 1), "do not hold 2147483647"),
        (write_gzip(1, [(9, 0, 0, bytes(WINDOW_SIZE))]), "impossible checkpoint 0: in 9"),
        (write_gzip(1, [*POINTS, (-1, 0, 0, bytes(WINDOW_SIZE))]), "impossible checkpoint 3: in -1"),
        (write_gzip(1, [*POINTS, (10, -1, 0, bytes(WINDOW_SIZE))]), "out -1"),
        (write_gzip(1, [*POINTS, (10, 0, 8, bytes(WINDOW_SIZE))]), "8 bits"),
    ],
)
def test_what_is_no_gzip_zinfo(blob: bytes, message: str) -> None:
    with pytest.raises(InvalidZtoc, match=message):
        parse_gzip(blob)


def test_the_published_tar_zinfo() -> None:
    assert write_tar(4_194_304, 10_240).hex() == (
        "140000000000000000000a001c0018000c0004000a000000002800000000000000004000000000000000000002000000"
    )


@given(st.integers(1, (1 << 63) - 1), st.integers(0, (1 << 63) - 1))
def test_tar_zinfo_comes_back(span_size: int, size: int) -> None:
    assert parse_tar(write_tar(span_size, size)) == TarZinfo(2, span_size, size)


@pytest.mark.parametrize(("span_size", "size"), [(0, 5), (-1, 5), (1, -1)])
def test_impossible_tar_zinfo(span_size: int, size: int) -> None:
    with pytest.raises(InvalidZtoc, match="impossible span size"):
        parse_tar(write_tar(span_size, size))
