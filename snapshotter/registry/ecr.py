"""The keychain of ECR: tokens from AWS, kept, and renewed at a third of their life.

A renewal that fails leaves two thirds of a life to be noticed and mended in: it is counted, its token goes on being
used, and it is tried again, less and less often. A token that a registry refuses is replaced at once.

It owns the tokens, in memory only. Concurrency: one trio run; the statistics may be read from any thread.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import trio

from snapshotter.errors import AuthenticationFailed
from snapshotter.registry.ecrnames import EcrRegistry, parse_host
from snapshotter.registry.flight import Flights
from snapshotter.registry.keychain import Credentials
from snapshotter.registry.programs import run_program

_log = logging.getLogger(__name__)

TIMEOUT: Final = 20.0
"""Seconds for one token: botocore's own limits, twice over, and its start on a busy host."""
FIRST_WAIT: Final = 30.0
LONGEST_WAIT: Final = 600.0
"""Seconds until a failed renewal is tried again; a token lives for twelve hours."""
_COMMAND: Final = (sys.executable, "-m", "snapshotter.registry.ecrtoken")


@dataclass(slots=True)
class TokenState:
    """A token as metrics show it. Times are of the wall clock, seconds."""

    issued_at: float
    expires_at: float
    renewals: int = 0
    failures: int = 0
    """Failed renewals, since the start."""
    failing: int = 0
    """Failed renewals in a row."""


@dataclass(slots=True)
class _Token:
    credentials: Credentials = field(repr=False)
    state: TokenState
    due: float
    """When to renew it, on trio's clock."""


def is_available() -> bool:
    """Say whether botocore is installed; it is not imported for that."""
    return importlib.util.find_spec("botocore") is not None


class EcrKeychain:
    """Tokens for hosts of ECR. `command` is run with the host as its last argument."""

    def __init__(
        self,
        *,
        command: Sequence[str] = _COMMAND,
        timeout: float = TIMEOUT,
        parse: Callable[[str], EcrRegistry | None] = parse_host,
    ) -> None:
        self._command = tuple(command)
        self._timeout = timeout
        self._parse = parse
        self._tokens: dict[str, _Token] = {}
        self._flights: Flights[str, _Token | None] = Flights()
        self._changed = trio.Event()

    async def lookup(
        self,
        host: str,
        repository: str = "",  # noqa: ARG002  a token is for all repositories
        *,
        refused: Collection[Credentials] = (),
    ) -> Credentials | None:
        """Return a token for `host`, None when it is not ECR's, or public and there are no AWS credentials.

        Raises AuthenticationFailed saying why there is no token.
        """
        registry = self._parse(host)
        if registry is None:
            return None
        token = self._tokens.get(host)
        if token is None or token.credentials in refused or token.state.expires_at <= time.time():
            token = await self._flights.run(host, lambda: self._fetch(host, registry))
        return None if token is None else token.credentials

    async def run(self) -> None:
        """Renew tokens in time, until cancelled."""
        while True:
            self._changed = trio.Event()
            now = trio.current_time()
            for host, token in list(self._tokens.items()):
                if token.due <= now:
                    await self._renew(host, token)
            next_due = min((token.due for token in self._tokens.values()), default=float("inf"))
            with trio.move_on_at(next_due):
                await self._changed.wait()

    def states(self) -> Iterator[tuple[str, TokenState]]:
        """Yield the tokens by host."""
        for host, token in list(self._tokens.items()):
            yield host, token.state

    async def _renew(self, host: str, token: _Token) -> None:
        registry = self._parse(host)
        assert registry is not None, "it has a token"
        state = token.state
        try:
            fresh = await self._flights.run(host, lambda: self._fetch(host, registry))
            failure = None if fresh is not None else "there are no AWS credentials any more"
        except AuthenticationFailed as error:
            failure = str(error)
        if failure is None:
            return
        state.failures += 1
        state.failing += 1
        # With a short life there is no time for long waits.
        third = (state.expires_at - state.issued_at) / 3
        token.due = trio.current_time() + min(
            FIRST_WAIT * 2.0 ** min(state.failing - 1, 16), LONGEST_WAIT, max(third, 1.0)
        )
        if state.failing == 1:
            _log.warning(
                "an ECR token cannot be renewed; the old one is used as long as it lives",
                extra={"host": host, "error": failure, "seconds_left": round(state.expires_at - time.time())},
            )

    async def _fetch(self, host: str, registry: EcrRegistry) -> _Token | None:
        what = "ECR token helper"
        done = await run_program(
            (*self._command, host), what=what, about=host, timeout=self._timeout, environ=os.environ
        )
        try:
            answer = json.loads(done.stdout)
            problem = answer.get("error")
            if problem is None:
                credentials = Credentials(str(answer["username"]), str(answer["secret"]))
                expires_at = float(answer["expires_at"])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise AuthenticationFailed(
                f"{what}: its answer for {host} is not understood (exit status {done.returncode})"
            ) from None
        if problem is not None:
            if registry.is_public and problem in {"none", "missing"}:
                return None  # everybody may pull there, more slowly
            raise AuthenticationFailed(f"{what}: {host}: {answer.get('message')}")
        return self._keep(host, credentials, expires_at)

    def _keep(self, host: str, credentials: Credentials, expires_at: float) -> _Token:
        now = time.time()
        before = self._tokens.get(host)
        state = TokenState(now, expires_at)
        if before is not None:
            state.renewals = before.state.renewals + 1
            state.failures = before.state.failures
        due = trio.current_time() + max(expires_at - now, 0.0) / 3
        token = self._tokens[host] = _Token(credentials, state, due)
        self._changed.set()
        return token
