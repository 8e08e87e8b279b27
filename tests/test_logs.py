"""Log lines: their shape, and that no secret gets into them."""

import io
import json
import logging
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter import logs
from snapshotter.errors import ConfigError, RegistryUnavailable

SIGNED = (
    "https://bucket.s3.us-west-2.amazonaws.com/docker/blob?X-Amz-Algorithm=AWS4-HMAC-SHA256"
    "&X-Amz-Credential=AKIASECRETID%2F20260102%2Fus-west-2%2Fs3&X-Amz-Security-Token=IQoSECRET%2F%2F"
    "&X-Amz-Signature=deadSECRETbeef"
)
log = logging.getLogger("snapshotter.test")

pytestmark = pytest.mark.logs_unchecked


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    root.handlers[:] = []
    yield io.StringIO()
    root.setLevel(level)
    root.handlers[:] = handlers
    logging.captureWarnings(capture=False)


Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def lines(stream: io.StringIO) -> Lines:
    logs.setup("info", stream, role="daemon", environ={})
    return lambda: [json.loads(line) for line in stream.getvalue().splitlines()]


class TestShape:
    """One JSON object a line."""

    def test_message_and_fields(self, lines: Lines) -> None:
        before = time.time()
        log.info(
            "layer mounted", extra={"layer": "sha256:00", "spans": 3, "remote-snapshot-prepared": "true"}
        )
        (line,) = lines()
        stamp = line.pop("time")
        assert line == {
            "level": "info",
            "msg": "layer mounted",
            "role": "daemon",
            "layer": "sha256:00",
            "spans": 3,
            "remote-snapshot-prepared": "true",
            "logger": "snapshotter.test",
        }
        assert stamp.endswith("Z")
        assert stamp[:19] >= time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(before))

    @pytest.mark.parametrize(
        ("level", "name"),
        [(10, "debug"), (20, "info"), (30, "warning"), (40, "error"), (50, "fatal"), (35, "level 35")],
    )
    def test_levels(self, stream: io.StringIO, level: int, name: str) -> None:
        logs.setup("debug", stream, environ={})
        log.log(level, "something")
        assert json.loads(stream.getvalue())["level"] == name

    def test_what_is_below_the_level_is_dropped(self, stream: io.StringIO) -> None:
        logs.setup("warn", stream, environ={})
        log.info("no")
        log.warning("yes")
        assert stream.getvalue().count("\n") == 1

    def test_fields_cannot_replace_ours(self, lines: Lines) -> None:
        log.info("m", extra={"time": 1, "level": 2, "msg_": 3, "role": 4})
        (line,) = lines()
        assert (line["level"], line["msg"], line["role"]) == ("info", "m", "daemon")
        assert (line["time_"], line["level_"], line["role_"]) == (1, 2, 4)

    def test_values_json_does_not_know(self, lines: Lines) -> None:
        deep: list[Any] = []
        deep.append(deep)
        log.info(
            "m", extra={"bytes": b"a\xff", "nan": float("nan"), "set": {1}, "deep": deep, "pair": ("a", None)}
        )
        (line,) = lines()
        assert (line["bytes"], line["nan"], line["set"]) == ("a\\xff", "nan", "{1}")
        assert line["deep"] == [[[["[[...]]"]]]]
        assert line["pair"] == ["a", None]

    def test_a_line_is_one_line_of_ascii_whatever_comes(self, stream: io.StringIO) -> None:
        logs.setup("info", stream, environ={})
        log.info("a\nb\u2028\ud800", extra={"name\n": "\x00\x1b[31m\u00e4"})
        text = stream.getvalue()
        assert text.isascii()
        assert text.count("\n") == 1
        assert json.loads(text)["msg"] == "a\nb\u2028\ud800"

    def test_long_texts_are_cut(self, lines: Lines) -> None:
        log.info("m" * 100_000, extra={"many": list(range(100_000)), "bytes": b"x" * 100_000})
        (line,) = lines()
        assert len(line["msg"]) < 10_000
        assert len(line["many"]) == 200
        assert len(line["bytes"]) < 10_000

    def test_a_format_that_does_not_fit_loses_nothing(self) -> None:
        record = logging.LogRecord("name", logging.INFO, "path", 1, "%d spans of %s", ("many",), None)
        assert json.loads(logs.JsonFormatter().format(record))["msg"] == "%d spans of %s ('many',)"

    def test_warnings_of_python_are_lines_too(self, lines: Lines) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("old thing", DeprecationWarning, stacklevel=1)
        assert lines()[0]["level"] == "warning"
        assert "old thing" in lines()[0]["msg"]


