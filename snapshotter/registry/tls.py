"""What both HTTP clients need: trust, the reasons behind their errors, and silence from their own logs."""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from snapshotter.errors import ConfigError

_LOUD: Final = ("httpx", "httpcore", "urllib3")


def client_context(ca_file: Path | None) -> ssl.SSLContext:
    """Return a context that trusts the system's authorities and those in `ca_file`. Raises ConfigError."""
    context = ssl.create_default_context()
    if ca_file is not None:
        try:
            context.load_verify_locations(cafile=ca_file)
        except OSError as error:
            raise ConfigError(f"CA file {ca_file}: cannot be used: {error.strerror or error}") from None
    return context


def untrusted(error: BaseException) -> str | None:
    """Return why a certificate was refused if that is what lies behind `error`, else None."""
    return next(
        (cause.verify_message for cause in _causes(error) if isinstance(cause, ssl.SSLCertVerificationError)),
        None,
    )


def system_reason(error: BaseException) -> str:
    """Return the operating system's word for what lies behind `error`, or else the name of its class."""
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLError):
            return f"TLS error {cause.reason}"
        if isinstance(cause, OSError) and cause.strerror:
            # By number where there is one: trio puts the address into the text. Name lookups have negative ones.
            return os.strerror(cause.errno) if cause.errno and cause.errno > 0 else cause.strerror
    return type(error).__name__


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield `error` and what caused it; of several causes at once, the first."""
    while error is not None:
        yield error
        behind = error.__cause__ or error.__context__
        error = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else behind


def silence_libraries() -> None:
    """Have the libraries log nothing at all: what they log shows URLs with their signatures, and headers.

    By level, which their child loggers inherit, and which does not depend on where handlers are.
    """
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
