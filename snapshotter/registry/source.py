"""Where the bytes of one blob are at the moment: a final URL and what to send with it.

A BlobSource is a secret: its query may be a signature and its headers may hold a token. It crosses to the
fetcher as JSON and is never shown whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class BlobSource:
    """The URL of a blob after redirects, valid until its host says 401 or 403."""

    url: str
    headers: Mapping[str, str] = field(hash=False)
    host: str
    """For messages; the URL and the headers are never for messages."""
    what: str = "a blob"
    """What it is, for messages: digest and repository."""

    def __repr__(self) -> str:
        return f"BlobSource({self.what} at {self.host})"

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that `from_json` reads. It holds secrets: for our own sockets only."""
        return {"url": self.url, "headers": dict(self.headers), "host": self.host, "what": self.what}

    @classmethod
    def from_json(cls, obj: Mapping[str, Any]) -> BlobSource:
        """Return the source that `to_json` wrote. Raises ValueError, without the content, if it is not one."""
        match obj:
            case {"url": str(url), "headers": dict(headers), "host": str(host)} if _is_text(headers):
                return cls(url, dict(headers), host, str(obj.get("what", "a blob")))
        raise ValueError("not a blob source")


def _is_text(headers: Mapping[Any, Any]) -> bool:
    return all(isinstance(key, str) and isinstance(value, str) for key, value in headers.items())
