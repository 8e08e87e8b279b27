"""Several keychains as one: the first with an answer wins, and one that fails or hangs keeps nobody from the next.

A keychain that failed for a host rests for a while, so that a helper that hangs does not cost its time at every request.
What goes wrong is said once in the log, and counted, long before it keeps a pull from working.

Concurrency: one trio thread; the counts may be read from any.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

import trio

from snapshotter.errors import AuthenticationFailed
from snapshotter.registry.health import Circuits, Outcome
from snapshotter.registry.keychain import Credentials, Keychain

_log = logging.getLogger(__name__)

LOOKUP_TIMEOUT: Final = 25.0
"""Seconds for one keychain: above what a credential helper is given, below the 30 s that a mount waits."""


@dataclass(slots=True)
class KeychainStatistics:
    """What a keychain has done so far."""

    answers: int = 0
    misses: int = 0
    """Lookups for which it has nothing."""
    refusals: int = 0
    """Lookups for which it has what the registry has just refused."""
    failures: int = 0
    is_failing: bool = False
    """Whether its last lookup failed."""


class ChainKeychain:
    """Keychains by name, in the order in which they are asked."""

    def __init__(self, **keychains: Keychain) -> None:
        self._keychains = keychains
        self._circuits = Circuits(clock=trio.current_time)
        self._timeout = LOOKUP_TIMEOUT
        self.statistics = {name: KeychainStatistics() for name in keychains}

    async def lookup(
        self, host: str, repository: str = "", *, refused: Collection[Credentials] = ()
    ) -> Credentials | None:
        """Return the first answer that is not among `refused`.

        Raises AuthenticationFailed from the first keychain that did, when none of the others has an answer.
        """
        failure: AuthenticationFailed | None = None
        for name, keychain in self._keychains.items():
            if not self._circuits.allows(f"{name} {host}"):
                failure = failure or AuthenticationFailed(
                    f"keychain {name}: it failed a moment ago, and is left alone for a while"
                )
                continue
            try:
                credentials = await self._ask(name, keychain, host, repository, refused)
            except AuthenticationFailed as error:
                self._failed(name, host, error)
                failure = failure or error
                continue
            self._circuits.record(f"{name} {host}", Outcome.OK)
            numbers = self.statistics[name]
            numbers.is_failing = False
            if credentials is None:
                numbers.misses += 1
            elif credentials in refused:
                numbers.refusals += 1
            else:
                numbers.answers += 1
                return credentials
        if failure is not None:
            raise failure
        return None

    async def _ask(
        self, name: str, keychain: Keychain, host: str, repository: str, refused: Collection[Credentials]
    ) -> Credentials | None:
        try:
            with trio.fail_after(self._timeout):
                return await keychain.lookup(host, repository, refused=refused)
        except trio.TooSlowError:
            raise AuthenticationFailed(
                f"keychain {name}: no answer for {host} within {self._timeout:g} s"
            ) from None

    def _failed(self, name: str, host: str, error: AuthenticationFailed) -> None:
        numbers = self.statistics[name]
        numbers.failures += 1
        numbers.is_failing = True
        if self._circuits.record(f"{name} {host}", Outcome.FAILED) == 1:
            _log.warning("a keychain failed", extra={"keychain": name, "error": str(error)})
