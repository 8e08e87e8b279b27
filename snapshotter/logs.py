"""Logging as JSON lines, with nothing secret in them.

Every process calls `setup` once, first thing in its main; everybody else uses `logging.getLogger(__name__)`,
a constant message and `extra` for what varies:

    log.warning("zTOC not usable", extra={"layer": digest, "reason": str(error)})

gives one line: `{"time":"…Z","level":"warning","msg":"zTOC not usable","layer":"sha256:…","reason":"…"}`.
On the journal the same line follows the priority prefix `<4>`, which systemd takes off again.

Redaction is the second line of defence: code does not put secrets or signed URLs into messages in the first
place. What still arrives (from a library, or in an exception) loses the query of every URL, the value of
every Authorization-like header, and every field whose name says secret.

Concurrency: any thread; the standard library's handler holds a lock for each line. Deliberately absent: log
files, rotation, sampling; the service manager does those.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import islice
from types import TracebackType
from typing import Any, TextIO

from snapshotter.errors import ConfigError

LEVELS: Mapping[str, int] = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "fatal": logging.CRITICAL,
    "panic": logging.CRITICAL,
}
"""Names of levels; the unusual ones are accepted because the reference's units may use them."""

FORMATS = ("auto", "json", "journal")

REDACTED = "<redacted>"

_NAMES = {
    logging.DEBUG: "debug",
    logging.INFO: "info",
    logging.WARNING: "warning",
    logging.ERROR: "error",
    logging.CRITICAL: "fatal",
}
_PRIORITIES = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}
"""Levels of syslog, as in `<6>`."""

_TEXT_MAX = 8 * 1024
"""Characters of one text; the journal cuts lines at 48 KiB, and a line that is cut is not JSON any more."""

_NAME_MAX = 256
_ITEMS_MAX = 200
"""Entries of one array or table."""

_DEPTH_MAX = 4
"""Arrays and tables within each other; what is deeper is shown as Python shows it."""

_NOISY = ("httpx", "httpcore", "urllib3", "hpack")
"""Libraries that log whole URLs or headers when they log little things."""

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
"""Attributes that every record has; the others came from `extra`."""


