"""What one key of the configuration may hold, and the sentence that says so.

A field of a dataclass in `schema.py` carries one of the descriptions below in its metadata. Everything that
knows about keys (reading, writing, documenting, suggesting) walks the fields with `keys_of` and asks the
description, so a key is described once.

Pure: no files, no logging, no state. It deliberately does not know which keys exist.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

_DESCRIPTION = "configuration"
_INT_MAX = 2**63 - 1
"""TOML promises 64 bits and no more; a larger number is a slip of the hand."""

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(|[kmg])(i?)b?\s*", re.IGNORECASE)
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|sec|m|min|h)\s*", re.IGNORECASE)
_SECONDS = {"ms": 0.001, "s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600}


@dataclasses.dataclass(frozen=True, slots=True)
class Value:
    """A bool, int, float or text; its type is the type of the field's default."""

    doc: str
    key: str = ""
    """Name in the file where it differs from the attribute's."""
    unit: str = ""
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    required: bool = False
    """The table makes no sense without it."""
    zero_is_default: bool = False
    """The reference writes 0 (or nothing) for "your default"; its files rely on it."""
    form: str = ""
    """What a text must be, when any text will not do."""
    convert: Callable[[str], str] | None = None
    """Cleans a text; raises ValueError when it has not the form."""


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """A TOML table; its keys are the fields of `type`. Such a field needs nothing but its default factory."""

    type: type[Any]


@dataclasses.dataclass(frozen=True, slots=True)
class TableMap:
    """A TOML table whose keys are names the operator chooses, each holding a table of `type`."""

    type: type[Any]
    doc: str
    name: str
    """What a name stands for, for messages."""
    names: tuple[str, ...] = ()
    """The only names allowed; empty: any."""
    sample: str = ""
    """TOML text that shows its use."""


@dataclasses.dataclass(frozen=True, slots=True)
class TableList:
    """An array of TOML tables, each with the fields of `type`."""

    type: type[Any]
    doc: str


@dataclasses.dataclass(frozen=True, slots=True)
class TextList:
    """An array of texts."""

    doc: str


Description = Value | Table | TableMap | TableList | TextList


class Key(NamedTuple):
    """One key of a table: its name in the file, its attribute, its default and its description."""

    name: str
    attribute: str
    default: Any
    description: Description


def value(default: Any, doc: str, **rules: Any) -> Any:
    """Declare a dataclass field that holds one value; `rules` are the fields of `Value`."""
    return dataclasses.field(default=default, metadata={_DESCRIPTION: Value(doc, **rules)})


def table_map(table_type: type[Any], doc: str, **rules: Any) -> Any:
    """Declare a field that maps names to tables, empty by default; `rules` are the fields of `TableMap`."""
    return dataclasses.field(
        default_factory=dict, metadata={_DESCRIPTION: TableMap(table_type, doc, **rules)}
    )


def table_list(table_type: type[Any], doc: str) -> Any:
    """Declare a field that holds a tuple of tables, empty by default."""
    return dataclasses.field(default=(), metadata={_DESCRIPTION: TableList(table_type, doc)})


def text_list(doc: str) -> Any:
    """Declare a field that holds a tuple of texts, empty by default."""
    return dataclasses.field(default=(), metadata={_DESCRIPTION: TextList(doc)})


def keys_of(table_type: type[Any]) -> Iterator[Key]:
    """Yield the keys of a table in the order of its dataclass: values first, then whatever is nested."""
    keys = list(map(_key, dataclasses.fields(table_type)))
    yield from (key for key in keys if isinstance(key.description, (Value, TextList)))
    yield from (key for key in keys if not isinstance(key.description, (Value, TextList)))


def _key(field: dataclasses.Field[Any]) -> Key:
    factory = field.default_factory
    default = field.default if factory is dataclasses.MISSING else factory()
    description: Description = field.metadata.get(_DESCRIPTION) or Table(type(default))
    name = description.key if isinstance(description, Value) and description.key else field.name
    return Key(name, field.name, default, description)


