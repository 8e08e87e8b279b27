"""The Authorization header for every request: Basic, Bearer, and ECR's way of saying that a login is over.

It owns what was learned about each host: the way in, the credentials that worked, the tokens. Everything
is learned from refusals; a host that refuses nothing is never sent a credential. Credentials that are refused are
followed by those of the next keychain. They belong to a host and a repository: kubelet may have others for each image.
Where none are taken, a token to pull is asked for as anybody may: who pulled the image need not have used what our
keychains hold, and what is public must not fail by a password that has run out.

Concurrency: one trio run. Lookups and token fetches fly once per key, however many requests wait for them.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import quote, urlencode

import httpx
import trio

from snapshotter.errors import AuthenticationFailed, RegistryError
from snapshotter.registry.challenge import Challenge
from snapshotter.registry.flight import Flights
from snapshotter.registry.hosts import Host
from snapshotter.registry.keychain import IDENTITY_TOKEN_USER, Credentials, Keychain
from snapshotter.registry.replies import error_for
from snapshotter.registry.wire import Exchange, Reply, Wire, host_of

_log = logging.getLogger(__name__)

Scope = tuple[str, ...]
"""What a token is for: `repository:<name>:pull,push`; several when a request touches two repositories."""

DEFAULT_LIFETIME: Final = 60.0
"""Seconds that a token lives when its server does not say: the token specification's default."""
_MAX_LIFETIME: Final = 1e9
"""Seconds; a registry that promises more than decades does not mean it."""
MAX_TOKEN_REPLY: Final = 256 << 10
"""Bytes. Tokens of some registries are several KiB of JSON Web Token."""
REFUSED_SECONDS: Final = 300.0
"""How long refused credentials are not tried again while there are others."""
_CLIENT_ID: Final = "soci-snapshotter"

_Place = tuple[str, str]
"""The name of a host, and a repository."""


@dataclass(frozen=True, slots=True)
class _Token:
    header: str = field(repr=False)
    usable_until: float
    in_need: bool
    """Whether it is anybody's, because no credentials were taken."""