def setup(
    level: str,
    stream: TextIO | None = None,
    *,
    log_format: str = "auto",
    role: str = "",
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Send all logging of this process to `stream` (stderr), replacing what an earlier call arranged.

    `role` is a field of every line, so that lines of several processes on one stderr can be told apart.
    Raises ConfigError for a level or format that does not exist.
    """
    if level not in LEVELS:
        raise ConfigError(f"log level: must be one of {', '.join(LEVELS)}, got {level!r}")
    if log_format not in FORMATS:
        raise ConfigError(f"log format: must be one of {', '.join(FORMATS)}, got {log_format!r}")
    stream = stream or sys.stderr
    journal = log_format == "journal" or (log_format == "auto" and is_journal(stream, environ))
    handler = _Handler(stream)
    handler.setFormatter(JsonFormatter(journal=journal, role=role))
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(LEVELS[level])
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(capture=True)


def is_journal(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Return whether `stream` is the socket to the journal that systemd named in the environment."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):  # no descriptor, or closed
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class _Handler(logging.StreamHandler[TextIO]):
    """Marks the handler that `setup` installed, to tell it from those of others."""


class JsonFormatter(logging.Formatter):
    """One record, one line of JSON in plain ASCII."""

    def __init__(self, *, journal: bool = False, role: str = "") -> None:
        super().__init__()
        self._journal = journal
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        line = json.dumps(self._fields(record), separators=(",", ":"), allow_nan=False)
        return f"<{_PRIORITIES.get(record.levelno, 6)}>{line}" if self._journal else line

    def _fields(self, record: logging.LogRecord) -> dict[str, Any]:
        when = datetime.fromtimestamp(record.created, UTC)
        fields: dict[str, Any] = {
            "time": when.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "level": _NAMES.get(record.levelno, record.levelname.lower()),
            "msg": redact(_message(record)),
        }
        if self._role:
            fields["role"] = self._role
        if record.exc_info and record.exc_info[1] is not None:
            fields |= _failure(record.exc_info[1], record.exc_info[2], with_stack=_with_stack(record))
        for name, value in vars(record).items():
            if name not in _STANDARD:
                fields[f"{name}_" if name in fields else name] = clean(value, name)
        fields["logger"] = record.name
        return fields


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (
        TypeError,
        ValueError,
        KeyError,
    ):  # a format that does not fit its arguments must not lose the line
        return f"{record.msg} {record.args!r}"


def _with_stack(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or logging.getLogger(record.name).isEnabledFor(logging.DEBUG)


def _failure(error: BaseException, where: TracebackType | None, *, with_stack: bool) -> dict[str, str]:
    text = str(error)
    fields = {"error": redact(f"{type(error).__name__}: {text}" if text else type(error).__name__)}
    if with_stack:
        fields["stack"] = redact(_last_lines(traceback.format_exception(type(error), error, where)))
    return fields


def _last_lines(parts: list[str]) -> str:
    """Return the end of a traceback, whole lines only: half a line could hide what makes it a secret."""
    lines = "".join(parts).splitlines(keepends=True)
    size = 0
    for i, line in enumerate(reversed(lines)):
        size += len(line)
        if size > _TEXT_MAX:
            return "".join(lines[len(lines) - max(i, 1) :])
    return "".join(lines)


# --- redaction -------------------------------------------------------------------------------------------

_SECRET_NAMES = re.compile(
    r"""
      (?: .*[-_] )? (?: authorization | password | passwd | secret | cookie | signature )
    | auth s? | credentials? | .* token | x[-_]amz[-_].*
    | (?: .*[-_] )? (?: secret | private | api | access ) [-_]? key (?: [-_]? id )?
    """,
    re.VERBOSE | re.IGNORECASE,
)
"""Names of fields (whole names) whose values are never shown."""

_VALUE = r"""("[^"\n]*"?|'[^'\n]*'?|%s)"""
"""A quoted value, or what stands for one without quotes."""

_RULES: tuple[tuple[re.Pattern[str], str], ...] = (
    # user:password@ of a URL.
    (re.compile(r"""(?<=://)[^\s/@"'<>]{1,4096}@"""), f"{REDACTED}@"),
    # The query of a URL; of a path, when it looks like one; and of a URL that travels inside another.
    (re.compile(r"""(://[^\s"'<>?#]{0,4096})\?[^\s"'<>]*"""), rf"\1?{REDACTED}"),
    (re.compile(r"""\?[^\s"'<>=?]*=[^\s"'<>]*"""), f"?{REDACTED}"),
    (re.compile(r"""%3f[^\s"'<>]*%3d[^\s"'<>]*""", re.IGNORECASE), f"%3F{REDACTED}"),
    # A header, as sent or as Python and Go show it: to the end of its quotes or line.
    (
        re.compile(
            r"""\b((?:proxy-)?authorization|(?:set-)?cookie)(["']?\s*[:=]\s*\[?b?|["']\s*,\s*b?)"""
            + _VALUE % r"""[^"'\n]+""",
            re.IGNORECASE,
        ),
        rf"\1\2{REDACTED}",
    ),
    # Credentials standing alone; words that follow "Basic" or "Bearer" in prose are left.
    (
        re.compile(
            r"""\b(basic|bearer|aws4-hmac-sha256)\s+"""
            r"""(?!(?:auth\w*|challenges?|credentials?|realm|schemes?|tokens?|headers?|for|from|is|was)\b)"""
            r"""[\w+/=.~:-]{4,}""",
            re.IGNORECASE,
        ),
        rf"\1 {REDACTED}",
    ),
    # name=value and "name": "value", as in docker's config.json, in forms and in signed parameters.
    (
        re.compile(
            r"""(\bauth|password|passwd|secret|token|signature|credential|(?:secret|access|api)[_-]?key(?:[_-]?id)?"""
            r"""|x-amz-[\w-]{1,64})(["']?\s*[:=]\s*b?)""" + _VALUE % r"""[^\s"'&,;{}\[\]()<>]+""",
            re.IGNORECASE,
        ),
        rf"\1\2{REDACTED}",
    ),
)
"""Patterns that take time about proportional to the text, even to one made to hurt."""


def redact(text: str) -> str:
    """Return `text`, cut to a bearable length, with everything that may be a secret replaced."""
    if len(text) > _TEXT_MAX:
        text = text[:_TEXT_MAX] + "…"
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text


def clean(value: object, name: str = "", depth: int = 0) -> Any:
    """Return `value` as something JSON can hold, redacted; `name` is the name of the field it stands in."""
    if value is None or isinstance(value, bool):
        return value
    if _SECRET_NAMES.fullmatch(name[:_NAME_MAX]):
        return REDACTED
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, (bytes, bytearray)):
        return redact(bytes(value[:_TEXT_MAX]).decode("utf-8", "backslashreplace"))
    if isinstance(value, BaseException):
        return redact(f"{type(value).__name__}: {value}")
    if depth < _DEPTH_MAX and isinstance(value, Mapping):
        some = [(_text(key), item) for key, item in islice(value.items(), _ITEMS_MAX)]
        return {redact(key): clean(item, key, depth + 1) for key, item in some}
    if depth < _DEPTH_MAX and isinstance(value, (list, tuple)):
        if len(value) == 2 and _SECRET_NAMES.fullmatch(_text(value[0])[:_NAME_MAX]):
            return [_text(value[0]), REDACTED]  # a header, as HTTP libraries keep them
        return [clean(item, "", depth + 1) for item in value[:_ITEMS_MAX]]
    return redact(str(value))


def _text(key: object) -> str:
    return key.decode("latin-1") if isinstance(key, bytes) else str(key)
