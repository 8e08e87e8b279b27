"""What a reply that is no success means: which error, whether to try again, whether to log in again.

Shared by the API client and the range client, pure, and the one place where a server's words are let into a
message: only its error code is, and only if it looks like one.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Final

from snapshotter.errors import (
    AuthenticationFailed,
    BlobNotFound,
    RangeNotHonoured,
    RegistryError,
    RegistryRefused,
    RegistryUnavailable,
)

MAX_ERROR_BODY: Final = 16 << 10
"""Bytes of an error reply that are looked at; longer ones have nothing for us."""

_CODE: Final = re.compile("[A-Za-z][A-Za-z0-9_]{1,63}")
_XML_CODE: Final = re.compile(r"<Code>([A-Za-z0-9_.]{1,64})</Code>")
_CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(?:\*|\d{1,19})")
# 408 and 425 ask for the same request again; 501 says that it never will be understood.
_TEMPORARY: Final = frozenset({408, 425, 429}) | frozenset(range(500, 600)) - {501}


def error_code(body: bytes) -> str:
    """Return the error code in a registry's JSON or a store's XML, "" when there is none."""
    if match := _XML_CODE.search(body.decode("utf-8", "replace")):
        return match[1]
    try:
        code = json.loads(body)["errors"][0]["code"]
    except (ValueError, TypeError, LookupError, RecursionError):
        return ""
    return code if isinstance(code, str) and _CODE.fullmatch(code) else ""


def credentials_expired(status: int, body: bytes) -> bool:
    """Say whether a reply other than 401 means "log in again".

    ECR says so by a 403 whose text tells it from a real refusal, S3 by a 400 with the code ExpiredToken.
    """
    if status == 403:
        return b"authorization token has expired" in body.lower()
    return status == 400 and error_code(body) == "ExpiredToken"


def error_for(what: str, host: str, status: int, headers: Mapping[str, str], body: bytes) -> RegistryError:
    """Return the error that a reply means; `what` was asked of `host`. Header names are taken in any case."""
    code = error_code(body)
    message = f"{what}: {host} answered {status}{f' {code}' if code else ''}"
    if status in {401, 403} or credentials_expired(status, body):
        return AuthenticationFailed(message)
    if status in {404, 410}:
        return BlobNotFound(message)
    if status == 416:
        return RangeNotHonoured(message)
    if status in _TEMPORARY:
        after = next((value for name, value in headers.items() if name.lower() == "retry-after"), None)
        return RegistryUnavailable(message, retry_after=retry_after(after, time.time()))
    return RegistryRefused(message)


def retry_after(value: str | None, now: float) -> float | None:
    """Return the seconds that a Retry-After header (seconds or a date) asks for; None if it says nothing."""
    if value is None:
        return None
    seconds = value.strip()
    if seconds.isascii() and seconds.isdigit():
        return float(seconds)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now)
    except (ValueError, OverflowError):
        return None


def check_content_range(what: str, host: str, value: str | None, start: int, end: int) -> None:
    """Raise RangeNotHonoured unless a 206's Content-Range is exactly the half-open range that was asked."""
    match = _CONTENT_RANGE.fullmatch(value or "")
    if match is None:
        raise RangeNotHonoured(f"{what}: {host} answered 206 without a usable Content-Range")
    got = int(match[1]), int(match[2]) + 1
    if got != (start, end):
        raise RangeNotHonoured(
            f"{what}: asked {host} for bytes [{start}, {end}), was sent [{got[0]}, {got[1]})"
        )