class Authorizer:
    """Knows how to get into each host."""

    def __init__(self, keychain: Keychain, wire: Wire) -> None:
        self._keychain = keychain
        self._wire = wire
        self._ways: dict[str, Challenge] = {}
        self._basic: dict[_Place, Credentials] = {}
        self._tokens: dict[tuple[str, Scope], _Token] = {}
        self._token_flights: Flights[tuple[str, Scope], _Token] = Flights()
        self._lookups: Flights[tuple[_Place, frozenset[Credentials]], Credentials | None] = Flights()
        self._refused: dict[_Place, dict[Credentials, float]] = {}
        """Credentials that did not get in, and when: a keychain further down may have others."""
        self._in_need: set[str] = set()
        """Hosts that are asked without credentials although there should be some, which was said."""
        self.tokens_fetched = 0

    async def authorization(self, host: Host, repository: str, scope: Scope) -> str | None:
        """Return the header to try; None while this host has not asked for any.

        Fetches a token when the last one is about to expire. Raises AuthenticationFailed or a temporary
        RegistryError when that fails.
        """
        way = self._ways.get(host.name)
        if way is None:
            return None
        if way.scheme == "basic":
            credentials = self._basic.get((host.name, repository))
            return None if credentials is None else _basic(credentials)
        return (await self._token(host, repository, way, scope)).header

    async def refused(
        self, host: Host, repository: str, scope: Scope, sent: str | None, challenges: Sequence[Challenge]
    ) -> bool:
        """Learn from a refusal of the header `sent`; say whether `authorization` now has another one to try.

        Raises AuthenticationFailed when there are no credentials, or no way in that we know.
        """
        offered = {challenge.scheme: challenge for challenge in reversed(challenges)}
        known = self._ways.get(host.name)
        # A refusal without a challenge, such as ECR's 403, is about the way that was used.
        way = (
            offered.get("bearer")
            or offered.get("basic")
            or (None if challenges else known or Challenge("basic"))
        )
        if way is None:
            schemes = ", ".join(sorted(offered))
            raise AuthenticationFailed(
                f"registry {host.name}: wants {schemes} authentication, which is not supported"
            )
        # Scope and error are about this request; realm and service about the registry.
        self._ways[host.name] = Challenge(
            way.scheme, {key: way.parameters[key] for key in ("realm", "service") if key in way.parameters}
        )
        if way.scheme == "basic":
            return await self._refused_basic((host.name, repository), sent)
        token = self._tokens.get((host.name, scope))
        if token is not None and token.header == sent:
            del self._tokens[host.name, scope]
        await self._token(host, repository, way, scope)
        if token is not None and token.in_need:
            # Not for the public: the next call tries again what we have.
            self._refused.pop((host.name, repository), None)
        return True

    async def _refused_basic(self, place: _Place, sent: str | None) -> bool:
        tried = self._basic.get(place)
        if tried is not None and _basic(tried) == sent:
            self._refuse(place, tried)
            del self._basic[place]
        credentials = await self._lookup(place)
        if credentials is not None:
            self._basic[place] = credentials
            return True
        if self._refused.pop(place, None) is None:
            raise AuthenticationFailed(f"registry {place[0]}: wants credentials, and no keychain has any")
        return False

    def _refuse(self, place: _Place, credentials: Credentials) -> None:
        self._refused.setdefault(place, {})[credentials] = trio.current_time()

    async def _lookup(self, place: _Place) -> Credentials | None:
        """Return credentials that were not refused lately; None when no keychain has any."""
        since = trio.current_time() - REFUSED_SECONDS
        refused = frozenset(each for each, when in self._refused.get(place, {}).items() if when > since)
        found = await self._lookups.run(
            (place, refused), lambda: self._keychain.lookup(*place, refused=refused)
        )
        return None if found in refused else found

    async def _token(self, host: Host, repository: str, way: Challenge, scope: Scope) -> _Token:
        key = (host.name, scope)
        token = self._tokens.get(key)
        if token is None or token.usable_until <= trio.current_time():
            token = await self._token_flights.run(key, lambda: self._fetch(host, repository, way, scope))
        return token

    async def _fetch(self, host: Host, repository: str, way: Challenge, scope: Scope) -> _Token:
        """Get a token from the server that the challenge names, with the first credentials that it takes, or none."""
        place = (host.name, repository)
        refusal: RegistryError | None = None
        while True:
            credentials = None
            try:
                credentials = await self._lookup(place)
            except AuthenticationFailed as failure:
                refusal = refusal or failure
            if credentials is None and place in self._refused:
                refusal = refusal or AuthenticationFailed(f"token for {host.name}: credentials were refused")
            if credentials is None and refusal is not None and _is_to_push(scope):
                self._refused.pop(place, None)
                raise refusal
            asked = trio.current_time()
            exchange = _token_request(host, way, scope, credentials)
            if exchange.url.scheme == "http" and host.scheme != "http":
                raise AuthenticationFailed(
                    f"{exchange.what}: token server {host_of(exchange.url)} is plain http"
                )
            reply = await self._wire.fetch(exchange, limit=MAX_TOKEN_REPLY)
            if reply.status == 200:
                self._say_need(host.name, refusal if credentials is None else None)
                in_need = credentials is None and refusal is not None
                return self._keep(exchange, reply, (host.name, scope), asked, in_need=in_need)
            error = _token_refused(exchange, reply)
            if error.temporary:
                raise error
            if credentials is None:
                self._refused.pop(place, None)
                raise refusal or error
            refusal = error
            self._refuse(place, credentials)

    def _say_need(self, host: str, refusal: RegistryError | None) -> None:
        """Note whether a host is asked without credentials in need; the first time in a row is said in the log."""
        if refusal is None:
            self._in_need.discard(host)
        elif host not in self._in_need:
            self._in_need.add(host)
            _log.warning(
                "asking as anybody, without credentials", extra={"host": host, "error": str(refusal)}
            )

    def _keep(
        self, exchange: Exchange, reply: Reply, key: tuple[str, Scope], asked: float, *, in_need: bool
    ) -> _Token:
        header, lifetime = _parse_token(exchange, reply)
        # A tenth early, but ten seconds at most: the time until a request with it arrives.
        token = _Token(header, asked + lifetime - min(lifetime / 10, 10.0), in_need)
        self._tokens = {each: kept for each, kept in self._tokens.items() if kept.usable_until > asked}
        self._tokens[key] = token
        self.tokens_fetched += 1
        return token


