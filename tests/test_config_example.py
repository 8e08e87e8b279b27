"""The files for people say what the code does: config.toml.example and docs/configuration.md."""

import re
import tomllib
from pathlib import Path

import pytest

from snapshotter.daemon.config import Config, default_text, load
from snapshotter.daemon.config.__main__ import BEGIN, END, main
from snapshotter.daemon.config.keys import Value, keys_of
from snapshotter.daemon.config.reading import all_keys
from snapshotter.daemon.config.reference import RENAMED, WITHOUT_EFFECT, named, table_named
from snapshotter.daemon.config.writing import markdown

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "config.toml.example"
DOCUMENT = ROOT / "docs" / "configuration.md"
HINT = "run: python -m snapshotter.daemon.config"


def test_the_example_is_the_defaults() -> None:
    loaded = load(EXAMPLE, explicit=True)
    assert loaded.config == Config()
    assert loaded.warnings == ()


def test_the_example_is_what_config_default_prints() -> None:
    assert EXAMPLE.read_text() == default_text(), HINT


def test_the_document_is_made_from_the_code() -> None:
    text = DOCUMENT.read_text()
    assert text.partition(BEGIN)[2].partition(END)[0] == markdown(), HINT


def test_the_example_sets_or_mentions_every_key() -> None:
    values, _, mentioned = EXAMPLE.read_text().partition("# Keys of the reference snapshotter")
    mentioned = re.sub(r"\n# *", " ", mentioned)
    for key in all_keys():
        if key in WITHOUT_EFFECT or key in RENAMED:
            assert re.search(rf"(^| ){re.escape(named(key))}(,| |$)", mentioned), key
        else:
            assert re.search(rf"^#?{key[-1]} = ", table_of(values, key), re.MULTILINE), key


def table_of(text: str, key: tuple[str, ...]) -> str:
    """Return the part of the example that sets the keys of one table, or shows how to."""
    names = [*key[:-1]]
    if names[-1:] == ["mirrors"]:
        names.insert(-1, '"registry.example.com"')
    if names[-1:] == ["decompress_streams"]:
        names.append("gzip")
    # At the beginning of a line: what is said of other keys may name a table too.
    header = re.search(rf"^#?\[?\[{re.escape('.'.join(names))}\]", text, re.MULTILINE)
    start = header.end() if names and header is not None else 0
    end = re.search(r"^#?\[", text[start:], re.MULTILINE)
    return text[start : start + end.start()] if end else text[start:]


@pytest.mark.parametrize("key", sorted(set(all_keys())), ids=".".join)
def test_the_document_mentions_every_key(key: tuple[str, ...]) -> None:
    text = DOCUMENT.read_text()
    assert f"| `{key[-1]}` |" in text or f"| `{named(key)}` |" in text


def test_the_samples_of_the_example_load(tmp_path: Path) -> None:
    samples = "\n".join(line[1:] for line in EXAMPLE.read_text().splitlines() if re.match(r"#[\[a-z]", line))
    file = tmp_path / "samples.toml"
    file.write_text(samples)
    config = load(file).config
    assert config.resolver.host["registry.example.com"].mirrors[0].host == "https://mirror.example.com"
    assert config.pull_modes.parallel_pull_unpack.decompress_streams["gzip"].args == ("-c",)


def test_every_key_says_what_it_is_for() -> None:
    for table in tables(Config):
        for key in keys_of(table):
            if isinstance(key.description, Value):
                assert key.description.doc.endswith("."), key.name


def test_every_number_with_a_unit_in_its_name_says_the_same_unit() -> None:
    units = {
        "_msec": "milliseconds",
        "Msec": "milliseconds",
        "_sec": "seconds",
        "_bytes": "bytes",
        "_kb": "KiB",
    }
    for table in tables(Config):
        for key in keys_of(table):
            if isinstance(key.description, Value) and not key.name.endswith("_per_sec"):
                suffix = next((unit for end, unit in units.items() if key.name.endswith(end)), None)
                assert suffix in {None, key.description.unit}, key.name


def tables(table: type) -> list[type]:
    found = [table]
    for key in keys_of(table):
        found += tables(key.description.type) if hasattr(key.description, "type") else []
    return found


def test_rewriting_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "configuration.md").write_text(DOCUMENT.read_text())
    monkeypatch.chdir(tmp_path)
    main()
    assert (tmp_path / "docs" / "configuration.md").read_text() == DOCUMENT.read_text()
    assert tomllib.loads((tmp_path / "config.toml.example").read_text())["log_level"] == "info"


def test_the_document_knows_all_flags_and_variables() -> None:
    text = DOCUMENT.read_text()
    for name in ("address", "config", "root", "log-level"):
        assert f"`--{name}`" in text
        assert f"`SOCI_SNAPSHOTTER_{name.upper().replace('-', '_')}`" in text
    assert table_named(("pull_modes", "soci_v1")) in text
