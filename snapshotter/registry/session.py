"""One call of the API, from the caller's wish to the reply: choose a host, log in, follow, refuse, try again.

A registry may have mirrors. They are asked in their order; one that fails, has not what is asked for, or sends what
the caller's check refuses is passed over, and rests (health.py). The registry itself, the last, is always asked. One
attempt is one round over all of them, and its error is the last host's.

It owns the Wire, the Authorizer and the circuits. Concurrency: any number of tasks of one trio run.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import quote

import httpx
import trio

from snapshotter.errors import BlobNotFound, ConfigError, CorruptData, RegistryError, RegistryRefused
from snapshotter.oci.media_types import MANIFEST_ACCEPT
from snapshotter.oci.reference import Reference
from snapshotter.registry.auth import Authorizer, Scope
from snapshotter.registry.challenge import parse_challenges
from snapshotter.registry.health import Circuits, Outcome
from snapshotter.registry.hosts import PULL, PUSH, RESOLVE, Host, Hosts
from snapshotter.registry.keychain import Keychain
from snapshotter.registry.replies import credentials_expired, error_for
from snapshotter.registry.retry import RetryPolicy, Timeouts
from snapshotter.registry.wire import Exchange, Reply, Wire, host_of, joined, same_origin
from snapshotter.units import Digest

log = logging.getLogger(__name__)

Result = TypeVar("Result")

MAX_REFUSALS: Final = 3
"""No credentials yet, credentials that have expired, and one more for a presigned URL that has."""
MAX_CREDENTIALS: Final = 6
"""Credentials that are tried one after the other, where several keychains have some."""
MISSES: Final = 3
"""Answers of "not found" in a row, and never another one, after which a mirror is mentioned in the log."""

Check = Callable[[Reply], None]
"""Raises RegistryError or CorruptData for a reply that is not what was asked for."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request to the registry of `ref`."""

    what: str
    """What is asked for, in words for messages; the registry and the repository included."""
    ref: Reference
    method: str
    path: str = field(repr=False)
    """Below `/v2/<repository>/`, with its query; or a whole URL that the registry has sent us to."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    content: bytes | None = field(default=None, repr=False)
    push: bool = False
    """Whether to ask for the right to push, too."""
    source: str = ""
    """Another repository that must be readable."""
    success: frozenset[int] = frozenset({200})
    """Statuses that the caller wants to see; every other one is raised."""
    capability: str = PULL
    """What a host must be good for."""

    @property
    def scope(self) -> Scope:
        """What a token for this call must allow."""
        own = f"repository:{self.ref.repository}:{'pull,push' if self.push else 'pull'}"
        return (own, f"repository:{self.source}:pull") if self.source else (own,)


def blob_call(ref: Reference, digest: Digest, *, start: int = 0, end: int | None = None) -> Call:
    """Return the request for a blob, or for its bytes [start, end), which a registry may answer by all of it."""
    headers = {} if end is None else {"Range": f"bytes={start}-{end - 1}"}
    success = frozenset({200} if end is None else {200, 206})
    return Call(f"blob {digest} of {ref.locator}", ref, "GET", f"blobs/{digest}", headers, success=success)


def manifest_call(ref: Reference, method: str) -> Call:
    """Return the request for the manifest or index at `ref`: by its digest if there is one, else by its tag."""
    name = ref.digest or ref.tag
    what = f"manifest {name} of {ref.locator}"
    capability = PULL if ref.digest else RESOLVE
    return Call(what, ref, method, f"manifests/{name}", {"Accept": MANIFEST_ACCEPT}, capability=capability)


class Session:
    """Sends calls. `requests` counts what was sent, redirects not counted, `retries` the attempts after first ones."""

    def __init__(
        self,
        *,
        keychain: Keychain,
        timeouts: Timeouts,
        retry: RetryPolicy,
        hosts: Hosts,
        allow_downgrade: bool,
        user_agent: str,
        ca_file: Path | None,
    ) -> None:
        self.wire = Wire(
            timeouts=timeouts, user_agent=user_agent, allow_downgrade=allow_downgrade, ca_file=ca_file
        )
        self.authorizer = Authorizer(keychain, self.wire)
        self.circuits = Circuits()
        self._hosts = hosts
        self._retry = retry
        self._misses: dict[str, int] = {}
        self.requests = 0
        self.retries = 0

    async def aclose(self) -> None:
        """Close every connection."""
        await self.wire.aclose()

    async def fetch(self, call: Call, *, limit: int, check: Check | None = None) -> Reply:
        """Return the reply to `call` with at most `limit` bytes of body, tried as often as the policy says."""
        return await self.retrying(call.what, lambda: self.once(call, limit=limit, check=check))

    async def once(self, call: Call, *, limit: int, check: Check | None = None) -> Reply:
        """Return the first reply to `call` that `check` lets pass: one attempt.

        Raises the RegistryError that the last host's reply means, or what `check` said to it.
        """

        async def ask(host: Host) -> Reply:
            reply = await self.ask(host, call, limit=limit)
            if check is not None:
                check(reply)
            return reply

        return await self.first(call, ask)

    async def first(self, call: Call, work: Callable[[Host], Awaitable[Result]]) -> Result:
        """Return what `work` returns for the first host that can do it. Raises what it raises for the last one."""
        hosts = self.hosts_for(call)
        for host in hosts[:-1]:
            if not self.circuits.allows(host.name):
                continue
            try:
                result = await work(host)
            except (RegistryError, CorruptData, ConfigError) as error:
                self.blame(host.name, error)
            else:
                self._praise(host)
                return result
        last = hosts[-1]
        try:
            result = await work(last)
        except ConfigError as error:
            self.circuits.record(last.name, Outcome.MISCONFIGURED)
            raise RegistryRefused(f"{call.what}: {last.name} cannot be asked: {error}") from None
        except (RegistryError, CorruptData) as error:
            self.circuits.record(last.name, outcome_of(error))
            raise
        self._praise(last)
        return result

    def hosts_for(self, call: Call) -> tuple[Host, ...]:
        """Return who may be asked, in order. Content is pushed to one host only. Raises RegistryRefused for none."""
        capability = PUSH if call.push else call.capability
        hosts = tuple(host for host in self._hosts.of(call.ref.registry) if capability in host.capabilities)
        if not hosts:
            raise RegistryRefused(f"{call.what}: none of its hosts is configured to {capability}")
        return hosts[:1] if capability == PUSH else hosts

    def blame(self, mirror: str, error: Exception) -> None:
        """Note that a mirror did not do what was asked; the first time in a row is said in the log."""
        outcome = outcome_of(error)
        failures = self.circuits.record(mirror, outcome)
        if outcome is Outcome.MISSING:
            misses = self._misses.get(mirror, 0)
            if misses >= 0:
                self._misses[mirror] = misses + 1
            say = misses + 1 == MISSES
        else:
            say = failures == 1
        if say:
            log.warning(
                "a mirror is passed over",
                extra={"mirror": mirror, "outcome": outcome.value, "error": str(error)},
            )

    def _praise(self, host: Host) -> None:
        self.circuits.record(host.name, Outcome.OK)
        if host.namespace:
            self._misses[host.name] = -1

    async def retrying(self, what: str, work: Callable[[], Awaitable[Result]]) -> Result:
        """Return what `work` returns, tried as often as the policy says. Raises its last RegistryError."""
        attempt = 0
        while True:
            attempt += 1
            try:
                return await work()
            except RegistryError as error:
                await self.pause(what, attempt, error)

    async def pause(self, what: str, attempt: int, error: RegistryError) -> None:
        """Wait before the attempt that follows number `attempt`. Raises `error` if there is to be none."""
        wait = self._retry.delay(attempt, error)
        if wait is None:
            raise error
        self.retries += 1
        log.debug(
            "registry-retry", extra={"call": what, "attempt": attempt, "wait": wait, "error": str(error)}
        )
        await trio.sleep(wait)

    async def ask(self, host: Host, call: Call, *, limit: int) -> Reply:
        """Return the reply of `host`. Raises the RegistryError that it means, and ConfigError."""
        deadline = self.wire.deadline(host.timeout)
        response = await self.open(host, call, deadline)
        body = await self.wire.read(response, call.what, limit=limit, deadline=deadline)
        return Reply(response.status_code, response.headers, body, response.url)

    async def open(self, host: Host, call: Call, deadline: float) -> httpx.Response:
        """Send `call` to `host`, log in as need be, and return the reply, unread: the caller closes it.

        Raises the RegistryError that a reply other than `call.success` means, and ConfigError.
        """
        url = url_at(host, call.ref, call.path)
        # Uploads may go elsewhere; the registry's credentials do not go with them.
        at_home = is_home(host, url)
        repository = call.ref.repository
        refusals = 0
        while True:
            sent = None
            if at_home:
                sent = await self.authorizer.authorization(host, repository, call.scope)
            exchange = Exchange(
                call.what,
                call.method,
                url,
                call.headers,
                call.content,
                sent,
                host.headers if at_home else {},
                host.trust,
                host.connect_timeout,
            )
            self.requests += 1
            response = await self.wire.open(exchange, deadline)
            if response.status_code in call.success:
                return response
            body = await self.wire.read_error(response, call.what, deadline=deadline)
            error = error_for(call.what, host_of(response.url), response.status_code, response.headers, body)
            refusals += 1
            other_credentials = (sent or "").startswith("Basic ") and same_origin(response.url, url)
            enough = MAX_CREDENTIALS if other_credentials else MAX_REFUSALS
            last = refusals >= enough or not at_home
            if last or not await self._may_pass(host, call, url, response, body, sent):
                raise error

    async def _may_pass(
        self, host: Host, call: Call, url: httpx.URL, response: httpx.Response, body: bytes, sent: str | None
    ) -> bool:
        """Say whether a refused call may pass now: with other credentials, or by another presigned URL."""
        status = response.status_code
        if not same_origin(response.url, url):
            return status in {401, 403} or credentials_expired(status, body)
        if status != 401 and not credentials_expired(status, body):
            return False
        challenges = parse_challenges(response.headers.get_list("WWW-Authenticate"))
        return await self.authorizer.refused(host, call.ref.repository, call.scope, sent, challenges)


def url_at(host: Host, ref: Reference, path: str) -> httpx.URL:
    """Return the URL of `path` below the repository of `ref` at `host`, or `path` itself where it is one.

    Raises RegistryRefused when what the registry has sent is no URL, or one of plain http after https.
    """
    home = httpx.URL(f"{host.scheme}://{host.authority}{host.path}/{ref.repository}/")
    if host.namespace and "://" not in path:
        path += f"{'&' if '?' in path else '?'}ns={quote(host.namespace, safe='')}"
    url = joined(ref.locator, home, path)
    if url.scheme not in {"https", home.scheme}:
        raise RegistryRefused(f"{ref.locator}: the registry sent a URL that cannot be used")
    return url


def is_home(host: Host, url: httpx.URL) -> bool:
    """Say whether `url` is at `host`, whose credentials and headers may go there."""
    return same_origin(url, httpx.URL(f"{host.scheme}://{host.authority}/"))


def headers_for(host: Host, response: httpx.Response, url: httpx.URL) -> dict[str, str]:
    """Return the headers that may go to `url` of those by which `host` gave `response`: its own, and who asked."""
    if not is_home(host, url):
        return {}
    authorization = response.request.headers.get("Authorization")
    if authorization is None:
        return dict(host.headers)
    headers = {name: value for name, value in host.headers.items() if name.lower() != "authorization"}
    return headers | {"Authorization": authorization}


def outcome_of(error: Exception) -> Outcome:
    """Return what an error says about the host that it comes from."""
    if isinstance(error, CorruptData):
        return Outcome.LIED
    if isinstance(error, ConfigError):
        return Outcome.MISCONFIGURED
    if isinstance(error, BlobNotFound):
        return Outcome.MISSING
    return Outcome.FAILED if isinstance(error, RegistryError) and error.temporary else Outcome.REFUSED
