"""JSON as Go's encoding/json reads and writes it.

Other SOCI tools parse a manifest, write it again and compare digests, so what we emit must be byte for byte
what Go emits: compact, HTML characters escaped, invalid text as the replacement character. Deliberately not
here: the order of keys, which belongs to whoever builds the object.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final, NoReturn

from snapshotter.errors import InvalidIndex

_SHORT: Final = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
# A surrogate is what an invalid byte or a broken \u escape becomes in a Python string.
_ESCAPED: Final = re.compile('[\x00-\x1f"\\\\<>&\u2028\u2029\ud800-\udfff]')
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


def go_json(obj: object) -> bytes:
    """Return `obj` as compact JSON exactly as Go's Marshal writes it; dicts keep the order they have.

    Takes dict (str keys), list, tuple, str, int, bool and None. Raises TypeError for anything else, floats
    included: no format here has them.
    """
    return _encode(obj).encode()


def _encode(obj: object) -> str:
    if isinstance(obj, str):
        return '"' + _ESCAPED.sub(_escape, obj) + '"'
    if obj is None:
        return "null"
    if isinstance(obj, bool):
        return "true" if obj else "false"
    if isinstance(obj, int):
        return str(int(obj))
    if isinstance(obj, dict):
        return "{" + ",".join(f"{_key(key)}:{_encode(value)}" for key, value in obj.items()) + "}"
    if isinstance(obj, list | tuple):
        return "[" + ",".join(map(_encode, obj)) + "]"
    raise TypeError(f"no JSON form for {type(obj).__name__}")


def _key(key: object) -> str:
    if not isinstance(key, str):
        raise TypeError(f"JSON object key of type {type(key).__name__}")
    return _encode(key)


def _escape(match: re.Match[str]) -> str:
    char = match[0]
    if _SURROGATE.match(char):
        return "\\ufffd"
    return _SHORT.get(char) or f"\\u{ord(char):04x}"


def load_object(data: bytes, *, limit: int, what: str) -> dict[str, Any]:
    """Return the JSON object in `data`, `what` being its name in messages.

    As in Go, every invalid byte and every unpaired \\u surrogate reads as U+FFFD. Raises InvalidIndex when
    it is larger than `limit` bytes, not JSON, or not an object.
    """
    if len(data) > limit:
        raise InvalidIndex(f"{what}: {len(data)} bytes, more than the {limit} allowed")
    text = data.decode("utf-8", "surrogateescape")
    try:
        obj = json.loads(_SURROGATE.sub("\ufffd", text), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidIndex(f"{what}: not JSON: {error}") from None
    if not isinstance(obj, dict):
        raise InvalidIndex(f"{what}: not a JSON object")
    return _clean(obj) if "\\u" in text else obj


def _clean(obj: Any) -> Any:
    """Replace the unpaired surrogates that \\u escapes left in an already parsed value."""
    if isinstance(obj, str):
        return _SURROGATE.sub("\ufffd", obj)
    if isinstance(obj, dict):
        return {_clean(key): _clean(value) for key, value in obj.items()}
    if isinstance(obj, list):
        return [_clean(value) for value in obj]
    return obj


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")