class TestExceptions:
    """One field says what went wrong; where it did is for errors and for debugging."""

    @staticmethod
    def fail(level: int) -> None:
        try:
            raise RegistryUnavailable("registry.example: 503")
        except RegistryUnavailable:
            log.log(level, "range not fetched", exc_info=True)

    def test_an_error_has_a_stack(self, lines: Lines) -> None:
        self.fail(logging.ERROR)
        (line,) = lines()
        assert line["error"] == "RegistryUnavailable: registry.example: 503"
        assert "in fail" in line["stack"]

    def test_a_warning_has_none(self, lines: Lines) -> None:
        self.fail(logging.WARNING)
        assert "stack" not in lines()[0]
        assert lines()[0]["error"] == "RegistryUnavailable: registry.example: 503"

    def test_unless_somebody_debugs(self, stream: io.StringIO) -> None:
        logs.setup("debug", stream, environ={})
        self.fail(logging.WARNING)
        assert "in fail" in json.loads(stream.getvalue())["stack"]

    def test_a_field_called_error_does_not_collide(self, lines: Lines) -> None:
        try:
            raise ValueError
        except ValueError:
            log.warning("m", exc_info=True, extra={"error": "mine"})
        assert (lines()[0]["error"], lines()[0]["error_"]) == ("ValueError", "mine")

    def test_groups_and_causes_show_in_the_stack_redacted(self, lines: Lines) -> None:
        try:
            try:
                raise OSError(f"GET {SIGNED}")
            except OSError as error:
                raise ExceptionGroup("tasks", [ValueError("bad")]) from error
        except ExceptionGroup:
            log.exception("failed")
        stack = lines()[0]["stack"]
        assert "ValueError: bad" in stack
        assert "amazonaws.com/docker/blob?<redacted>" in stack
        assert "SECRET" not in stack

    def test_a_long_stack_keeps_its_last_whole_lines(self, lines: Lines) -> None:
        try:
            raise ValueError("\n".join(f"Authorization: Basic line{i}" for i in range(2000)))
        except ValueError:
            log.exception("failed")
        stack = lines()[0]["stack"]
        assert len(stack) < 10_000
        assert "line" not in stack
        assert stack.startswith("Authorization: ")

    def test_no_exception_at_all(self, lines: Lines) -> None:
        log.error("m", exc_info=True)
        assert "error" not in lines()[0]


class TestJournal:
    """Priorities where systemd reads them."""

    def test_prefix(self, stream: io.StringIO) -> None:
        logs.setup("debug", stream, log_format="journal", environ={})
        for level in (10, 20, 30, 40, 50):
            log.log(level, "m")
        prefixes = [line[: line.index("{")] for line in stream.getvalue().splitlines()]
        assert prefixes == ["<7>", "<6>", "<4>", "<3>", "<2>"]
        assert json.loads(stream.getvalue().splitlines()[0].removeprefix("<7>"))["msg"] == "m"

    def test_found_by_the_socket_that_systemd_names(self, stream: io.StringIO) -> None:
        ours, journal = socket.socketpair()
        with ours, journal, open(os.dup(ours.fileno()), "w", encoding="utf-8") as stderr:
            status = os.fstat(stderr.fileno())
            environ = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
            logs.setup("info", stderr, environ=environ)
            log.info("m")
            assert journal.recv(100).startswith(b'<6>{"time"')
            assert not logs.is_journal(sys.__stderr__ or stderr, environ)
            assert not logs.is_journal(stderr, {"JOURNAL_STREAM": "x"})
        assert not logs.is_journal(stderr, environ)  # closed
        assert not logs.is_journal(stream, environ)

    def test_json_when_told_so(self, stream: io.StringIO) -> None:
        logs.setup("info", stream, log_format="json", environ={"JOURNAL_STREAM": "1:1"})
        log.info("m")
        assert stream.getvalue().startswith('{"time"')


