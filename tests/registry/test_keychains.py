"""Several keychains: their order, and that one which fails or hangs keeps nobody from the others."""

from collections.abc import Collection

import pytest
import trio
import trio.testing

from snapshotter.errors import AuthenticationFailed
from snapshotter.registry.client import RegistryClient
from snapshotter.registry.keychain import Credentials, Keychain, StaticKeychain
from snapshotter.registry.keychains import LOOKUP_TIMEOUT, ChainKeychain
from tests.conftest import ExpectedLogs
from tests.registry.conftest import StartRegistry
from tests.support.registry import Basic, Bearer, Ecr, NoAuth
from tests.support.registry_clients import failure, run

ALICE = Credentials("alice", "s3cret-word")
BOB = Credentials("bob", "x")


class Broken:
    """Always fails."""

    def __init__(self) -> None:
        self.asked = 0

    async def lookup(
        self, host: str, repository: str = "", *, refused: Collection[Credentials] = ()
    ) -> Credentials | None:
        self.asked += 1
        raise AuthenticationFailed("helper x: its answer is not understood")


class Hanging:
    """Never answers."""

    async def lookup(
        self, host: str, repository: str = "", *, refused: Collection[Credentials] = ()
    ) -> Credentials | None:
        await trio.sleep_forever()
        return None


def lookup(keychain: Keychain, host: str) -> Credentials | None:
    return trio.run(keychain.lookup, host)


def test_the_first_keychain_with_an_answer_wins() -> None:
    chain = ChainKeychain(
        one=StaticKeychain({}), two=StaticKeychain({"r": ALICE}), three=StaticKeychain({"r": BOB, "s": BOB})
    )
    assert lookup(chain, "r") == ALICE
    assert lookup(chain, "s") == BOB
    assert lookup(chain, "t") is None
    assert chain.statistics["two"].answers == 1
    assert chain.statistics["two"].misses == 2


def test_one_that_fails_is_said_once_counted_and_left_alone(expected_logs: ExpectedLogs) -> None:
    expected_logs.allow("a keychain failed")
    broken = Broken()
    chain = ChainKeychain(broken=broken, good=StaticKeychain({"r": ALICE}))

    async def main() -> None:
        for _ in range(5):
            assert await chain.lookup("r") == ALICE
        assert broken.asked == 1
        await trio.sleep(1.5)
        assert await chain.lookup("r") == ALICE
        assert broken.asked == 2

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert len(expected_logs.records) == 1
    assert chain.statistics["broken"].failures == 2
    assert chain.statistics["broken"].is_failing


def test_when_nobody_else_knows_the_failure_is_the_answer(expected_logs: ExpectedLogs) -> None:
    expected_logs.allow("a keychain failed")
    chain = ChainKeychain(broken=Broken(), none=StaticKeychain({}))
    with pytest.raises(AuthenticationFailed, match="not understood"):
        lookup(chain, "r")


def test_one_that_hangs_is_waited_for_once(expected_logs: ExpectedLogs) -> None:
    expected_logs.allow("a keychain failed")
    chain = ChainKeychain(hangs=Hanging(), good=StaticKeychain({"r": ALICE}))

    async def main() -> None:
        started = trio.current_time()
        for _ in range(3):
            assert await chain.lookup("r") == ALICE
        assert trio.current_time() - started == LOOKUP_TIMEOUT

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize("mode", [Basic, Ecr, Bearer])
def test_credentials_that_are_refused_are_followed_by_the_next_keychains(
    start: StartRegistry, mode: type[NoAuth]
) -> None:
    registry = start(auth=mode())
    digest = registry.add_blob(b"data")
    right = Credentials(registry.auth.username, registry.auth.password)
    chain = ChainKeychain(
        stale=StaticKeychain({registry.host: Credentials(registry.auth.username, "stale-word")}),
        older=StaticKeychain({registry.host: Credentials(registry.auth.username, "older-word")}),
        good=StaticKeychain({registry.host: right}),
    )

    async def work(client: RegistryClient) -> None:
        for _ in range(2):
            assert await client.blob(registry.reference("app"), digest, max_size=10) == b"data"

    run(registry, work, keychain=chain)
    assert registry.count(server="token") <= 3
    assert len(registry.matching(path="/blobs/")) <= 5


def test_when_all_are_refused_they_are_tried_again_next_time(start: StartRegistry) -> None:
    registry = start(auth=Basic())
    digest = registry.add_blob(b"data")
    chain = ChainKeychain(
        one=StaticKeychain({registry.host: ALICE}), two=StaticKeychain({registry.host: BOB})
    )

    async def work(client: RegistryClient) -> None:
        for tries in (3, 6):
            with pytest.raises(AuthenticationFailed):
                await client.blob(registry.reference("app"), digest, max_size=10)
            assert len(registry.requests) == tries

    run(registry, work, keychain=chain)


def test_no_keychain_with_an_answer_is_said_so(start: StartRegistry) -> None:
    registry = start(auth=Basic())
    digest = registry.add_blob(b"data")
    chain = ChainKeychain(empty=StaticKeychain({}))
    error = failure(
        registry,
        AuthenticationFailed,
        lambda: run(
            registry,
            lambda client: client.blob(registry.reference("app"), digest, max_size=10),
            keychain=chain,
        ),
    )
    assert "no keychain has any" in str(error)
