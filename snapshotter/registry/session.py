"""One call of the API, from the caller's wish to the registry's reply: log in, follow, refuse, try again.

It owns the Wire and the Authorizer. Concurrency: any number of tasks of one trio run.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

import httpx
import trio

from snapshotter.errors import RegistryError, RegistryRefused
from snapshotter.oci.media_types import MANIFEST_ACCEPT
from snapshotter.oci.reference import Reference, api_host, default_scheme
from snapshotter.registry.auth import Authorizer, Scope
from snapshotter.registry.challenge import parse_challenges
from snapshotter.registry.keychain import Keychain
from snapshotter.registry.replies import credentials_expired, error_for
from snapshotter.registry.retry import RetryPolicy, Timeouts
from snapshotter.registry.wire import Exchange, Reply, Wire, host_of, joined, same_origin
from snapshotter.units import Digest

log = logging.getLogger(__name__)

Result = TypeVar("Result")

MAX_REFUSALS: Final = 3
"""No credentials yet, credentials that have expired, and one more for a presigned URL that has."""


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
    return Call(what, ref, method, f"manifests/{name}", {"Accept": MANIFEST_ACCEPT})


class Session:
    """Sends calls. `requests` counts what was sent, redirects not counted, `retries` the attempts after first ones."""

    def __init__(
        self,
        *,
        keychain: Keychain,
        timeouts: Timeouts,
        retry: RetryPolicy,
        plain_http: bool | None,
        user_agent: str,
        ca_file: Path | None,
    ) -> None:
        self.wire = Wire(
            timeouts=timeouts, user_agent=user_agent, allow_downgrade=plain_http is True, ca_file=ca_file
        )
        self.authorizer = Authorizer(
            keychain, self.wire, is_plain=lambda registry: self._scheme(registry) == "http"
        )
        self._retry = retry
        self._plain_http = plain_http
        self.requests = 0
        self.retries = 0

    async def aclose(self) -> None:
        """Close every connection."""
        await self.wire.aclose()

    def url(self, ref: Reference, path: str) -> httpx.URL:
        """Return the URL of `path` below the repository of `ref`, or `path` itself where it is one.

        Raises RegistryRefused when what the registry has sent is no URL, or one of plain http after https.
        """
        home = httpx.URL(f"{self._scheme(ref.registry)}://{api_host(ref.registry)}/v2/{ref.repository}/")
        url = joined(ref.locator, home, path)
        if url.scheme not in {"https", home.scheme}:
            raise RegistryRefused(f"{ref.locator}: the registry sent a URL that cannot be used")
        return url

    def _scheme(self, registry: str) -> str:
        if self._plain_http is None:
            return default_scheme(registry)
        return "http" if self._plain_http else "https"

    async def fetch(self, call: Call, *, limit: int) -> Reply:
        """Return the reply to `call` with at most `limit` bytes of body, tried as often as the policy says."""
        return await self.retrying(call.what, lambda: self.once(call, limit=limit))

    async def once(self, call: Call, *, limit: int) -> Reply:
        """Return the reply to `call`: one attempt. Raises the RegistryError that the reply means."""
        deadline = self.wire.deadline()
        response = await self.open(call, deadline)
        body = await self.wire.read(response, call.what, limit=limit, deadline=deadline)
        return Reply(response.status_code, response.headers, body, response.url)

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

    async def open(self, call: Call, deadline: float) -> httpx.Response:
        """Send `call`, log in as need be, and return the reply, unread: the caller closes it.

        Raises the RegistryError that a reply other than `call.success` means.
        """
        url = self.url(call.ref, call.path)
        registry = call.ref.registry
        # Uploads may go elsewhere; the registry's credentials do not go with them.
        at_home = same_origin(url, self.url(call.ref, ""))
        refusals = 0
        while True:
            sent = await self.authorizer.authorization(registry, call.scope) if at_home else None
            exchange = Exchange(call.what, call.method, url, call.headers, call.content, sent)
            self.requests += 1
            response = await self.wire.open(exchange, deadline)
            if response.status_code in call.success:
                return response
            body = await self.wire.read_error(response, call.what, deadline=deadline)
            error = error_for(call.what, host_of(response.url), response.status_code, response.headers, body)
            refusals += 1
            last = refusals == MAX_REFUSALS or not at_home
            if last or not await self._may_pass(call, url, response, body, sent):
                raise error

    async def _may_pass(
        self, call: Call, url: httpx.URL, response: httpx.Response, body: bytes, sent: str | None
    ) -> bool:
        """Say whether a refused call may pass now: with other credentials, or by another presigned URL."""
        status = response.status_code
        if not same_origin(response.url, url):
            return status in {401, 403} or credentials_expired(status, body)
        if status != 401 and not credentials_expired(status, body):
            return False
        challenges = parse_challenges(response.headers.get_list("WWW-Authenticate"))
        return await self.authorizer.refused(call.ref.registry, call.scope, sent, challenges)
