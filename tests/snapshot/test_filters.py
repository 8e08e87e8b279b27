"""containerd's filter language, by what it accepts, what it refuses, and what matches."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.errors import InvalidArgument
from snapshotter.snapshot.filters import compile_filters, parse_filter
from snapshotter.snapshot.model import LABEL_TARGET, Info, Kind

INFO = Info(
    name="default/3/web",
    parent="sha256:abc",
    kind=Kind.ACTIVE,
    created=1.0,
    updated=2.0,
    labels={"plain": "x", "a.b/c": "y z", "a.b": "dotted", LABEL_TARGET: "sha256:def", "": "nameless"},
)


def matches(*filters: str) -> bool:
    return compile_filters(filters)(INFO)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "name",
        "kind==active",
        "kind!=view",
        "name==default/3/web",
        'name=="default/3/web"',
        r'name=="default\x2f3\u002fw\145\U00000062"',
        "name~=^default/",
        'name~="web$"',
        "name~=|/3/|",
        "name~=/^d.*t/",
        r'name~="\\d"',
        r"name~=/\/3\//",
        "parent==sha256:abc",
        "parent!=other",
        "labels.plain",
        "labels.plain==x",
        'labels."a.b/c"=="y z"',
        "labels.a.b==dotted",
        'labels."a"."b"==dotted',
        f'labels."{LABEL_TARGET}"==sha256:def,parent=="sha256:abc"',
        "labels.missing!=x",
        'labels.missing~="^$"',
        "missing!=x",
        "name, kind ==active,  parent== sha256:abc",
        " name",
        '"name"=="default/3/web"',
    ],
)
def test_it_matches(text: str) -> None:
    assert matches(text)


@pytest.mark.parametrize(
    "text",
    [
        "kind==view",
        "kind==ACTIVE",
        "name==web",
        "name~=^web",
        "missing",
        'missing==""',
        "labels.missing",
        'labels.missing==""',
        'labels.missing~="."',
        "labels.plain==y",
        "labels.plain!=x",
        "labels.a",
        "name,labels.missing",
        "labels.missing,name",
        r'name=="\xff"',
        r'name=="\ud800"',
    ],
)
def test_it_does_not_match(text: str) -> None:
    assert not matches(text)


@pytest.mark.parametrize(
    ("text", "position"),
    [
        (",", 1),
        ("name,", 6),
        ("==x", 1),
        ("name=x", 5),
        ("name===x", 5),
        ("name=~x", 5),
        ("name==", 7),
        ("name==,kind", 7),
        ("name==.x", 7),
        ("name==a ,kind==b", 8),
        ("name ", 5),
        ("labels.", 8),
        ("labels.a-b", 9),
        ("labels..a", 8),
        ('name=="a', 7),
        ('name=="a"b', 10),
        ("name==/a/", 7),
        ("name~=/a", 7),
        ("name=='a b'", 9),
        (r'name=="\q"', 7),
        (r'name=="\777"', 7),
        (r'name=="\x4"', 7),
        (r'name=="\U00110000"', 7),
        (r"name~=/\"/", 7),
        ("name~=(", 7),
        ('name=="a\nb"', 7),
        ("name==a\x00b", 7),
        ("name⩵x", 5),
    ],
)
def test_it_is_refused_where_it_goes_wrong(text: str, position: int) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(f"{text!r}, at character {position}:")):
        parse_filter(text)


def test_selectors_are_all_and_filters_any() -> None:
    assert matches("name==x", "kind==active")
    assert not matches("name==x,kind==active")
    assert not matches("name==x", "kind==view")
    assert matches("name==x", "")
    assert matches()


def test_one_bad_filter_spoils_all() -> None:
    with pytest.raises(InvalidArgument):
        compile_filters(["name", "name="])


def test_every_kind_has_its_word() -> None:
    for kind in Kind:
        assert compile_filters([f"kind=={kind.name.lower()}"])(replace(INFO, kind=kind))


def go_quote(text: str) -> str:
    """Quote as Go's %q does it: what containerd's client puts around a parent's name."""
    special = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r", "\x00": "\\x00"}
    return '"' + "".join(special.get(one, one) for one in text) + '"'


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_whatever_is_quoted_is_found(text: str) -> None:
    info = replace(INFO, parent=text, labels={text: text})
    query = f"parent=={go_quote(text)},labels.{go_quote(text)}=={go_quote(text)}"
    assert compile_filters([query])(info)
    assert not compile_filters([query])(replace(info, parent=text + "x"))


@given(st.text(alphabet=st.sampled_from('nameklbs.=!~,"/|\\x41 \n'), max_size=30))
def test_any_text_is_a_filter_or_refused(text: str) -> None:
    try:
        matches(text)
    except InvalidArgument as error:
        assert repr(text) in str(error)  # noqa: PT017 not every text is refused
