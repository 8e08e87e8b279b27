"""Registry clients for tests: quick to give up, trusting the test registry, holding its credentials.

`failure` is how a test states that something must fail: it also sees that no secret is shown in the failing.
"""

from __future__ import annotations

import traceback
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
import trio

from snapshotter.errors import SnapshotterError
from snapshotter.registry.client import RegistryClient
from snapshotter.registry.keychain import Credentials, StaticKeychain
from snapshotter.registry.ranges import RangeClient
from snapshotter.registry.retry import RetryPolicy, Timeouts
from tests.support.registry import Registry

QUICK = RetryPolicy(attempts=3, first_wait=0.001, max_wait=0.05, jitter=0.0)
ONCE = RetryPolicy(attempts=1)
IMPATIENT = Timeouts(connect=2.0, read=0.8, total=20.0)
"""For tests in which the server says nothing: a wait that fails quickly."""
PATIENT = Timeouts(connect=5.0, read=10.0, total=30.0)

Result = TypeVar("Result")
AnyError = TypeVar("AnyError", bound=SnapshotterError)


def keychain_for(registry: Registry) -> StaticKeychain:
    """Return a keychain with the user of `registry`; an empty one where it has none."""
    known = {registry.host: Credentials(registry.auth.username, registry.auth.password)}
    return StaticKeychain(known if registry.auth.username else {})


def client_for(registry: Registry, **options: Any) -> RegistryClient:
    """Return a client of `registry`; `options` replace the arguments of RegistryClient."""
    defaults: dict[str, Any] = {
        "keychain": keychain_for(registry),
        "retry": QUICK,
        "timeouts": PATIENT,
        "ca_file": registry.ca_file,
        # Loopback names are plain HTTP unless somebody says otherwise.
        "plain_http": None if registry.certificate is None else False,
    }
    return RegistryClient(**(defaults | options))


def ranges_for(registry: Registry, **options: Any) -> RangeClient:
    """Return a RangeClient for `registry`; `options` replace its arguments."""
    defaults: dict[str, Any] = {"connections": 2, "timeouts": PATIENT, "ca_file": registry.ca_file}
    return RangeClient(**(defaults | options))


def run(registry: Registry, work: Callable[[RegistryClient], Awaitable[Result]], **options: Any) -> Result:
    """Return what `work` returns, given a client of `registry`."""

    async def main() -> Result:
        async with client_for(registry, **options) as client:
            return await work(client)

    return trio.run(main)


def failure(registry: Registry, kind: type[AnyError], act: Callable[[], object]) -> AnyError:
    """Return the error of exactly `kind` that `act` must raise; nothing of it may show a secret."""
    with pytest.raises(kind) as caught:
        act()
    assert type(caught.value) is kind
    registry.assert_no_secret(
        str(caught.value), repr(caught.value), "".join(traceback.format_exception(caught.value))
    )
    return caught.value
