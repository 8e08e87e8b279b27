"""A `Config` as TOML, with and without its documentation, and that documentation as Markdown.

All three are made from the descriptions in `schema.py`, so none can say something else than the code does.
Pure. `python -m snapshotter.daemon.config` writes them into the repository.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any

from snapshotter.daemon.config import reference
from snapshotter.daemon.config.keys import Key, Table, TableList, TableMap, TextList, Value, allowed, keys_of
from snapshotter.daemon.config.reference import KeyPath, named, table_named
from snapshotter.daemon.config.schema import Config

_WIDTH = 100

_HEAD = """\
# Configuration of soci-snapshotter-grpc, usually /etc/soci-snapshotter-grpc/config.toml.
#
# Every key stands here with its default: a file needs only what differs. Unknown keys, wrong types and values
# out of range are errors; `soci-snapshotter-grpc config check` finds them before the daemon does.
"""

_DROPPED = """
# Keys of the reference snapshotter that are accepted and have no effect, so that its file can stay as it is:
#
"""


def dump(config: Config) -> str:
    """Return TOML text that loads as `config`, every key in the order of the schema."""
    return "\n".join(_table(config, (), documented=False)).strip("\n") + "\n"


def default_text() -> str:
    """Return the documented default configuration, as in `config.toml.example`."""
    lines = [_HEAD.rstrip(), *_table(Config(), (), documented=True), _DROPPED.rstrip()]
    for reason, names in _dropped_by_reason().items():
        lines += [*_comment(", ".join(names)), *_comment(reason, "    ")]
    lines += ["#", "# And under another name:", "#"]
    for at, meaning in reference.RENAMED.items():
        lines += [*_comment(named(at)), *_comment(meaning, "    ")]
    return "\n".join(lines) + "\n"


def _dropped_by_reason() -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for at, dropped in reference.WITHOUT_EFFECT.items():
        names.setdefault(dropped.reason, []).append(named(at))
    return names


def _table(config: Any, at: KeyPath, *, documented: bool) -> Iterator[str]:
    """Yield the lines of a table: its values under a header, then what is nested in it."""
    keys = list(keys_of(type(config)))
    values = [key for key in keys if isinstance(key.description, (Value, TextList))]
    if values and at:
        yield from ["", f"[{_dotted(at)}]"]
    for i, key in enumerate(values):
        if documented:
            yield from ["", *_comment(_about(key))][1 if at and i == 0 else 0 :]
        yield f"{_name(key.name)} = {_toml(getattr(config, key.attribute))}"
    for key in keys[len(values) :]:
        yield from _nested(key, getattr(config, key.attribute), (*at, key.name), documented=documented)


def _nested(key: Key, config: Any, at: KeyPath, *, documented: bool) -> Iterator[str]:
    match key.description:
        case Table():
            yield from _table(config, at, documented=documented)
        case TableMap() as description:
            if documented:
                yield from ["", *_comment(f"{description.doc} For example:")]
                yield from (f"#{line}" for line in description.sample.splitlines())
            for name, entry in config.items():
                yield from _table(entry, (*at, name), documented=False)
        case TableList():
            for entry in config:
                yield from ["", f"[[{_dotted(at)}]]"]
                yield from list(_table(entry, at, documented=False))[2:]


def _about(key: Key) -> str:
    """Return what a key is for and may hold."""
    rule = key.description
    if not isinstance(rule, Value) or isinstance(key.default, bool):
        return _doc(key)
    return f"{_doc(key)} Must be {allowed(rule, key.default)}."


def _doc(key: Key) -> str:
    return key.description.doc if isinstance(key.description, (Value, TextList)) else ""


def _comment(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=f"# {indent}", subsequent_indent=f"# {indent}", break_on_hyphens=False
    )


def _dotted(at: KeyPath) -> str:
    return ".".join(_name(part) for part in at)


def _name(name: str) -> str:
    is_bare = name.isascii() and name.replace("_", "").replace("-", "").isalnum()
    return name if is_bare else _toml(name)


def _toml(value: object) -> str:
    """Return a value in TOML; what TOML and JSON escape differently in a text is only DEL."""
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(entry) for entry in value)}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)


def markdown() -> str:
    """Return tables of all keys, ours and the reference's, as they stand in docs/configuration.md."""
    lines = ["### Keys"]
    lines += _markdown_table(Config, ())
    lines += ["", "### Keys of the reference that are accepted without effect", ""]
    lines += ["| key | type | why |", "|---|---|---|"]
    for at, (kind, reason) in reference.WITHOUT_EFFECT.items():
        lines.append(f"| `{named(at)}` | {_KINDS[kind]} | {reason} |")
    lines += ["", "### Keys of the reference under another name", "", "| key | meaning |", "|---|---|"]
    lines += [f"| `{named(at)}` | {meaning} |" for at, meaning in reference.RENAMED.items()]
    return "\n".join(lines) + "\n"


_KINDS = {bool: "boolean", int: "integer", str: "text"}


def _markdown_table(table_type: type[Any], at: KeyPath, title: str = "") -> Iterator[str]:
    keys = list(keys_of(table_type))
    values = [key for key in keys if isinstance(key.description, (Value, TextList))]
    if values:
        heading = title or (f"`{table_named(at)}`" if at else "At the top of the file")
        yield from ["", f"#### {heading}", ""]
        yield from ["| key | default | allowed | meaning |", "|---|---|---|---|"]
    for key in values:
        rule = key.description
        may_hold = allowed(rule, key.default) if isinstance(rule, Value) else "an array of texts"
        default = "required" if isinstance(rule, Value) and rule.required else f"`{_toml(key.default)}`"
        yield f"| `{key.name}` | {default} | {may_hold} | {_doc(key)} |"
    for key in keys[len(values) :]:
        path = (*at, key.name)
        match key.description:
            case Table(type=nested):
                yield from _markdown_table(nested, path)
            case TableMap(type=nested) as names:
                path = (*path, names.name.upper())
                yield from _markdown_table(nested, path, f"`{table_named(path)}`")
            case TableList(type=nested):
                yield from _markdown_table(nested, path, f"`[{table_named(path)}]`")
