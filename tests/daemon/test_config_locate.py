"""Lines of keys in TOML texts of every shape."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.daemon.config import Config, dump
from snapshotter.daemon.config.locate import Path, locate

TEXT = """\
# a comment with [brackets] and = signs
top = 1 # another
"quoted key".'x y' = "# not a comment"

[first]   # header
a = \"\"\"
[not.a.header]
b = 1
\"\"\"\"
b = [ # an array
  { inner = 1 }, "]",
  '''
c = 2
''',
]
c.d.e = { f = "}" , g = [1] }
  indented = true

[first . "second.third"]
k = 'lit\\'

[[many]]
x = 1
[many.sub]
y = 2
[[many]]
x = 3
[[many.deep]]
z = 4
[[many.deep]]
z = 5
"esc\\u0061ped" = 6"""

LINES: dict[Path, int] = {
    ("top",): 2,
    ("quoted key",): 3,
    ("quoted key", "x y"): 3,
    ("first",): 5,
    ("first", "a"): 6,
    ("first", "b"): 10,
    ("first", "c"): 16,
    ("first", "c", "d", "e"): 16,
    ("first", "indented"): 17,
    ("first", "second.third"): 19,
    ("first", "second.third", "k"): 20,
    ("many",): 22,
    ("many", 0): 22,
    ("many", 0, "x"): 23,
    ("many", 0, "sub"): 24,
    ("many", 0, "sub", "y"): 25,
    ("many", 1): 26,
    ("many", 1, "x"): 27,
    ("many", 1, "deep", 0): 28,
    ("many", 1, "deep", 0, "z"): 29,
    ("many", 1, "deep", 1): 30,
    ("many", 1, "deep", 1, "z"): 31,
    ("many", 1, "deep", 1, "escaped"): 32,
}


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("path", LINES)
def test_line(path: Path, ending: str) -> None:
    assert locate(TEXT.replace("\n", ending)).of(path) == LINES[path]


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("first", "c", "d", "e", "f"), 16),
        (("first", "b", 0, "inner"), 10),
        (("first", "absent"), 5),
        (("many", 0, "absent"), 22),
        (("absent", "too"), 1),
        ((), 1),
    ],
)
def test_what_has_no_line_of_its_own_is_found_at_what_holds_it(path: Path, line: int) -> None:
    assert locate(TEXT).of(path) == line


def test_a_header_does_not_hide_where_a_table_first_appeared() -> None:
    lines = locate("[a.b]\nx = 1\n[a]\ny = 2\n")
    assert lines.of(("a", "b")) == 1
    assert lines.of(("a", "y")) == 4


@given(
    st.dictionaries(
        st.text(st.characters(categories=("Ll", "Lu", "Nd"), codec="ascii"), min_size=1, max_size=8),
        st.sampled_from(["1", '"]["', "'''\n[x]\n'''", "[\n1,\n# ]\n2]", "{a = 1}", '"""\n\\"""\n"""', '""']),
        max_size=8,
    )
)
def test_each_key_is_on_the_line_that_starts_with_it(pairs: dict[str, str]) -> None:
    text = "[table]\n" + "".join(f"{key} = {value}\n" for key, value in pairs.items())
    lines = locate(text)
    for key, value in pairs.items():
        found = text.splitlines()[lines.of(("table", key)) - 1]
        assert found == f"{key} = {value}".splitlines()[0]


def test_every_key_of_the_dumped_defaults() -> None:
    text = dump(Config())
    lines = locate(text)
    assert text.splitlines()[lines.of(("fuse", "read_ahead_kb")) - 1].startswith("read_ahead_kb =")
    assert text.splitlines()[lines.of(("pull_modes", "soci_v2", "enable")) - 2] == "[pull_modes.soci_v2]"
