"""Things that can go wrong at a registry, one class each; `Registry.fault` arms them.

Every fault has the same first fields: `path` is a regular expression searched in the request's path
(without its query), `method` restricts it to one method, `skip` lets that many matching requests pass first,
and `count` is how many requests it then breaks (-1: all). `least` passes over requests whose body has fewer bytes.
`hits` says how many it has broken.

The paths: `/v2/<repository>/manifests/…`, `/blobs/…`, `/referrers/…` at the registry; `/token` at the token
server; `/storage/<digest>` at the storage that presigned URLs point to.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Fault:
    """What all faults share; by itself it does nothing."""

    path: str = ""
    method: str = ""
    skip: int = 0
    count: int = 1
    least: int = 0
    hits: int = field(default=0, init=False)

    def take(self, method: str, path: str, size: int) -> bool:
        """Say whether this request, whose body has `size` bytes, is to be broken, and count it.

        The caller holds the registry's lock.
        """
        if self.method not in {"", method} or re.search(self.path, path) is None or self.hits == self.count:
            return False
        if size < self.least:
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.hits += 1
        return True


@dataclass(kw_only=True)
class Status(Fault):
    """Answers with `status`, a registry error `code` as JSON unless `body` is given, and `headers`."""

    status: int = 503
    code: str = "INJECTED"
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(kw_only=True)
class Drop(Fault):
    """Resets the connection instead of answering; with `politely`, closes it."""

    politely: bool = False


@dataclass(kw_only=True)
class LoseReply(Fault):
    """Does what is asked, and resets the connection instead of saying so.

    With `after`, only that many bytes of an upload have come when the connection breaks; they are kept.
    """

    after: int | None = None


@dataclass(kw_only=True)
class Truncate(Fault):
    """Closes the connection after `after` bytes of the announced body."""

    after: int = 0


@dataclass(kw_only=True)
class Stall(Fault):
    """Says nothing for `seconds`, or until `release` or the registry's end: before the header, or after `after` bytes."""

    seconds: float = 60.0
    after: int | None = None
    _released: threading.Event = field(default_factory=threading.Event, init=False, repr=False, compare=False)

    def release(self) -> None:
        """Let those go on that are held up, and those that will be."""
        self._released.set()

    def wait(self, closing: threading.Event) -> None:
        """Be silent. For the server, which is `closing` in the end."""
        until = time.monotonic() + self.seconds
        while not closing.is_set() and (left := until - time.monotonic()) > 0:
            if self._released.wait(min(left, 0.02)):
                return


@dataclass(kw_only=True)
class Slow(Fault):
    """Sends the body at `rate` bytes per second, in pieces of a tenth of that."""

    rate: float = 1e6


@dataclass(kw_only=True)
class IgnoreRange(Fault):
    """Answers a range request with 200 and everything."""


@dataclass(kw_only=True)
class WrongRange(Fault):
    """Answers a range request with a 206 of a range moved by `shift` bytes and longer by `extra`.

    `header` replaces the Content-Range header outright; "" leaves it out.
    """

    shift: int = 1
    extra: int = 0
    header: str | None = None


@dataclass(kw_only=True)
class FlipByte(Fault):
    """Sends the body with the byte at `at` inverted."""

    at: int = 0


@dataclass(kw_only=True)
class ExpireToken(Fault):
    """Refuses the request's credentials as expired, and withdraws every token given out so far.

    401 with a challenge, or the 403 of ECR where the registry is one.
    """


@dataclass(kw_only=True)
class ExpireUrl(Fault):
    """The storage refuses the presigned URL: 403 as S3 does, or 400 ExpiredToken when `session` is set."""

    session: bool = False


@dataclass(kw_only=True)
class Redirect(Fault):
    """Answers 307 to `to`; by default to the very same URL, which makes a loop."""

    to: str = ""
    status: int = 307