def allowed(rule: Value, default: object) -> str:
    """Return what a key may hold, as the words that follow "must be"."""
    if isinstance(default, bool):
        return "true or false"
    if rule.choices:
        return "one of " + ", ".join(f'"{choice}"' for choice in rule.choices)
    if isinstance(default, str):
        return rule.form or "a text"
    return ("an integer" if isinstance(default, int) else "a number") + _range(rule)


def _range(rule: Value) -> str:
    unit = f" ({rule.unit})" if rule.unit else ""
    if rule.minimum is not None and rule.maximum is not None:
        return f" from {rule.minimum} to {rule.maximum}{unit}"
    if rule.minimum is not None:
        return f" >= {rule.minimum}{unit}"
    return unit


def accept(rule: Value, default: Any, raw: object) -> Any:
    """Return the value that `raw`, as TOML gave it, means for a key with this rule and default.

    Raises ValueError with a sentence that says what is allowed and what was there.
    """
    if not _has_type(default, raw) or not _in_range(rule, raw):
        raise ValueError(f"must be {allowed(rule, default)}, got {shown(raw)}{_hint(rule, raw)}")
    result = float(raw) if isinstance(default, float) and isinstance(raw, int) else raw
    if rule.zero_is_default and not result and not isinstance(result, bool):
        return default
    if rule.choices and result not in rule.choices:
        raise ValueError(f"must be {allowed(rule, default)}, got {shown(raw)}")
    if isinstance(result, str) and rule.convert is not None:
        try:
            return rule.convert(result)
        except ValueError:
            raise ValueError(f"must be {allowed(rule, default)}, got {shown(raw)}") from None
    return result


def _has_type(default: object, raw: object) -> bool:
    if isinstance(default, bool) or isinstance(raw, bool):
        return isinstance(default, bool) and isinstance(raw, bool)
    if isinstance(default, float):
        return isinstance(raw, (int, float)) and abs(raw) <= _INT_MAX and math.isfinite(raw)
    if isinstance(default, int):
        return isinstance(raw, int) and abs(raw) <= _INT_MAX
    return isinstance(raw, type(default))


def _in_range(rule: Value, raw: object) -> bool:
    if isinstance(raw, bool) or not isinstance(raw, (int, float)):
        return True
    if rule.zero_is_default and raw == 0:
        return True
    return (rule.minimum is None or raw >= rule.minimum) and (rule.maximum is None or raw <= rule.maximum)


def _hint(rule: Value, raw: object) -> str:
    """Return the number that a text with a unit stands for, in the unit of the key."""
    if not isinstance(raw, str):
        return ""
    if rule.unit == "bytes" and (bytes_ := parse_size(raw)) is not None:
        return f"; write {bytes_}"
    scale = {"seconds": 1.0, "milliseconds": 0.001}.get(rule.unit)
    if scale is not None and (match := _DURATION.fullmatch(raw)):
        return f"; write {float(match[1]) * _SECONDS[match[2].lower()] / scale:.10g}"
    return ""


def parse_size(text: str) -> int | None:
    """Return the bytes that a text like "8mb", "1.5 GB" or "4096" means (units of 1024), or None."""
    match = _SIZE.fullmatch(text)
    if match is None or (match[3] and not match[2]):
        return None
    return int(float(match[1]) * 1024 ** ("", "k", "m", "g").index(match[2].lower()))


def shown(raw: object) -> str:
    """Return `raw` for a message: short, and in the words of TOML."""
    if isinstance(raw, bool):
        return str(raw).lower()
    if isinstance(raw, dict):
        return "a table"
    if isinstance(raw, list):
        return "an array"
    text = repr(raw) if isinstance(raw, str) else str(raw)
    return text if len(text) <= 60 else text[:57] + "..."
