"""What the values offer beside themselves: xattrs, times, header starts."""

from __future__ import annotations

from datetime import UTC, date, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.ztoc.model import (
    FileEntry,
    civil_from_days,
    days_from_civil,
    header_starts,
    mod_time_ns,
    xattrs,
)

ENTRY = FileEntry(b"f", "reg", 512, 0, b"", 0, 0, 0, b"", b"", "", 0, 0, ())


def test_xattrs() -> None:
    records = [
        (b"SCHILY.xattr.user.b", b"\0\xff"),
        (b"LIBARCHIVE.xattr.user.c", b"x"),
        (b"mtime", b"1"),
        (b"SCHILY.xattr.security.capability", b""),
    ]
    entry = ENTRY._replace(pax=tuple(records))
    assert xattrs(entry) == ((b"user.b", b"\0\xff"), (b"security.capability", b""))
    assert xattrs(ENTRY) == ()


def test_header_starts() -> None:
    entries = (
        ENTRY,
        ENTRY._replace(offset=1024, size=1),
        ENTRY._replace(offset=2560, kind="hardlink", size=900),
        ENTRY._replace(offset=3072, size=1024),
        ENTRY._replace(offset=4608),
    )
    assert header_starts(entries) == (0, 512, 1536, 2560, 4096)
    assert header_starts(()) == ()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01T01:00:00+01:00", 0),
        ("1969-12-31T22:30:00-01:30", 0),
        ("2023-11-14T22:13:20Z", 1_700_000_000),
        ("1969-12-31T23:59:59Z", -1),
        ("0001-01-01T00:00:00Z", -62_135_596_800),
        ("0000-01-01T00:00:00Z", -62_167_219_200),
        ("9999-12-31T23:59:59Z", 253_402_300_799),
        ("2024-02-29T12:00:00Z", 1_709_208_000),
    ],
)
def test_times(text: str, seconds: int) -> None:
    assert mod_time_ns(text) == seconds * 1_000_000_000


@pytest.mark.parametrize(
    ("fraction", "nanoseconds"),
    [(".5", 500_000_000), (".000000001", 1), (".1234567899", 123_456_789), (".100", 100_000_000)],
)
def test_fractions(fraction: str, nanoseconds: int) -> None:
    assert mod_time_ns(f"1969-12-31T23:59:59{fraction}Z") == nanoseconds - 1_000_000_000


@pytest.mark.parametrize(
    "text",
    [
        "",
        "yesterday",
        "2024-01-01",
        "2024-01-01T00:00:00",
        "2024-01-01 00:00:00Z",
        "2024-13-01T00:00:00Z",
        "2024-00-01T00:00:00Z",
        "2024-01-32T00:00:00Z",
        "2024-01-01T24:00:00Z",
        "2024-01-01T00:60:00Z",
        "2024-01-01T00:00:60Z",
        "2024-01-01T00:00:00.Z",
        "2024-01-01T00:00:00+24:00",
        "12024-01-01T00:00:00Z",
        "-024-01-01T00:00:00Z",
        "2024-01-01T00:00:00Z\n",
        "２０２４-01-01T00:00:00Z",
    ],
)
def test_what_is_no_time_counts_as_the_epoch(text: str) -> None:
    assert mod_time_ns(text) == 0


@given(st.datetimes(timezones=st.just(UTC)))
def test_times_agree_with_the_standard_library(moment: datetime) -> None:
    delta = moment - datetime(1970, 1, 1, tzinfo=UTC)
    expected = (delta.days * 86_400 + delta.seconds) * 1_000_000_000 + delta.microseconds * 1000
    assert mod_time_ns(moment.isoformat().replace("+00:00", "Z")) == expected


@given(st.dates())
def test_days_agree_with_the_standard_library(day: date) -> None:
    days = (day - date(1970, 1, 1)).days
    assert days_from_civil(day.year, day.month, day.day) == days
    assert civil_from_days(days) == (day.year, day.month, day.day)


@given(st.integers(-(10**15), 10**15))
def test_days_come_back_far_outside_the_calendar(days: int) -> None:
    assert days_from_civil(*civil_from_days(days)) == days
