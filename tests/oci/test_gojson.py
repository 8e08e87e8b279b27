"""go_json against texts that Go's encoding/json is known to write, and load_object against what it reads."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotter.errors import InvalidIndex
from snapshotter.oci.gojson import go_json, load_object

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    max_leaves=20,
)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("plain", b'"plain"'),
        ("<a href='x'>&</a>", b"\"\\u003ca href='x'\\u003e\\u0026\\u003c/a\\u003e\""),
        ('quote " and \\', b'"quote \\" and \\\\"'),
        ("\b\f\n\r\t", b'"\\b\\f\\n\\r\\t"'),
        ("\x00\x01\x1f\x7f", b'"\\u0000\\u0001\\u001f\x7f"'),
        ("line\u2028para\u2029", b'"line\\u2028para\\u2029"'),
        ("grüße 😀 \ufffd", '"grüße 😀 \ufffd"'.encode()),
        (b"bad \xff\xfe".decode("utf-8", "surrogateescape"), b'"bad \\ufffd\\ufffd"'),
        ("lone \ud800", b'"lone \\ufffd"'),
        (0, b"0"),
        (-9223372036854775808, b"-9223372036854775808"),
        (True, b"true"),
        (False, b"false"),
        (None, b"null"),
        ([], b"[]"),
        (("a", 1), b'["a",1]'),
        ({}, b"{}"),
        ({"b": {"<": []}, "a": 2}, b'{"b":{"\\u003c":[]},"a":2}'),
    ],
)
def test_writes_what_go_writes(value: object, written: bytes) -> None:
    assert go_json(value) == written


@pytest.mark.parametrize("value", [1.5, b"bytes", {1: "x"}, {"x": object()}, [1.0]])
def test_refuses_what_no_format_has(value: object) -> None:
    with pytest.raises(TypeError):
        go_json(value)


@settings(max_examples=40)
@given(JSON_VALUES)
def test_means_the_same_to_an_ordinary_parser(value: object) -> None:
    assert json.loads(go_json(value)) == value


@settings(max_examples=40)
@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), JSON_VALUES))
def test_is_read_back_as_it_was(value: dict[str, object]) -> None:
    assert load_object(go_json(value), limit=1 << 20, what="x") == value


def test_invalid_text_is_read_as_go_reads_it() -> None:
    data = b'{"bytes":"a\xff\xc3(","cut":"\xe2\x82","pair":"\\ud83d\\ude00","lone":"\\ud800!","k\\udfff":["\\udc00"]}'
    assert load_object(data, limit=1000, what="x") == {
        "bytes": "a\ufffd\ufffd(",
        "cut": "\ufffd\ufffd",
        "pair": "😀",
        "lone": "\ufffd!",
        "k\ufffd": ["\ufffd"],
    }


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"a":NaN}', "NaN is not a JSON value"),
        (b'{"a":Infinity}', "not a JSON value"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a":' + b"9" * 5000 + b"}", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"{} trailing", "not JSON"),
        (b'{"a":"' + b"x" * 200_000 + b'"}', "more than the 150000 allowed"),
    ],
)
def test_refuses_what_is_no_object(data: bytes, said: str) -> None:
    with pytest.raises(InvalidIndex, match=said) as caught:
        load_object(data, limit=150_000, what="thing")
    assert str(caught.value).startswith("thing: ")
