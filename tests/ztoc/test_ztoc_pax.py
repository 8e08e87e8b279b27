"""PAX records and the values in them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.errors import InvalidTar
from snapshotter.ztoc import pax
from tests.support.raw_tar import record


@pytest.mark.parametrize(
    ("payload", "records"),
    [
        (b"", {}),
        (b"6 a=b\n", {b"a": b"b"}),
        (b"008 a=b\n", {b"a": b"b"}),
        (b"010 a=bcd\n", {b"a": b"bcd"}),
        (b"+6 a=\n", {b"a": b""}),
        (b"5 a=\n", {b"a": b""}),
        (b"11 a=b=c\nd\n", {b"a": b"b=c\nd"}),
        (b"8 a=\0\xff\n\n", {b"a": b"\0\xff\n"}),
        (b"6 a=b\n6 c=d\n6 a=e\n", {b"a": b"e", b"c": b"d"}),
    ],
)
def test_records(payload: bytes, records: dict[bytes, bytes]) -> None:
    assert pax.parse_records(payload) == records


@pytest.mark.parametrize(
    "payload",
    [
        b"x",
        b"6",
        b"nonsense",
        b" 6 a=b\n",
        b"7 a=b\n",
        b"5 a=b\n",
        b"6 a=bX",
        b"6 abc\n",
        b"6 =ab\n",
        b"-6 a=b\n",
        b"0 a=b\n",
        b"4 a\n",
        b"0x6 a=b\n",
        b"1_0 a=bcd\n",
        b"99999999999999999999 a=b\n",
        b"0000000005 a=\n",
        b"7 a\0=b\n",
        b"10 path=\0\n",
        b"12 uname=\0x\n",
        b"6 a=b\n\0",
    ],
)
def test_what_is_no_record(payload: bytes) -> None:
    with pytest.raises(InvalidTar, match="PAX header: "):
        pax.parse_records(payload)


@given(st.dictionaries(st.binary(min_size=1).filter(lambda key: not {0, 61} & set(key)), st.binary()))
def test_records_of_any_content_come_back(records: dict[bytes, bytes]) -> None:
    text = {b"path", b"linkpath", b"uname", b"gname"}
    records = {key: value for key, value in records.items() if key not in text and b"sparse" not in key}
    assert pax.parse_records(b"".join(record(*one) for one in records.items())) == records


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (b"0", 0),
        (b"-0", 0),
        (b"+7", 7),
        (b"-7", -7),
        (b"007", 7),
        (b"0" * 5000 + b"1", 1),
        (b"9223372036854775807", (1 << 63) - 1),
        (b"-9223372036854775808", -(1 << 63)),
    ],
)
def test_integers(value: bytes, number: int) -> None:
    assert pax.integer(value, "it") == number


@pytest.mark.parametrize(
    "value",
    [b"", b"+", b"-", b" 1", b"1 ", b"0x1", b"1_0", b"1.0", b"\xd9\xa1", b"9223372036854775808", b"9" * 5000],
)
def test_what_is_no_integer(value: bytes) -> None:
    with pytest.raises(InvalidTar, match="it is not a number"):
        pax.integer(value, "it")


@pytest.mark.parametrize(
    ("value", "moment"),
    [
        (b"0", (0, 0)),
        (b"5.", (5, 0)),
        (b"1.5", (1, 500_000_000)),
        (b"+1.5", (1, 500_000_000)),
        (b"1.9999999999", (1, 999_999_999)),
        (b"1.00000000099", (1, 0)),
        (b"-1", (-1, 0)),
        (b"-1.5", (-2, 500_000_000)),
        (b"-0.5", (-1, 500_000_000)),
        (b"-1.000000001", (-2, 999_999_999)),
        (b"-1.0", (-1, 0)),
    ],
)
def test_times(value: bytes, moment: tuple[int, int]) -> None:
    assert pax.time(value, "it") == moment


@pytest.mark.parametrize("value", [b"", b".5", b"x", b"1.x", b"1.-5", b"1.5.5", b"1e5", b"1.1234567890x"])
def test_what_is_no_time(value: bytes) -> None:
    with pytest.raises(InvalidTar, match="it is not a"):
        pax.time(value, "it")