def _basic(credentials: Credentials) -> str:
    pair = f"{credentials.username}:{credentials.secret}"
    return "Basic " + base64.b64encode(pair.encode()).decode()


def _token_request(host: Host, way: Challenge, scope: Scope, credentials: Credentials | None) -> Exchange:
    """Return a GET with Basic, or without anything for the public; for an identity token, a POST of OAuth 2."""
    what = f"token for {host.name}"
    try:
        url = httpx.URL(way.parameters.get("realm", ""))
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in {"http", "https"} or not url.host:
        raise AuthenticationFailed(f"{what}: the registry names no usable token server")
    scopes = _joint_scope((*scope, *way.parameters.get("scope", "").split()))
    service = way.parameters.get("service", "")
    if credentials is not None and credentials.username == IDENTITY_TOKEN_USER:
        form = {
            "grant_type": "refresh_token",
            "service": service,
            "client_id": _CLIENT_ID,
            "scope": " ".join(scopes),
        }
        form["refresh_token"] = credentials.secret
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        content = urlencode(form).encode()
        return Exchange(what, "POST", url, headers=headers, content=content, trust=host.trust)
    query = [("service", service)] if service else []
    query += [("scope", item) for item in scopes]
    joint = "&" if url.query else "?"
    full = httpx.URL(f"{url}{joint}{urlencode(query, quote_via=quote)}")
    authorization = None if credentials is None else _basic(credentials)
    return Exchange(what, "GET", full, authorization=authorization, trust=host.trust)


def _is_to_push(scope: Scope) -> bool:
    return any("push" in item.rpartition(":")[2].split(",") for item in scope)


def _joint_scope(scope: Scope) -> Scope:
    """Return `scope` with the actions on one resource together: what we want, and what the registry asked for."""
    actions: dict[str, set[str]] = {}
    for item in scope:
        resource, colon, wanted = item.rpartition(":")
        actions.setdefault(resource + colon, set()).update(wanted.split(","))
    return tuple(resource + ",".join(sorted(wanted)) for resource, wanted in actions.items())


def _parse_token(exchange: Exchange, reply: Reply) -> tuple[str, float]:
    """Return the header and the seconds that it is good for."""
    try:
        answer = json.loads(reply.body)
    except (ValueError, RecursionError):
        answer = None
    members = answer if isinstance(answer, dict) else {}
    token = members.get("token") or members.get("access_token")
    if not isinstance(token, str) or not token.isascii() or not token.isprintable():
        raise AuthenticationFailed(f"{exchange.what}: the answer of {host_of(reply.url)} holds no token")
    lifetime = members.get("expires_in")
    if (
        isinstance(lifetime, bool)
        or not isinstance(lifetime, int | float)
        or not 0 < lifetime <= _MAX_LIFETIME
    ):
        lifetime = DEFAULT_LIFETIME
    return f"Bearer {token}", float(lifetime)


def _token_refused(exchange: Exchange, reply: Reply) -> RegistryError:
    error = error_for(exchange.what, host_of(reply.url), reply.status, reply.headers, reply.body)
    # "Not found" from here says nothing about the blob.
    return error if error.temporary else AuthenticationFailed(str(error))