class TestSetup:
    """Called once, or again."""

    def test_again_replaces_what_it_did_and_nothing_else(self, stream: io.StringIO) -> None:
        other = logging.NullHandler()
        logging.getLogger().addHandler(other)
        logs.setup("info", io.StringIO(), environ={})
        logs.setup("info", stream, environ={})
        log.info("m")
        assert stream.getvalue().count("\n") == 1
        assert other in logging.getLogger().handlers

    @pytest.mark.parametrize(("level", "form"), [("loud", "json"), ("", "json"), ("info", "xml")])
    def test_mistakes(self, stream: io.StringIO, level: str, form: str) -> None:
        with pytest.raises(ConfigError, match="must be one of"):
            logs.setup(level, stream, log_format=form)

    def test_http_libraries_keep_their_requests_to_themselves(self, stream: io.StringIO) -> None:
        logs.setup("debug", stream, environ={})
        for name in ("httpx", "httpcore.http11", "urllib3.connectionpool"):
            logging.getLogger(name).info("HTTP Request: GET %s", SIGNED)
        assert stream.getvalue() == ""

    def test_stderr_is_the_default(self, stream: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
        logs.setup("info", environ={})
        log.info("m")
        assert json.loads(capsys.readouterr().err)["msg"] == "m"


SECRETS = {
    "a presigned URL": f"GET {SIGNED} failed",
    "in quotes": f"error for '{SIGNED}': 403",
    "as bytes": repr(SIGNED.encode()),
    "without scheme": "GET /v2/app/blobs/sha256:00?X-Amz-Signature=SECRET HTTP/1.1",
    "an opaque query": "moved to https://cdn.example/blob?SECRET",
    "within JSON": json.dumps({"url": SIGNED}).replace("&", "\\u0026"),
    "percent-encoded in another URL": "next https%3A%2F%2Fcdn.example%2Fb%3FSignature%3DSECRET%26x%3D1",
    "user and password": "https://user:SECRET@registry.example/v2/",
    "Basic header": "Authorization: Basic dXNlcjpTRUNSRVQ=SECRET",
    "Bearer header": "authorization: bearer eyJhbGciOi.SECRET.sig",
    "an opaque header": "Proxy-Authorization: SECRET",
    "headers as Python shows them": "{'Accept': '*/*', 'Authorization': 'Negotiate SECRET', 'Host': 'h'}",
    "headers as httpx shows them": "[(b'Authorization', b'Custom SECRET'), (b'host', b'h')]",
    "headers as Go shows them": 'map[Authorization:[Custom SECRET]] {"Authorization":["Custom SECRET"]}',
    "signature version 4": "Authorization: AWS4-HMAC-SHA256 Credential=SECRET/s3, SignedHeaders=host, Signature=SECRET",
    "a scheme alone": "sent Basic U0VDUkVUSECRET to the host",
    "a token alone": "got Bearer abcdSECRET",
    "docker auths": '{"auths": {"registry.example": {"auth": "dXNlSECRET", "identitytoken": "SECRET"}}}',
    "docker auths, compact": '{"auths":{"r":{"username":"u","password":"SE CRET SECRET"}}}',
    "a token reply": '{"token":"SECRET","access_token": "SECRET", "expires_in": 300}',
    "a form": "grant_type=password&password=SECRET&refresh_token=SECRET",
    "keys of AWS": "aws_secret_access_key = SECRET aws_access_key_id=SECRET",
    "a cookie": "Set-Cookie: CloudFront-Signature=SECRET; Secure",
    "a helper's reply": '{"ServerURL":"r","Username":"u","Secret":"SECRET"}',
}

PROSE = [
    "registry.example: Basic authentication is needed",
    "Bearer challenge without realm",
    "no Bearer token for registry.example/app",
    "layer sha256:00 mounted at /var/lib/snapshots/7/fs",
    "https://registry.example/v2/app/manifests/latest: 404",
    "why? because: nothing",
    "config.toml:3: [fuse] idle_timeout: unknown key; did you mean [fuse] idle_timeout_sec?",
    "3 authors, 2 tokens, 1 secretary",
]


class TestRedaction:
    """The second line of defence."""

    @pytest.mark.parametrize("text", SECRETS.values(), ids=SECRETS)
    def test_in_messages_fields_and_exceptions(self, lines: Lines, stream: io.StringIO, text: str) -> None:
        log.info(text.replace("%", "%%"), extra={"detail": text, "nested": {"list": [text, text.encode()]}})
        log.info("request %s", text)
        try:
            raise ValueError(text)
        except ValueError as error:
            log.exception("failed", extra={"reason": error})
        assert len(lines()) == 3
        assert "SECRET" not in stream.getvalue()

    def test_what_remains_of_a_signed_url_still_says_where(self) -> None:
        assert logs.redact(f"GET {SIGNED} failed") == (
            "GET https://bucket.s3.us-west-2.amazonaws.com/docker/blob?<redacted> failed"
        )

    @pytest.mark.parametrize("text", PROSE)
    def test_ordinary_sentences_stay(self, text: str) -> None:
        assert logs.redact(text) == text

    @pytest.mark.parametrize(
        "name",
        [
            "password",
            "Authorization",
            "proxy-authorization",
            "identitytoken",
            "registry_token",
            "access_token",
            "auth",
            "auths",
            "secret",
            "client-secret",
            "X-Amz-Security-Token",
            "aws_secret_access_key",
            "set-cookie",
            "apikey",
        ],
    )
    def test_fields_whose_name_says_secret(self, name: str) -> None:
        assert logs.clean({name: "v", "n": {name: {"r": "v"}}}) == {
            name: "<redacted>",
            "n": {name: "<redacted>"},
        }
        assert logs.clean([(name.encode(), b"v"), ("host", "h")]) == [[name, "<redacted>"], ["host", "h"]]

    @pytest.mark.parametrize("name", ["author", "tokens_left", "keys", "layer", "signature_count"])
    def test_fields_whose_name_does_not(self, name: str) -> None:
        assert logs.clean({name: "v"}) == {name: "v"}

    def test_nothing_to_hide_in_none_and_booleans(self) -> None:
        assert logs.clean({"password": None, "auth": True, "token": 12}) == {
            "password": None,
            "auth": True,
            "token": "<redacted>",
        }

    @pytest.mark.parametrize(
        "text",
        [
            text * (9000 // len(text))
            for text in (
                "?",
                "://",
                "a.-",
                "%3f",
                "'",
                "=",
                "basic ",
                "://@",
                "token=",
                "x-amz-",
                "authorization:",
            )
        ],
    )
    def test_a_text_made_to_hurt_takes_no_time(self, text: str) -> None:
        start = time.process_time()
        logs.redact(text)
        assert time.process_time() - start < 5

    @given(st.text(max_size=200))
    def test_any_text_can_be_redacted_and_a_second_time_too(self, text: str) -> None:
        once = logs.redact(text)
        assert logs.redact(once) == logs.redact(logs.redact(once))

    @given(
        st.text(st.characters(categories=("L", "N"), codec="ascii"), min_size=8, max_size=40),
        st.text(max_size=20),
    )
    def test_any_secret_in_a_header_is_gone(self, secret: str, before: str) -> None:
        secret = f"Z9{secret}"
        for scheme in ("Basic", "Bearer"):
            assert secret not in logs.redact(f"{before} Authorization: {scheme} {secret}")
            assert secret not in logs.redact(f"https://r.example/{scheme}?{secret}")
