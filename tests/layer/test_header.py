"""The tar header of every file of a layer against its zTOC entry, and against entries that differ in one thing."""

from __future__ import annotations

from contextlib import closing

import pytest

from snapshotter.errors import HeaderMismatch
from snapshotter.layer.header import FINGERPRINT_SIZE, check, fingerprint
from snapshotter.ztoc.model import FileEntry
from snapshotter.ztoc.tar import parse_header
from tests.support.facts import tree_of, walk, ztoc_of
from tests.support.images import Entry, tar
from tests.support.nasty import nasty_layers, xattr_records

NASTY = nasty_layers()[0]
FILE = tar({"./dir//file": Entry(b"x", uid=1, gid=2, pax=xattr_records({"user.a": b"1", "user.b": b"\xff"}))})
ENTRY = ztoc_of(FILE).entries[0]
REGION = FILE[: ENTRY.offset]


def test_every_regular_file_of_a_layer_passes() -> None:
    checked = 0
    with closing(tree_of(NASTY)) as tree:
        for _, ino in walk(tree):
            node = tree.row(ino)
            if node.mode >> 12 == 0o10:
                check(NASTY[node.header_start : node.data_offset], node.fingerprint)
                checked += 1
    assert checked > 50


def test_what_does_not_matter() -> None:
    same = [
        ENTRY._replace(name=b"dir/file"),
        ENTRY._replace(name=b"./dir/./file/"),
        ENTRY._replace(mod_time=ENTRY.mod_time.replace("T22:13:20Z", "T23:13:20+01:00")),
        ENTRY._replace(mode=ENTRY.mode | 0o100000),
        ENTRY._replace(offset=7, uname=b"other", gname=b"other"),
        ENTRY._replace(pax=(*reversed(ENTRY.pax), (b"comment", b"x"))),
    ]
    assert same[2].mod_time != ENTRY.mod_time
    assert {fingerprint(entry) for entry in same} == {fingerprint(ENTRY)}
    assert len(fingerprint(ENTRY)) == FINGERPRINT_SIZE


@pytest.mark.parametrize(
    "change",
    [
        {"name": b"dir/other"},
        {"name": b"/dir/file"},
        {"kind": "dir"},
        {"size": 2},
        {"mod_time": "2023-11-14T22:13:21Z"},
        {"mod_time": "2023-11-14T22:13:20.000000001Z"},
        {"mod_time": ""},
        {"linkname": b"x"},
        {"mode": 0o600},
        {"mode": 0o4644},
        {"uid": 0},
        {"gid": 0},
        {"devmajor": 1},
        {"devminor": 1},
        {"pax": ENTRY.pax[1:]},
        {"pax": tuple((key, value + b"2") for key, value in ENTRY.pax)},
        {"pax": (*ENTRY.pax, (b"SCHILY.xattr.user.c", b""))},
    ],
    ids=str,
)
def test_what_matters(change: dict[str, object]) -> None:
    other = FileEntry(**{**ENTRY._asdict(), **change})
    assert fingerprint(other) != fingerprint(ENTRY)
    with pytest.raises(HeaderMismatch, match="not the one that the zTOC describes"):
        check(REGION, fingerprint(other))


def test_fields_do_not_run_into_one_another() -> None:
    moved = [
        ENTRY._replace(name=b"ab", linkname=b"c"),
        ENTRY._replace(name=b"a", linkname=b"bc"),
        ENTRY._replace(name=b"abc", linkname=b""),
        ENTRY._replace(name=b"ab", pax=((b"SCHILY.xattr.ab", b"c"),)),
        ENTRY._replace(name=b"ab", pax=((b"SCHILY.xattr.a", b"bc"),)),
    ]
    assert len({fingerprint(entry) for entry in moved}) == len(moved)


@pytest.mark.parametrize(
    "region",
    [
        b"",
        REGION[:512],
        REGION + bytes(512),
        bytes(512),
        bytes(1024),
        REGION[:-1],
        b"\xff" * len(REGION),
        REGION * 2,
    ],
    ids=len,
)
def test_regions_that_are_not_one_header(region: bytes) -> None:
    check(REGION, fingerprint(parse_header(REGION)))
    with pytest.raises(HeaderMismatch):
        check(region, fingerprint(ENTRY))


def test_a_kind_that_is_not_supported_is_a_mismatch() -> None:
    sparse = bytearray(tar({"f": b""})[:512])
    sparse[156:157] = b"S"
    sparse[148:156] = b" " * 8
    sparse[148:156] = b"%06o\0 " % sum(sparse)
    with pytest.raises(HeaderMismatch, match="no readable tar header"):
        check(bytes(sparse), bytes(16))
