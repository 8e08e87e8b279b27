"""How the test registry asks for credentials: nobody's, Basic, Bearer with a token server, and ECR's way.

Each class answers two questions about a request: may it pass, and what does "your credentials have expired" look
like here. `secrets` lists what must never be seen outside.
"""

from __future__ import annotations

import base64
import json
import secrets
import time
from urllib.parse import parse_qs

from tests.support.registry_faults import Fault
from tests.support.registry_server import HttpServer, Reply, Request
from tests.support.tls import Certificate


def json_reply(status: int, obj: object, headers: dict[str, str] | None = None) -> Reply:
    """Return `obj` as a JSON reply."""
    return Reply(status, json.dumps(obj).encode(), {"Content-Type": "application/json"} | (headers or {}))


def error_reply(status: int, code: str, headers: dict[str, str] | None = None, message: str = "") -> Reply:
    """Return a registry error as the distribution specification words it."""
    return json_reply(status, {"errors": [{"code": code, "message": message or code.lower()}]}, headers)


class NoAuth:
    """Lets everybody in."""

    username = ""
    password = ""

    def __init__(self) -> None:
        self.secrets: list[str] = []

    def start(self, registry: HttpServer, certificate: Certificate | None) -> HttpServer | None:
        """Start a server of its own where the mode has one."""

    def check(self, request: Request, repository: str, action: str) -> Reply | None:
        """Return None when `request` may do `action` ("pull" or "push"), else the refusal."""

    def expire(self, request: Request, repository: str, action: str) -> Reply:
        """Withdraw what was given out and return the reply that says so."""
        return error_reply(401, "UNAUTHORIZED")


class Basic(NoAuth):
    """A user name and a password with every request. Both may be changed while it runs, to rotate them."""

    def __init__(self, username: str = "reader", password: str = "correct-horse-battery") -> None:
        super().__init__()
        self.username, self.password = username, password
        self.secrets += [password, _basic(username, password)]

    def rotate(self, password: str) -> None:
        """Accept only `password` from now on."""
        self.password = password
        self.secrets += [password, _basic(self.username, password)]

    def check(self, request: Request, repository: str, action: str) -> Reply | None:
        if request.headers.get("authorization") == f"Basic {_basic(self.username, self.password)}":
            return None
        return error_reply(
            401, "UNAUTHORIZED", {"WWW-Authenticate": 'Basic realm="test registry", charset="UTF-8"'}
        )

    def expire(self, request: Request, repository: str, action: str) -> Reply:
        return error_reply(401, "UNAUTHORIZED", {"WWW-Authenticate": 'Basic realm="test registry"'})


class Ecr(Basic):
    """Basic as ECR does it: credentials that were right once are answered by 403, not by 401."""

    def __init__(self, username: str = "AWS", password: str = "ecr-authorization-token") -> None:
        super().__init__(username, password)

    def check(self, request: Request, repository: str, action: str) -> Reply | None:
        refusal = super().check(request, repository, action)
        if refusal is not None and any(
            secret in request.headers.get("authorization", "") for secret in self.secrets
        ):
            return self.expire(request, repository, action)
        return refusal

    def expire(self, request: Request, repository: str, action: str) -> Reply:
        message = "Your authorization token has expired. Reauthenticate and try again."
        return error_reply(403, "DENIED", message=message)


class Bearer(NoAuth):
    """Tokens from a token server on a port of its own: GET with Basic, or POST with an identity token.

    `ttl` is a token's life in seconds; `anonymous_pull` gives tokens for pulling to everybody; `state_lifetime`
    False leaves expires_in out of the answers.
    """

    def __init__(
        self,
        username: str = "reader",
        password: str = "correct-horse-battery",
        *,
        ttl: float = 300.0,
        identity_token: str = "",
        anonymous_pull: bool = False,
        state_lifetime: bool = True,
    ) -> None:
        super().__init__()
        self.username, self.password = username, password
        self.ttl, self.identity_token = ttl, identity_token
        self.anonymous_pull, self.state_lifetime = anonymous_pull, state_lifetime
        self.secrets += [password, _basic(username, password)] + ([identity_token] if identity_token else [])
        self._tokens: dict[str, tuple[float, frozenset[tuple[str, str]]]] = {}
        self._realm = ""

    def start(self, registry: HttpServer, certificate: Certificate | None) -> HttpServer | None:
        server = HttpServer("token", self._token, certificate, registry.address)
        server.share(registry)
        self._realm = f"{server.url}/token"
        return server

    def check(self, request: Request, repository: str, action: str) -> Reply | None:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        expires, grants = self._tokens.get(token, (0.0, frozenset()))
        if scheme == "Bearer" and time.monotonic() < expires and (repository, action) in grants:
            return None
        return self._challenge(repository, action, 'error="invalid_token"' if token else "")

    def expire(self, request: Request, repository: str, action: str) -> Reply:
        self._tokens.clear()
        return self._challenge(repository, action, 'error="invalid_token"')

    def _challenge(self, repository: str, action: str, extra: str) -> Reply:
        actions = "pull,push" if action == "push" else action
        challenge = f'Bearer realm="{self._realm}",service="test registry, inc",scope="repository:{repository}:{actions}"'
        return error_reply(
            401, "UNAUTHORIZED", {"WWW-Authenticate": f"{challenge},{extra}" if extra else challenge}
        )

    def _token(self, request: Request, fault: Fault | None) -> Reply:
        query = {key: " ".join(values) for key, values in parse_qs(request.body.decode()).items()}
        known = self._known(request, query)
        if known is None:
            return error_reply(401, "UNAUTHORIZED")
        grants = _grants((query or request.query).get("scope", ""), known)
        token = secrets.token_urlsafe(24)
        self.secrets.append(token)
        self._tokens[token] = (time.monotonic() + self.ttl, grants)
        answer: dict[str, object] = {"access_token" if query else "token": token}
        return json_reply(200, answer | ({"expires_in": self.ttl} if self.state_lifetime else {}))

    def _known(self, request: Request, form: dict[str, str]) -> bool | None:
        """Return True for the user, False for anonymous, None for whoever gave wrong credentials."""
        if request.method == "POST":
            right = (
                form.get("grant_type") == "refresh_token" and form.get("refresh_token") == self.identity_token
            )
            return True if right and self.identity_token else None
        given = request.headers.get("authorization")
        if given is None:
            return False if self.anonymous_pull else None
        return True if given == f"Basic {_basic(self.username, self.password)}" else None


def _grants(scope: str, known: bool) -> frozenset[tuple[str, str]]:
    """Return the (repository, action) pairs of `scope`; whoever is not known may only pull."""
    pairs = set()
    for item in scope.split():
        kind, _, rest = item.partition(":")
        name, _, actions = rest.rpartition(":")
        pairs |= {(name, action) for action in actions.split(",") if kind == "repository"}
    return frozenset(pair for pair in pairs if known or pair[1] == "pull")


def _basic(username: str, password: str) -> str:
    return base64.b64encode(f"{username}:{password}".encode()).decode()
