"""What both HTTP clients need: our name, trust, the reasons behind their errors, and silence from their own logs."""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from snapshotter import __version__
from snapshotter.errors import ConfigError

USER_AGENT: Final = f"soci-snapshotter/{__version__}"

_LOUD: Final = ("httpx", "httpcore", "urllib3")


@dataclass(frozen=True, slots=True)
class Trust:
    """How a host proves to us who it is, and we to it. Files are named, not read."""

    ca_files: tuple[str, ...] = ()
    """Trusted besides the system's authorities."""
    client_certificates: tuple[tuple[str, str], ...] = ()
    """Pairs of certificate and key; no key: it is in the certificate's file."""
    skip_verify: bool = False
    stamp: int = 0
    """Changes when one of the files does, so that what was made from the old one is not used for ever."""

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that `from_json` reads."""
        return {
            "ca": list(self.ca_files),
            "client": [list(pair) for pair in self.client_certificates],
            "skip_verify": self.skip_verify,
            "stamp": self.stamp,
        }

    @classmethod
    def from_json(cls, obj: Mapping[str, Any]) -> Trust:
        """Return what `to_json` wrote. Raises ValueError if it is not one."""
        match obj:
            case {"ca": list(ca), "client": list(client), "skip_verify": bool(skip), "stamp": int(stamp)}:
                pairs = tuple((str(pair[0]), str(pair[1])) for pair in client)
                return cls(tuple(map(str, ca)), pairs, skip, stamp)
        raise ValueError("not a trust")


SYSTEM: Final = Trust()
"""The system's authorities, and no certificate of ours."""


def client_context(trust: Trust = SYSTEM, ca_file: Path | None = None) -> ssl.SSLContext:
    """Return a context for `trust`, in which the authorities of `ca_file` count too. Raises ConfigError."""
    context = ssl.create_default_context()
    for path in (*trust.ca_files, *(() if ca_file is None else (ca_file,))):
        try:
            context.load_verify_locations(cafile=path)
        except OSError as error:
            raise ConfigError(f"CA file {path}: cannot be used: {error.strerror or error}") from None
    for certificate, key in trust.client_certificates:
        try:
            # Without a callback OpenSSL would ask the terminal for the password of a key that has one.
            context.load_cert_chain(certificate, key or None, password=lambda: "")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"client certificate {certificate}: cannot be used: {reason}") from None
    if trust.skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
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
