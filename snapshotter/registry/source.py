"""Where the bytes of one blob are at the moment: a final URL and what to send with it.

A BlobSource is a secret: its query may be a signature and its headers may hold a token. It crosses to the
fetcher as JSON and is never shown whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from snapshotter.registry.tls import SYSTEM, Trust


@dataclass(frozen=True, slots=True)
class BlobSource:
    """The URL of a blob after redirects, valid until its host says 401 or 403."""

    url: str
    headers: Mapping[str, str] = field(hash=False)
    host: str
    """For messages; the URL and the headers are never for messages."""
    what: str = "a blob"
    """What it is, for messages: digest and repository."""
    mirror: str = ""
    """The mirror that gave it; there is another source then, should this one fail. Empty: the registry itself."""
    trust: Trust = SYSTEM
    """How its host is known."""
    timeout: float = 0.0
    """Seconds that one request may take; 0: as long as any."""

    def __repr__(self) -> str:
        return f"BlobSource({self.what} at {self.host})"

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that `from_json` reads. It holds secrets: for our own sockets only."""
        return {
            "url": self.url,
            "headers": dict(self.headers),
            "host": self.host,
            "what": self.what,
            "mirror": self.mirror,
            "trust": self.trust.to_json(),
            "timeout": self.timeout,
        }

    @classmethod
    def from_json(cls, obj: Mapping[str, Any]) -> BlobSource:
        """Return the source that `to_json` wrote. Raises ValueError, without the content, if it is not one."""
        match obj:
            case {"url": str(url), "headers": dict(headers), "host": str(host)} if _is_text(headers):
                trust = Trust.from_json(obj["trust"]) if "trust" in obj else SYSTEM
                return cls(
                    url,
                    dict(headers),
                    host,
                    str(obj.get("what", "a blob")),
                    str(obj.get("mirror", "")),
                    trust,
                    float(obj.get("timeout", 0.0)),
                )
        raise ValueError("not a blob source")


def _is_text(headers: Mapping[Any, Any]) -> bool:
    return all(isinstance(key, str) and isinstance(value, str) for key, value in headers.items())
