"""The rules by which a tar stream becomes entries, one by one, on blocks put together by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotter.errors import InvalidTar, UnsupportedLayer
from snapshotter.ztoc.model import FileEntry
from snapshotter.ztoc.pax import MAX_PAYLOAD
from snapshotter.ztoc.tar import TarScanner, parse_header
from tests.support.images import tar
from tests.support.nasty import lower_entries
from tests.support.raw_tar import BLOCK, END, GNU, V7, entry, gnu_long, header, padded, pax, pax_payload


def scan(*blocks: bytes, chunk: int = 1 << 20, end: bytes = END) -> TarScanner:
    stream = b"".join(blocks) + end
    scanner = TarScanner()
    for start in range(0, len(stream), chunk):
        scanner.feed(stream[start : start + chunk])
    scanner.close()
    return scanner


def only(*blocks: bytes) -> FileEntry:
    """Return the one entry in `blocks`; the region is read alone, too, and must give the same."""
    scanner = scan(*blocks)
    (found,) = scanner.entries
    region = b"".join(blocks)[: found.offset]
    assert parse_header(region) == found
    return found


def test_a_plain_file() -> None:
    blocks = entry(
        b"data",
        name=b"a/b",
        mode=0o750,
        uid=7,
        gid=8,
        mtime=1,
        uname=b"u",
        gname=b"g",
        devmajor=3,
        devminor=4,
    )
    assert only(blocks) == FileEntry(
        name=b"a/b",
        kind="reg",
        offset=512,
        size=4,
        linkname=b"",
        mode=0o750,
        uid=7,
        gid=8,
        uname=b"u",
        gname=b"g",
        mod_time="1970-01-01T00:00:01Z",
        devmajor=3,
        devminor=4,
        pax=(),
    )


@pytest.mark.parametrize(
    ("flag", "kind"),
    [
        (b"0", "reg"),
        (b"\0", "reg"),
        (b"1", "hardlink"),
        (b"2", "symlink"),
        (b"3", "char"),
        (b"4", "block"),
        (b"5", "dir"),
        (b"6", "fifo"),
    ],
)
def test_kinds(flag: bytes, kind: str) -> None:
    assert only(header(flag=flag, linkname=b"to")).kind == kind


def test_only_the_oldest_type_makes_a_trailing_slash_a_directory() -> None:
    assert only(header(name=b"d/", flag=b"\0")).kind == "dir"
    assert only(header(name=b"d/", flag=b"0")).kind == "reg"
    assert only(gnu_long(b"L", b"long/d/"), header(flag=b"\0")).kind == "dir"
    sparse = pax((b"GNU.sparse.map", b""), (b"GNU.sparse.name", b"d/"), (b"GNU.sparse.major", b"0"))
    assert only(sparse, header(flag=b"\0")).kind == "reg"


@pytest.mark.parametrize("flag", [b"g", b"S", b"7", b"V", b"X", b"N", b"Z", b"\xff"])
def test_types_that_the_format_cannot_hold(flag: bytes) -> None:
    with pytest.raises(UnsupportedLayer, match=r"tar stream at 1024: entry b'odd' of type b"):
        scan(entry(b"x"), header(name=b"odd", flag=flag))


@pytest.mark.parametrize("flag", [b"1", b"2", b"3", b"4", b"5", b"6"])
@pytest.mark.parametrize("size", [700, b"\xff" * 12])
def test_header_only_types_have_no_data_whatever_they_say(flag: bytes, size: int | bytes) -> None:
    first, second = scan(header(flag=flag, size=size), entry(b"next", name=b"n")).entries
    assert (first.size, second.name, second.offset) == (0, b"n", 2 * BLOCK)


def test_negative_sizes() -> None:
    with pytest.raises(InvalidTar, match="at 0: tar header of b'f': negative size"):
        scan(header(size=b"\xff" * 12))
    with pytest.raises(InvalidTar, match="PAX header of b'f': negative size"):
        scan(pax((b"size", b"-1")), header())


class TestEnd:
    """Where an archive ends, and where it must not."""

    def test_behind_two_zero_blocks_and_nothing_more_is_looked_at(self) -> None:
        scanner = scan(entry(b"x"), end=END + b"\xff" * 5000)
        assert scanner.end_offset == 4 * BLOCK
        scanner.feed(b"and more")
        scanner.close()
        assert scanner.end_offset == 4 * BLOCK

    @pytest.mark.parametrize("end", [b"", bytes(BLOCK)])
    def test_at_a_header_border_or_behind_one_zero_block(self, end: bytes) -> None:
        assert scan(entry(b"x"), end=end).end_offset == 2 * BLOCK + len(end)

    def test_within_the_padding_of_data(self) -> None:
        for length in (3, 4, 511):
            assert scan(entry(b"abc")[: BLOCK + length], end=b"").end_offset == BLOCK + length

    def test_within_the_padding_of_an_extended_header(self) -> None:
        blocks = pax((b"path", b"x"))
        scanner = scan(entry(b"abc"), blocks[: BLOCK + 20], end=b"")
        assert (len(scanner.entries), scanner.end_offset) == (1, 3 * BLOCK + 20)
        with pytest.raises(InvalidTar, match="PAX header"):
            scan(pax_payload(b"nonsense")[: BLOCK + 8], end=b"")

    @pytest.mark.parametrize("dropped", [pax((b"path", b"x")), gnu_long(b"L", b"x"), gnu_long(b"K", b"x")])
    def test_pseudo_entries_without_an_entry_are_dropped(self, dropped: bytes) -> None:
        assert scan(dropped).entries == []

    def test_an_empty_stream(self) -> None:
        assert (scan(end=b"").entries, scan(end=b"").end_offset) == ([], 0)

    @pytest.mark.parametrize(
        ("stream", "message"),
        [
            (entry(b"abc")[: BLOCK + 2], "ends at 514, 1 bytes before the end of b'f'"),
            (entry(b"abc")[:100], "ends at 100 within a header"),
            (entry(b"abc") + bytes(BLOCK + 1), "ends at 1537 within a header"),
            (pax((b"path", b"xyz"))[: BLOCK + 5], "ends at 517 within a header"),
            (pax((b"path", b"x" * 600))[: 2 * BLOCK], "ends at 1024 within a header"),
            (bytes(BLOCK) + header(), "at 512: a header behind a zero block"),
            (b"\xff" * BLOCK, "at 0: tar header: wrong checksum"),
        ],
    )
    def test_in_the_middle_of_something(self, stream: bytes, message: str) -> None:
        with pytest.raises(InvalidTar, match=message):
            scan(stream, end=b"")

    def test_in_the_middle_of_a_sparse_map(self) -> None:
        blocks = pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")) + header(size=1024)
        with pytest.raises(InvalidTar, match="within a header"):
            scan(blocks, b"1\n", end=b"")


class TestExtendedHeaders:
    """What PAX and GNU pseudo-entries change in the next entry, and in no other."""

    def test_pax_fields(self) -> None:
        records = pax(
            (b"path", b"p/\xff"),
            (b"linkpath", b"l"),
            (b"uname", b"U"),
            (b"gname", b"G"),
            (b"uid", b"-1"),
            (b"gid", b"4294967298"),
            (b"size", b"3"),
            (b"mtime", b"-1.5"),
            (b"atime", b"1"),
            (b"SCHILY.devmajor", b"77"),
        )
        found = only(records, header(uid=5, uname=b"u"), padded(b"abc"))
        assert (found.name, found.linkname, found.uname, found.gname) == (b"p/\xff", b"l", b"U", b"G")
        assert (found.uid, found.gid, found.size, found.devmajor) == (0xFFFFFFFF, 2, 3, 0)
        assert found.mod_time == "1969-12-31T23:59:58.5Z"
        assert found.pax[0] == (b"SCHILY.devmajor", b"77")
        assert [key for key, _ in found.pax] == sorted(key for key, _ in found.pax)

    def test_an_empty_value_leaves_the_field_but_is_recorded(self) -> None:
        records = [(key, b"") for key in (b"gid", b"mtime", b"path", b"size", b"uid", b"uname")]
        found = only(pax(*records), entry(b"abc", uid=3, mtime=9, uname=b"u"))
        assert (found.name, found.uid, found.size, found.uname) == (b"f", 3, 3, b"u")
        assert found.mod_time == "1970-01-01T00:00:09Z"
        assert found.pax == tuple(records)

    def test_they_hold_for_one_entry(self) -> None:
        second = scan(pax((b"path", b"p")), gnu_long(b"K", b"k"), header(), header(name=b"n")).entries[1]
        assert (second.name, second.linkname, second.pax) == (b"n", b"", ())

    def test_a_second_pax_header_replaces_the_first(self) -> None:
        found = only(pax((b"path", b"p"), (b"a", b"1")), pax((b"b", b"2")), header())
        assert (found.name, found.pax) == (b"f", ((b"b", b"2"),))
        assert only(pax((b"path", b"p")), pax(), header()).pax == ()

    def test_gnu_names_win_over_pax_and_end_at_a_nul(self) -> None:
        long_name = gnu_long(b"L", b"n" * 600 + b"\0junk")
        found = only(long_name, gnu_long(b"K", b"k\0"), pax((b"path", b"p"), (b"linkpath", b"l")), header())
        assert (found.name, found.linkname) == (b"n" * 600, b"k")
        assert only(gnu_long(b"L", b"\0x"), pax((b"path", b"p")), header()).name == b"p"
        assert only(gnu_long(b"L", b"a"), gnu_long(b"L", b""), header()).name == b"f"

    @pytest.mark.parametrize("flag", [b"x", b"L", b"K"])
    def test_absurd_sizes(self, flag: bytes) -> None:
        with pytest.raises(InvalidTar, match="extended header of 1048577 bytes"):
            scan(header(flag=flag, size=MAX_PAYLOAD + 1))

    @pytest.mark.parametrize("key", [b"uid", b"gid", b"size", b"mtime", b"atime", b"ctime"])
    def test_values_that_are_no_numbers(self, key: bytes) -> None:
        with pytest.raises(InvalidTar, match=f"PAX header: {key!r} is not"):
            scan(pax((key, b"12 monkeys")), header())


class TestSparse:
    """Sparse files of the three PAX dialects; the format describes them by their logical size."""

    MAP_1_0 = padded(b"2\n0\n5\n10\n5\n")

    def test_dialect_0_0(self) -> None:
        repeated = [(b"GNU.sparse.offset", b"0"), (b"GNU.sparse.numbytes", b"5")]
        records = pax((b"GNU.sparse.size", b"900"), (b"GNU.sparse.numblocks", b"1"), *repeated)
        first, second = scan(records, entry(b"abcde"), entry(b"", name=b"n")).entries
        assert (first.size, second.offset) == (900, 5 * BLOCK)
        assert first.pax[0] == (b"GNU.sparse.map", b"0,5")
        assert [key for key, _ in first.pax] == [
            b"GNU.sparse.map",
            b"GNU.sparse.numblocks",
            b"GNU.sparse.size",
        ]

    @pytest.mark.parametrize("version", [[], [(b"GNU.sparse.major", b"0"), (b"GNU.sparse.minor", b"1")]])
    def test_dialect_0_1(self, version: list[tuple[bytes, bytes]]) -> None:
        records = [
            (b"GNU.sparse.map", b"1,2,3,4"),
            (b"GNU.sparse.numblocks", b"2"),
            (b"GNU.sparse.name", b"N"),
        ]
        found = only(
            pax(*version, *records, (b"GNU.sparse.realsize", b"7")), gnu_long(b"L", b"l"), entry(b"abcdef")
        )
        assert (found.name, found.size) == (b"N", 7)

    def test_dialect_1_0_has_its_map_in_front_of_the_data(self) -> None:
        records = [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", b"20")]
        blocks = [pax(*records), entry(self.MAP_1_0 + b"0123456789", name=b"s")]
        first, second = scan(*blocks, entry(b"", name=b"n")).entries
        assert (first.name, first.size, first.offset) == (b"s", 20, 4 * BLOCK)
        assert second.offset == 6 * BLOCK
        assert only(*blocks) == first

    def test_a_long_map_of_dialect_1_0(self) -> None:
        numbers = [200, *(number for i in range(200) for number in (i * 10, 5))]
        text = padded(b"".join(b"%d\n" % number for number in numbers))
        records = [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.size", b"2000")]
        assert only(pax(*records), entry(text)).offset == 3 * BLOCK + len(text)

    def test_without_a_size_the_stored_one_counts(self) -> None:
        records = [(b"GNU.sparse.major", b"0"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.numblocks", b"0")]
        assert only(pax(*records), entry(b"abc")).size == 3

    @pytest.mark.parametrize(
        "version",
        [[(b"GNU.sparse.major", b"2")], [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"1")], []],
    )
    def test_unknown_dialects_are_ordinary_files(self, version: list[tuple[bytes, bytes]]) -> None:
        found = only(pax(*version, (b"GNU.sparse.name", b"N"), (b"GNU.sparse.size", b"99")), entry(b"abc"))
        assert (found.name, found.size) == (b"f", 3)

    @pytest.mark.parametrize(
        ("records", "message"),
        [
            ([(b"GNU.sparse.map", b"1,1,0,1"), (b"GNU.sparse.numblocks", b"2")], "block of 1 bytes at 0"),
            ([(b"GNU.sparse.map", b"0,4"), (b"GNU.sparse.numblocks", b"1")], "in a file of 3"),
            ([(b"GNU.sparse.map", b"0,-4"), (b"GNU.sparse.numblocks", b"1")], "block of -4 bytes"),
            ([(b"GNU.sparse.map", b"0,1"), (b"GNU.sparse.numblocks", b"2")], "2 numbers for 2 blocks"),
            ([(b"GNU.sparse.map", b"0,1")], "GNU.sparse.numblocks is not a number"),
            ([(b"GNU.sparse.map", b"0,x"), (b"GNU.sparse.numblocks", b"1")], "sparse map is not a number"),
            ([(b"GNU.sparse.map", b"0,1"), (b"GNU.sparse.size", b"x")], "GNU.sparse.size is not a number"),
            ([(b"GNU.sparse.numbytes", b"1")], "out of order"),
            ([(b"GNU.sparse.offset", b"1"), (b"GNU.sparse.offset", b"1")], "out of order"),
            ([(b"GNU.sparse.offset", b"1,2")], "out of order"),
        ],
    )
    def test_bad_maps_in_records(self, records: list[tuple[bytes, bytes]], message: str) -> None:
        with pytest.raises(InvalidTar, match=message):
            scan(pax(*records), entry(b"abc"))

    def test_a_negative_logical_size(self) -> None:
        records = [(b"GNU.sparse.major", b"0"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.numblocks", b"0")]
        with pytest.raises(InvalidTar, match="sparse file of -1 bytes"):
            scan(pax(*records, (b"GNU.sparse.size", b"-1")), entry(b"abc"))

    @pytest.mark.parametrize(
        ("stored", "message"),
        [
            (b"1\n0\n5\n", "ends outside its file"),
            (padded(b"x\n"), "sparse map count is not a number"),
            (padded(b"-1\n"), "negative count"),
            (padded(b"1\n5\nx\n"), "sparse map is not a number"),
            (padded(b"1\n9\n9\n"), "block of 9 bytes at 9 in a file of 10"),
            (bytes(MAX_PAYLOAD + BLOCK), "too long"),
        ],
    )
    def test_bad_maps_in_front_of_the_data(self, stored: bytes, message: str) -> None:
        records = [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.size", b"10")]
        with pytest.raises(InvalidTar, match=message):
            scan(pax(*records), entry(stored))

    def test_only_files_can_be_sparse(self) -> None:
        records = [(b"GNU.sparse.map", b"0,1"), (b"GNU.sparse.numblocks", b"1")]
        with pytest.raises(InvalidTar, match="a dir with a sparse map"):
            scan(pax(*records), header(flag=b"5"))


class TestParseHeader:
    """One region on its own, as at the first read of a file."""

    REGION = pax((b"path", b"p")) + header()

    def test_more_or_less_than_one_region(self) -> None:
        assert parse_header(self.REGION).offset == len(self.REGION)
        for wrong in (b"", self.REGION[:-1], self.REGION[:-BLOCK], self.REGION[: 2 * BLOCK]):
            with pytest.raises(InvalidTar, match="no tar header ends within"):
                parse_header(wrong)
        with pytest.raises(InvalidTar, match="ends at 1536 of 1537 bytes"):
            parse_header(self.REGION + b"x")
        with pytest.raises(InvalidTar, match="wrong checksum"):
            parse_header(bytes(BLOCK))


NASTY = tar(lower_entries())


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=60))
def test_chunks_do_not_matter(sizes: list[int]) -> None:
    whole = TarScanner()
    whole.feed(NASTY)
    whole.close()
    cut = TarScanner()
    at = 0
    for size in sizes:
        cut.feed(NASTY[at : at + size])
        at += size
    cut.feed(memoryview(NASTY)[at:])
    cut.close()
    assert (cut.entries, cut.end_offset) == (whole.entries, whole.end_offset)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 40 * BLOCK), st.integers(0, 40 * BLOCK - 1), st.integers(0, 255))
def test_damage_gives_entries_or_one_of_two_errors(cut: int, at: int, value: int) -> None:
    stream = bytearray(NASTY[: 40 * BLOCK])
    stream[at] = value
    scanner = TarScanner()
    try:
        scanner.feed(stream[:cut])
        scanner.close()
    except (InvalidTar, UnsupportedLayer):
        return
    assert scanner.end_offset <= cut


def test_formats_differ_in_what_they_have() -> None:
    fields: dict[str, bytes | int] = {"uname": b"u", "devmajor": 5, "prefix": b"pre"}
    assert only(header(**fields)).name == b"pre/f"
    assert only(header(magic=GNU, uname=b"u")).name == b"f"
    plain = only(header(magic=V7, **fields))
    assert (plain.name, plain.uname, plain.devmajor) == (b"f", b"", 0)
