r"""containerd's filter language: which snapshots a List asks for. Pure.

    filter   := selector ("," selector)*          every selector must match
    selector := path [operator value]             no operator: the field is present
    path     := field ("." field)*
    field    := [A-Za-z0-9_]+ | quoted
    operator := "==" | "!=" | "~="                "~=" searches with a regular expression
    value    := text up to a comma or a space | quoted

`quoted` is a Go string literal; after `~=` it may also stand between slashes or bars. White space is
allowed before a token, not before a comma. A snapshot is listed when one filter matches; no filter and
the empty filter match all. Fields are `name`, `parent`, `kind` and `labels.<key>`; any other is absent,
and an absent field compares as the empty text, except that `==` then never holds.

Two things differ from containerd on purpose: a regular expression that does not compile is refused
instead of matching nothing, and its syntax is Python's, which has all of RE2's that matters here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from snapshotter.errors import InvalidArgument
from snapshotter.snapshot.model import Info

Predicate = Callable[[Info], bool]

_FIELD = re.compile(r'\s*(?:(?P<plain>[A-Za-z0-9_]+)|(?P<quoted>"(?:[^"\\\n]|\\.)*"))')
_OPERATOR = re.compile(r"\s*(?P<operator>[=!~]+)")
_VALUE = re.compile(
    r"""\s*(?:(?P<quoted>(?P<quote>["/|])(?:(?!(?P=quote))[^\\\n]|\\.)*(?P=quote))"""
    r"""|(?P<plain>[^\s,.=!~"/|][^\s,]*))"""
)
_ESCAPE = re.compile(
    r"\\(?:x(?P<byte>[0-9A-Fa-f]{2})|(?P<octal>[0-7]{3})|u(?P<short>[0-9A-Fa-f]{4})|U(?P<long>[0-9A-Fa-f]{8})"
    r"|(?P<letter>.))",
    re.DOTALL,
)
_LETTERS = {
    "a": b"\a",
    "b": b"\b",
    "f": b"\f",
    "n": b"\n",
    "r": b"\r",
    "t": b"\t",
    "v": b"\v",
    "\\": b"\\",
}


class Selector(NamedTuple):
    """One condition: a path of field names, an operator ("" for presence) and its right-hand side."""

    path: tuple[str, ...]
    operator: str = ""
    value: str = ""
    pattern: re.Pattern[str] | None = None

    def matches(self, info: Info) -> bool:
        """Return whether the snapshot fulfils this condition."""
        found = _field_of(info, self.path)
        match self.operator:
            case "":
                return found is not None
            case "==":
                return found == self.value
            case "!=":
                return (found or "") != self.value
            case _:
                return self.pattern is not None and self.pattern.search(found or "") is not None


def compile_filters(filters: Iterable[str]) -> Predicate:
    """Return the test that a List with these filters applies. Raises InvalidArgument naming the filter."""
    alternatives = [parse_filter(text) for text in filters]
    if not alternatives:
        return lambda _info: True
    return lambda info: any(
        all(selector.matches(info) for selector in selectors) for selectors in alternatives
    )


def parse_filter(text: str) -> tuple[Selector, ...]:
    """Return the conditions of one filter; none for the empty filter. Raises InvalidArgument."""
    if not text:
        return ()
    selectors = []
    position = -1
    while position < len(text):
        selector, position = _parse_selector(text, position + 1)
        selectors.append(selector)
        if position < len(text) and text[position] != ",":
            raise _error(text, position, "expected a comma")
    return tuple(selectors)


def _parse_selector(text: str, position: int) -> tuple[Selector, int]:
    field, position = _parse_field(text, position)
    path = [field]
    while text.startswith(".", position):
        field, position = _parse_field(text, position + 1)
        path.append(field)
    if position == len(text) or text[position] == ",":
        return Selector(tuple(path)), position
    found = _OPERATOR.match(text, position)
    if found is None or found["operator"] not in {"==", "!=", "~="}:
        raise _error(text, position, "expected ==, != or ~=")
    return _parse_value(text, found.end(), tuple(path), found["operator"])


def _parse_value(text: str, position: int, path: tuple[str, ...], operator: str) -> tuple[Selector, int]:
    found = _VALUE.match(text, position)
    if found is None or not (found["plain"] or "").isprintable():
        raise _error(text, position, "expected a value")
    if found["plain"] is not None:
        value = found["plain"]
    elif found["quote"] == '"' or operator == "~=":
        value = _unquote(text, position, found["quoted"])
    else:
        raise _error(text, position, 'only " quotes a value here')
    if operator != "~=":
        return Selector(path, operator, value), found.end()
    try:
        pattern = re.compile(value)
    except re.error as error:
        raise _error(text, position, f"bad regular expression: {error}") from None
    return Selector(path, operator, value, pattern), found.end()


def _parse_field(text: str, position: int) -> tuple[str, int]:
    found = _FIELD.match(text, position)
    if found is None:
        raise _error(text, position, "expected a field name")
    if found["plain"] is not None:
        return found["plain"], found.end()
    return _unquote(text, position, found["quoted"]), found.end()


def _unquote(text: str, position: int, literal: str) -> str:
    quote, body = literal[0], literal[1:-1]
    raw = bytearray()
    end = 0
    for escape in _ESCAPE.finditer(body):
        raw += body[end : escape.start()].encode()
        end = escape.end()
        raw += _unescape(text, position, escape, quote)
    raw += body[end:].encode()
    # A byte escape may leave text that is not UTF-8; no field ever equals that.
    return raw.decode(errors="surrogateescape")


def _unescape(text: str, position: int, escape: re.Match[str], quote: str) -> bytes:
    if escape["byte"] is not None:
        return bytes([int(escape["byte"], 16)])
    if escape["octal"] is not None and int(escape["octal"], 8) < 256:
        return bytes([int(escape["octal"], 8)])
    code = escape["short"] or escape["long"]
    if code is not None and int(code, 16) <= 0x10FFFF:
        character = chr(int(code, 16))
        return ("\ufffd" if "\ud800" <= character <= "\udfff" else character).encode()
    if escape["letter"] == quote:
        return quote.encode()
    if escape["letter"] in _LETTERS:
        return _LETTERS[escape["letter"]]
    raise _error(text, position, f"bad escape {escape[0]}")


def _field_of(info: Info, path: tuple[str, ...]) -> str | None:
    match path[0]:
        case "name":
            return info.name
        case "parent":
            return info.parent
        case "kind":
            return info.kind.name.lower()
        case "labels":
            return info.labels.get(".".join(path[1:]))
        case _:
            return None


def _error(text: str, position: int, problem: str) -> InvalidArgument:
    return InvalidArgument(f"filter {text!r}, at character {position + 1}: {problem}")
