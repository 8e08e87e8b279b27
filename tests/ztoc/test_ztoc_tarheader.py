"""One header block: checksums, formats, numbers, strings, times."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.errors import InvalidTar
from snapshotter.ztoc.model import mod_time_ns
from snapshotter.ztoc.tarheader import decode, number, rfc3339
from tests.support.raw_tar import GNU, USTAR, V7, header, summed, with_checksum

STAR = {"magic": USTAR, "trailer": b"tar\0"}


class TestChecksum:
    """A block counts when either way to sum it fits."""

    def test_signed_or_unsigned(self) -> None:
        assert decode(header(name=b"\xff\xfe")).name == b"\xff\xfe"
        assert decode(summed(header(name=b"\xff\xfe"), signed=True)).name == b"\xff\xfe"

    @pytest.mark.parametrize("form", [b"%06o\0 ", b"%07o\0", b" %06o ", b"%o", b"\0 %05o\0"])
    def test_any_way_to_write_the_number(self, form: bytes) -> None:
        total = int(header()[148:154], 8)
        assert decode(with_checksum(header(), (form % total).ljust(8, b"\0"))).name == b"f"

    @pytest.mark.parametrize("wrong", [b"0000000\0", bytes(8), b"8888888\0", b"\x80\0\0\0\0\0\0\1"])
    def test_wrong(self, wrong: bytes) -> None:
        with pytest.raises(InvalidTar, match="wrong checksum"):
            decode(with_checksum(header(), wrong))

    @pytest.mark.parametrize("off", [1, -1, 65521, -65521])
    def test_near_misses(self, off: int) -> None:
        block = header(name=b"\x7f" * 100, linkname=b"\x7f" * 100, prefix=b"\x7f" * 155)
        total = int(block[148:154], 8) + off
        if total > 0:
            with pytest.raises(InvalidTar, match="wrong checksum"):
                decode(with_checksum(block, b"%06o\0 " % total))

    def test_a_full_block_has_the_exact_sum(self) -> None:
        fields = {
            "name": b"\xff" * 100,
            "linkname": b"\xff" * 100,
            "uname": b"\xff" * 32,
            "gname": b"\xff" * 32,
        }
        assert decode(header(**fields, prefix=b"\xff" * 155)).uname == b"\xff" * 32


class TestFormats:
    """ustar, star, GNU and V7 tell themselves apart and have different fields."""

    def test_ustar_joins_the_prefix(self) -> None:
        assert decode(header(prefix=b"p" * 155)).name == b"p" * 155 + b"/f"
        assert decode(header(magic=b"ustar\0xx", prefix=b"p")).name == b"p/f"

    def test_star_has_a_shorter_prefix_and_times(self) -> None:
        assert decode(header(star_prefix=b"p" * 131, **STAR)).name == b"p" * 131 + b"/f"
        for field in ("star_atime", "star_ctime"):
            with pytest.raises(InvalidTar, match="not a number"):
                decode(header(**{field: b"x"}, **STAR))

    def test_gnu_has_no_prefix(self) -> None:
        assert decode(header(magic=GNU, gnu_atime=7, gnu_ctime=b"\x80" + bytes(11))).name == b"f"

    @pytest.mark.parametrize("field", ["gnu_atime", "gnu_ctime"])
    def test_gnu_times_that_are_no_times_are_a_prefix(self, field: str) -> None:
        start = 0 if field == "gnu_atime" else 12
        block = header(magic=GNU, prefix=b"p" * start + b"path/to")
        assert decode(block).name == b"p" * start + b"path/to/f"

    def test_but_only_an_ascii_one(self) -> None:
        assert decode(header(magic=GNU, prefix=b"path\xff")).name == b"f"
        assert decode(header(magic=GNU, gnu_ctime=b"x")).name == b"f"

    @pytest.mark.parametrize("magic", [V7, b"ustar   ", b"USTAR\x0000", b"ustar  1"])
    def test_anything_else_is_v7(self, magic: bytes) -> None:
        found = decode(header(magic=magic, uname=b"u", devmajor=b"junk", prefix=b"p"))
        assert (found.name, found.uname, found.devmajor) == (b"f", b"", 0)

    @pytest.mark.parametrize("field", ["mode", "uid", "gid", "size", "mtime", "devmajor", "devminor"])
    def test_every_number_must_be_one(self, field: str) -> None:
        with pytest.raises(InvalidTar, match="not a number"):
            decode(header(**{field: b"9"}))

    def test_strings_end_at_a_nul(self) -> None:
        found = decode(header(name=b"n\0x", linkname=b"l\0x", uname=b"u\0x", gname=b"\0x", prefix=b"p\0x"))
        assert (found.name, found.linkname, found.uname, found.gname) == (b"p/n", b"l", b"u", b"")
        assert decode(header(name=b"n" * 100)).name == b"n" * 100


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (b"0000644\0", 0o644),
        (b"644     ", 0o644),
        (b" \0 644\0 ", 0o644),
        (b"644\0junk", 0o644),
        (bytes(8), 0),
        (b"        ", 0),
        (b"77777777", 0o77777777),
        (b"\x80" + bytes(6) + b"\x05", 5),
        (b"\xff" * 8, -1),
        (b"\xff" * 7 + b"\xfe", -2),
        (b"\xbf" + b"\xff" * 7, (1 << 62) - 1),
        (b"\xc0" + bytes(7), -(1 << 62)),
        (b"\x80\0\0\0\x7f" + b"\xff" * 7, (1 << 63) - 1),
        (b"\xff\xff\xff\xff\x80" + bytes(7), -(1 << 63)),
    ],
)
def test_numbers(field: bytes, value: int) -> None:
    assert number(field) == value


@pytest.mark.parametrize(
    "field",
    [
        b"8\0\0\0\0\0\0\0",
        b"-1\0\0\0\0\0\0",
        b"+1\0\0\0\0\0\0",
        b"1 1\0\0\0\0\0",
        b"644 \0x\0\0",
        b"0x10\0\0\0\0",
        b"1_0\0\0\0\0\0",
        b"\x80\0\0\0\x80" + bytes(7),
        b"\xff\xff\xff\xff\x7f" + b"\xff" * 7,
    ],
)
def test_what_is_no_number(field: bytes) -> None:
    with pytest.raises(InvalidTar, match="number"):
        number(field)


@pytest.mark.parametrize(
    ("moment", "text"),
    [
        ((0, 0), "1970-01-01T00:00:00Z"),
        ((-1, 0), "1969-12-31T23:59:59Z"),
        ((1_700_000_000, 250_000_000), "2023-11-14T22:13:20.25Z"),
        ((1, 1), "1970-01-01T00:00:01.000000001Z"),
        ((951_782_400, 0), "2000-02-29T00:00:00Z"),
        ((253_402_300_799, 999_999_999), "9999-12-31T23:59:59.999999999Z"),
        ((253_402_300_800, 0), ""),
        ((-62_135_596_800, 0), "0001-01-01T00:00:00Z"),
        ((-62_167_219_200, 0), "0000-01-01T00:00:00Z"),
        ((-62_167_219_201, 0), ""),
        ((-(1 << 63), 0), ""),
        (((1 << 63) - 1, 0), ""),
    ],
)
def test_times(moment: tuple[int, int], text: str) -> None:
    assert rfc3339(*moment) == text


@given(st.integers(-62_135_596_800, 253_402_300_799), st.integers(0, 999_999_999))
def test_times_agree_with_the_standard_library_and_read_back(seconds: int, nanoseconds: int) -> None:
    text = rfc3339(seconds, nanoseconds)
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
    assert text.startswith(f"{moment.year:04d}-{moment:%m-%dT%H:%M:%S}")
    assert mod_time_ns(text) == seconds * 1_000_000_000 + nanoseconds
