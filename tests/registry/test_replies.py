"""What a reply that is no success means, and how little of it gets into a message."""

import pytest

from snapshotter.errors import (
    AuthenticationFailed,
    BlobNotFound,
    RangeNotHonoured,
    RegistryError,
    RegistryRefused,
    RegistryUnavailable,
)
from snapshotter.registry.replies import (
    check_content_range,
    credentials_expired,
    error_code,
    error_for,
    retry_after,
)

EXPIRED_XML = b"<?xml version='1.0'?><Error><Code>ExpiredToken</Code><Message>x</Message></Error>"
EXPIRED_ECR = (
    b'{"errors":[{"code":"DENIED","message":"Your authorization token has expired. Reauthenticate."}]}'
)


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (401, b"", AuthenticationFailed),
        (403, b"", AuthenticationFailed),
        (404, b"", BlobNotFound),
        (410, b"", BlobNotFound),
        (416, b"", RangeNotHonoured),
        (400, EXPIRED_XML, AuthenticationFailed),
        (400, b"", RegistryRefused),
        (405, b"", RegistryRefused),
        (418, b"", RegistryRefused),
        (304, b"", RegistryRefused),
        (501, b"", RegistryRefused),
        (408, b"", RegistryUnavailable),
        (425, b"", RegistryUnavailable),
        (429, b"", RegistryUnavailable),
        (500, b"", RegistryUnavailable),
        (502, b"", RegistryUnavailable),
        (503, b"", RegistryUnavailable),
        (599, b"", RegistryUnavailable),
    ],
)
def test_each_status_has_its_error(status: int, body: bytes, kind: type[RegistryError]) -> None:
    error = error_for("blob x of r/app", "r.example", status, {}, body)
    assert type(error) is kind
    assert str(error).startswith(f"blob x of r/app: r.example answered {status}")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"errors":[{"code":"MANIFEST_UNKNOWN","message":"secret words"}]}', "MANIFEST_UNKNOWN"),
        (EXPIRED_XML, "ExpiredToken"),
        (b"", ""),
        (b"\xff\xfe", ""),
        (b"<html>", ""),
        (b"[]", ""),
        (b'{"errors":[]}', ""),
        (b'{"errors":{}}', ""),
        (b'{"errors":[{"code":5}]}', ""),
        (b'{"errors":[{"code":"two words"}]}', ""),
        (b'{"errors":[{"code":"' + b"A" * 65 + b'"}]}', ""),
        (b"[" * 50_000, ""),
    ],
)
def test_only_a_code_that_looks_like_one_is_taken_from_a_body(body: bytes, code: str) -> None:
    assert error_code(body) == code
    message = str(error_for("x", "h", 500, {}, body))
    assert message == f"x: h answered 500{' ' + code if code else ''}"


@pytest.mark.parametrize(
    ("status", "body", "expired"),
    [
        (403, EXPIRED_ECR, True),
        (403, EXPIRED_ECR.upper(), True),
        (403, b'{"errors":[{"code":"DENIED"}]}', False),
        (401, EXPIRED_ECR, False),
        (400, EXPIRED_XML, True),
        (400, b"<Error><Code>InvalidRequest</Code></Error>", False),
        (500, EXPIRED_XML, False),
    ],
)
def test_replies_that_mean_log_in_again(status: int, body: bytes, expired: bool) -> None:
    assert credentials_expired(status, body) is expired


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("0", 0.0),
        ("120", 120.0),
        (" 7 ", 7.0),
        ("Wed, 21 Oct 2015 07:28:30 GMT", 30.0),
        ("Wed, 21 Oct 2015 07:27:00 GMT", 0.0),
        ("-1", None),
        ("1.5", None),
        ("\u0663", None),
        ("soon", None),
        ("", None),
        ("Wed, 99 Oct 2015 07:28:00 GMT", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str | None, seconds: float | None) -> None:
    now = 1445412480.0  # Wed, 21 Oct 2015 07:28:00 GMT
    assert retry_after(value, now) == seconds


def test_retry_after_is_carried_by_the_error_whatever_its_case() -> None:
    error = error_for("x", "h", 429, {"RETRY-After": "3"}, b"")
    assert isinstance(error, RegistryUnavailable)
    assert error.retry_after == 3.0


@pytest.mark.parametrize("value", ["bytes 5-9/100", "bytes 5-9/*"])
def test_the_right_content_range_passes(value: str) -> None:
    check_content_range("x", "h", value, 5, 10)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "without a usable Content-Range"),
        ("", "without a usable"),
        ("bytes */100", "without a usable"),
        ("5-9/100", "without a usable"),
        ("bytes 5-9", "without a usable"),
        ("bytes  5-9/100", "without a usable"),
        ("bytes 5-9/100, bytes 20-29/100", "without a usable"),
        ("bytes 5-10/100", r"asked h for bytes \[5, 10\), was sent \[5, 11\)"),
        ("bytes 4-9/100", r"was sent \[4, 10\)"),
        ("bytes 0-99/100", r"was sent \[0, 100\)"),
    ],
)
def test_any_other_content_range_is_an_error(value: str | None, said: str) -> None:
    with pytest.raises(RangeNotHonoured, match=said):
        check_content_range("x", "h", value, 5, 10)
