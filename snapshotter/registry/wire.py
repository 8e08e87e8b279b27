"""HTTP as every call of the API needs it: bounded in time, redirects followed with care, failures translated.

The only module that knows httpx's exceptions. It owns the connections. Deliberately not here: who is asking
(auth.py), what a status means (replies.py), and trying again (session.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import Final

import httpx
import trio

from snapshotter.errors import RegistryRefused, RegistryTimeout, RegistryUnavailable, ShortBody
from snapshotter.registry.replies import MAX_ERROR_BODY
from snapshotter.registry.retry import Timeouts
from snapshotter.registry.tls import (
    SYSTEM,
    Trust,
    client_context,
    silence_libraries,
    system_reason,
    untrusted,
)

MAX_REDIRECTS: Final = 10

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_REPLAYING: Final = frozenset({307, 308})
_KEEPALIVE: Final = 60.0
"""Seconds an idle connection is kept: less than any load balancer's patience that we know of."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request. `authorization` and `own_headers` go to the origin of `url` and to nobody else."""

    what: str
    """What is asked for, in words for messages."""
    method: str
    url: httpx.URL = field(repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    content: bytes | None = field(default=None, repr=False)
    authorization: str | None = field(default=None, repr=False)
    own_headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    trust: Trust = SYSTEM
    connect_timeout: float | None = None
    """Seconds; None: as any."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply whose body has been read."""

    status: int
    headers: httpx.Headers = field(repr=False)
    body: bytes = field(repr=False)
    url: httpx.URL = field(repr=False)
    """Where it came from, after redirects."""

    @property
    def media_type(self) -> str:
        """The Content-Type without its parameters, in lower case; "" without one."""
        content_type: str = self.headers.get("Content-Type", "")
        return content_type.partition(";")[0].strip().lower()


class Wire:
    """A pool of connections and the rules of one exchange. Concurrency: any number of tasks of one trio run."""

    def __init__(
        self, *, timeouts: Timeouts, user_agent: str, allow_downgrade: bool, ca_file: Path | None
    ) -> None:
        silence_libraries()
        self._timeouts = timeouts
        self._user_agent = user_agent
        self._allow_downgrade = allow_downgrade
        self._ca_file = ca_file
        self._clients: dict[Trust, httpx.AsyncClient] = {}
        self._client(SYSTEM)

    async def aclose(self) -> None:
        """Close every connection."""
        for client in self._clients.values():
            await client.aclose()

    def deadline(self, total: float | None = None) -> float:
        """Return when an attempt that starts now, and may take `total` seconds, must have ended, in trio's time."""
        return trio.current_time() + (self._timeouts.total if total is None else total)

    def _client(self, trust: Trust) -> httpx.AsyncClient:
        """Return the client for hosts that are trusted so. Raises ConfigError for files that cannot be used."""
        client = self._clients.get(trust)
        if client is None:
            client = self._clients[trust] = httpx.AsyncClient(
                verify=client_context(trust, self._ca_file),
                headers={"User-Agent": self._user_agent, "Accept-Encoding": "identity"},
                timeout=self._limits(None),
                # Cookies would carry one caller's state into another's requests.
                cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
                limits=httpx.Limits(keepalive_expiry=_KEEPALIVE),
            )
        return client

    def _limits(self, connect: float | None) -> httpx.Timeout:
        times = self._timeouts
        return httpx.Timeout(times.read, connect=connect or times.connect, pool=times.total)

    async def fetch(self, exchange: Exchange, *, limit: int) -> Reply:
        """Send `exchange`, follow redirects, and return the reply, whatever its status, with its body.

        Raises RegistryRefused for a body of more than `limit` bytes and for redirects that are not followed,
        RegistryUnavailable, RegistryTimeout, ShortBody.
        """
        deadline = self.deadline()
        response = await self.open(exchange, deadline)
        body = await self.read(response, exchange.what, limit=limit, deadline=deadline)
        return Reply(response.status_code, response.headers, body, response.url)

    async def open(self, exchange: Exchange, deadline: float) -> httpx.Response:
        """Send `exchange`, follow redirects, and return the reply with its body unread: the caller closes it.

        Raises as `fetch` does.
        """
        url, method = exchange.url, exchange.method
        seen: set[httpx.URL] = set()
        while len(seen) <= MAX_REDIRECTS:
            seen.add(url)
            response = await self._send(exchange, method, url, deadline)
            location = response.headers.get("Location")
            if response.status_code not in _REDIRECTS or location is None:
                return response
            # Read to its end, so that the connection can be used again.
            await self.read_error(response, exchange.what, deadline=deadline)
            target = self._target(exchange.what, url, location)
            if target in seen:
                raise RegistryRefused(f"{exchange.what}: {host_of(url)} redirects in a loop")
            if response.status_code not in _REPLAYING and method not in {"GET", "HEAD"}:
                raise RegistryRefused(
                    f"{exchange.what}: {host_of(url)} redirects a {method} by {response.status_code}"
                )
            url = target
        raise RegistryRefused(
            f"{exchange.what}: more than {MAX_REDIRECTS} redirects from {host_of(exchange.url)}"
        )

    async def read(self, response: httpx.Response, what: str, *, limit: int, deadline: float) -> bytes:
        """Return the rest of the body and close the reply. Raises as `fetch` does."""
        body = bytearray()
        async with aclosing(self.pieces(response, what, deadline=deadline)) as pieces:
            async for piece in pieces:
                body += piece
                if len(body) > limit:
                    raise RegistryRefused(f"{what}: {host_of(response.url)} sends more than {limit} bytes")
        return bytes(body)

    async def read_error(self, response: httpx.Response, what: str, *, deadline: float) -> bytes:
        """Return the beginning of an error's body and close the reply; a broken body counts as it came."""
        body = bytearray()
        with contextlib.suppress(RegistryUnavailable, RegistryTimeout, ShortBody):
            async with aclosing(self.pieces(response, what, deadline=deadline)) as pieces:
                async for piece in pieces:
                    body += piece
                    if len(body) >= MAX_ERROR_BODY:
                        break
        return bytes(body[:MAX_ERROR_BODY])

    async def pieces(
        self, response: httpx.Response, what: str, *, deadline: float
    ) -> AsyncGenerator[bytes, None]:
        """Yield the body as it comes, and close the reply. Use with contextlib.aclosing.

        Raises ShortBody, RegistryTimeout, RegistryUnavailable.
        """
        raw = response.aiter_raw()
        try:
            while True:
                # The scope ends before the yield: a generator must not keep one open over it.
                with _translated(what, response.url, in_body=True), trio.fail_at(deadline):
                    piece = await anext(raw, None)
                if piece is None:
                    return
                yield piece
        finally:
            await abandon(response, raw)

    async def _send(self, exchange: Exchange, method: str, url: httpx.URL, deadline: float) -> httpx.Response:
        headers = httpx.Headers(exchange.headers)
        if same_origin(url, exchange.url):
            headers.update(exchange.own_headers)
            if exchange.authorization is not None:
                headers["Authorization"] = exchange.authorization
        client = self._client(exchange.trust)
        with _translated(exchange.what, url, in_body=False), trio.fail_at(deadline):
            request = client.build_request(
                method,
                url,
                headers=headers,
                content=exchange.content,
                timeout=self._limits(exchange.connect_timeout),
            )
            return await client.send(request, stream=True)

    def _target(self, what: str, url: httpx.URL, location: str) -> httpx.URL:
        """Return where a redirect leads. Raises RegistryRefused where it must not be followed."""
        target = joined(what, url, location)
        if target.scheme not in {"http", "https"} or not target.host:
            raise RegistryRefused(f"{what}: {host_of(url)} redirects to a URL that is not http or https")
        if url.scheme == "https" and target.scheme == "http" and not self._allow_downgrade:
            raise RegistryRefused(
                f"{what}: {host_of(url)} redirects from https to plain http at {host_of(target)}"
            )
        return target


def host_of(url: httpx.URL) -> str:
    """Return the host, with its port if it is not the scheme's own: all of a URL that a message may show."""
    return url.netloc.decode("ascii", "replace")


def same_origin(one: httpx.URL, other: httpx.URL) -> bool:
    """Say whether both URLs have the same scheme, host and port."""
    return (one.scheme, one.netloc) == (other.scheme, other.netloc)


def joined(what: str, url: httpx.URL, location: str) -> httpx.URL:
    """Return where `location` leads from `url`. Raises RegistryRefused when it is no URL."""
    try:
        return url.join(location)
    except httpx.InvalidURL:
        raise RegistryRefused(f"{what}: {host_of(url)} sends us to something that is no URL") from None


async def abandon(response: httpx.Response, raw: AsyncIterator[bytes]) -> None:
    """Close a reply whose body may not have been read to its end, whether or not this task is being cancelled.

    httpx's body is a chain of generators. With the connection closed, the next read ends them all; left alone
    they would wait for the garbage collector, about which trio warns.
    """
    with trio.CancelScope(shield=True), contextlib.suppress(httpx.HTTPError, httpx.StreamError):
        await response.aclose()
        async for _ in raw:
            pass


@contextlib.contextmanager
def _translated(what: str, url: httpx.URL, *, in_body: bool) -> Iterator[None]:
    """Turn what httpx and trio raise into our own errors, without their texts, which may show the URL."""
    try:
        yield
    except httpx.ConnectTimeout:
        raise RegistryTimeout(f"{what}: too slow connecting to {host_of(url)}") from None
    except (httpx.TimeoutException, trio.TooSlowError):
        raise RegistryTimeout(f"{what}: too slow talking to {host_of(url)}") from None
    except (httpx.RemoteProtocolError, httpx.ReadError) as error:
        # httpx looks at a Location of its own accord, and calls a bad one a broken reply.
        if isinstance(error.__context__, httpx.InvalidURL):
            raise RegistryRefused(f"{what}: {host_of(url)} sends us to something that is no URL") from None
        if in_body:
            raise ShortBody(f"{what}: {host_of(url)} ended the body early") from None
        raise RegistryUnavailable(f"{what}: {host_of(url)} ended the connection without a reply") from None
    except httpx.LocalProtocolError:
        raise RegistryRefused(f"{what}: the request to {host_of(url)} cannot be written as HTTP") from None
    except httpx.TransportError as error:
        reason = untrusted(error)
        if reason is not None:
            raise RegistryRefused(f"{what}: certificate of {host_of(url)} is not trusted: {reason}") from None
        raise RegistryUnavailable(f"{what}: cannot reach {host_of(url)}: {system_reason(error)}") from None
