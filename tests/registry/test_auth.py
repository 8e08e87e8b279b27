"""Logging in: every way, refreshed in the middle, once for everybody, and refused with a clear word."""

import json
import time
from collections.abc import Collection

import pytest
import trio

from snapshotter.errors import AuthenticationFailed, RegistryRefused, RegistryTimeout, RegistryUnavailable
from snapshotter.registry.client import RegistryClient
from snapshotter.registry.keychain import Credentials, StaticKeychain
from tests.conftest import ExpectedLogs
from tests.registry.conftest import StartRegistry
from tests.support.registry import (
    Basic,
    Bearer,
    Drop,
    Ecr,
    ExpireToken,
    Image,
    NoAuth,
    Registry,
    Stall,
    Status,
)
from tests.support.registry_clients import IMPATIENT, ONCE, failure, run
from tests.support.tls import Certificate

LAYER = b"layer bytes"
EVERY_MODE = [NoAuth, Basic, Bearer, Ecr]


def put_image(registry: Registry, repository: str = "team/app") -> Image:
    return registry.add_image(
        [LAYER], repository=repository, layer_media_type="application/vnd.oci.image.layer.v1.tar"
    )


async def pull(client: RegistryClient, registry: Registry, image: Image) -> bytes:
    ref = registry.reference(image.repository)
    await client.manifest(ref)
    return await client.blob(ref, image.layers[0], max_size=100)


@pytest.mark.parametrize("mode", EVERY_MODE)
@pytest.mark.parametrize("presigned_ttl", [None, 60.0])
def test_every_way_of_logging_in(
    start: StartRegistry, mode: type[NoAuth], presigned_ttl: float | None
) -> None:
    registry = start(auth=mode(), presigned_ttl=presigned_ttl)
    image = put_image(registry)
    assert run(registry, lambda client: pull(client, registry, image)) == LAYER


@pytest.mark.parametrize("mode", EVERY_MODE)
def test_every_way_over_tls(start: StartRegistry, mode: type[NoAuth], certificate: Certificate) -> None:
    registry = start(auth=mode(), presigned_ttl=60.0, certificate=certificate)
    image = put_image(registry)
    assert run(registry, lambda client: pull(client, registry, image)) == LAYER


def test_credentials_are_not_sent_before_they_are_asked_for(start: StartRegistry) -> None:
    registry = start(auth=NoAuth())
    image = put_image(registry)
    known = StaticKeychain({registry.host: Credentials("alice", "pw")})
    run(registry, lambda client: pull(client, registry, image), keychain=known)
    assert all("authorization" not in request.headers for request in registry.requests)


@pytest.mark.parametrize("mode", [Basic, Ecr])
def test_one_refusal_is_enough_to_learn_the_way(start: StartRegistry, mode: type[NoAuth]) -> None:
    registry = start(auth=mode())
    image = put_image(registry)
    run(registry, lambda client: pull(client, registry, image))
    assert [request.status for request in registry.requests] == [401, 200, 200]


def test_a_token_is_fetched_once_and_kept(start: StartRegistry) -> None:
    registry = start(auth=Bearer())
    image = put_image(registry)
    run(registry, lambda client: pull(client, registry, image))
    assert [(request.server, request.status) for request in registry.requests] == [
        ("registry", 401),
        ("token", 200),
        ("registry", 200),
        ("registry", 200),
    ]
    token_request = registry.matching(server="token")[0]
    assert token_request.query == {"service": "test registry, inc", "scope": "repository:team/app:pull"}


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        ("", "repository:team/app:pull"),
        ("repository:team/app:pull", "repository:team/app:pull"),
        ("repository:team/app:push,pull", "repository:team/app:pull,push"),
        ("repository:team/base:pull", "repository:team/app:pull repository:team/base:pull"),
        ("openid repository:team/app:delete", "repository:team/app:delete,pull openid"),
    ],
)
def test_a_token_is_for_what_we_want_and_what_the_registry_asks_for(
    start: StartRegistry, asked: str, sent: str
) -> None:
    registry = start(auth=Bearer())
    image = put_image(registry)
    realm = registry.auth._realm
    challenge = f'Bearer realm="{realm}",scope="{asked}"'
    registry.fault(Status(status=401, headers={"WWW-Authenticate": challenge}))
    assert run(registry, lambda client: pull(client, registry, image)) == LAYER
    assert registry.matching(server="token")[0].query["scope"] == sent


def test_a_second_repository_needs_a_token_but_no_refusal(start: StartRegistry) -> None:
    registry = start(auth=Bearer())
    one, other = put_image(registry), put_image(registry, "team/other")

    async def work(client: RegistryClient) -> None:
        await pull(client, registry, one)
        registry.clear_requests()
        await pull(client, registry, other)

    run(registry, work)
    assert [request.status for request in registry.requests] == [200, 200, 200]
    assert registry.matching(server="token")[0].query["scope"] == "repository:team/other:pull"


def test_many_tasks_wait_for_one_token(start: StartRegistry) -> None:
    registry = start(auth=Bearer())
    image = put_image(registry)

    async def work(client: RegistryClient) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(pull, client, registry, image)

    run(registry, work)
    assert registry.count(server="token") == 1


def test_a_cancelled_token_fetch_is_taken_over_by_a_waiter(start: StartRegistry) -> None:
    registry = start(auth=Bearer())
    image = put_image(registry)
    registry.fault(Stall(path="/token"))

    async def work(client: RegistryClient) -> bytes:
        async with trio.open_nursery() as nursery:
            leader = trio.CancelScope()

            async def led() -> None:
                with leader:
                    await pull(client, registry, image)

            nursery.start_soon(led)
            while registry.count(server="token") == 0:
                await trio.sleep(0.01)
            nursery.start_soon(pull, client, registry, image)
            await trio.sleep(0.1)
            assert registry.count(server="token") == 1
            leader.cancel()
        return await pull(client, registry, image)

    assert run(registry, work) == LAYER
    assert registry.count(server="token") == 2


def test_a_failed_token_fetch_fails_every_waiter_once(start: StartRegistry) -> None:
    registry = start(auth=Bearer())
    image = put_image(registry)
    registry.fault(Stall(path="/token", seconds=1.5))  # time for all to come
    wrong = StaticKeychain({registry.host: Credentials("reader", "wrong-pass")})
    registry.auth.secrets.append("wrong-pass")
    errors = []

    async def fail(client: RegistryClient) -> None:
        with pytest.raises(AuthenticationFailed) as caught:
            await pull(client, registry, image)
        errors.append(caught.value)

    async def work(client: RegistryClient) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(fail, client)

    run(registry, work, keychain=wrong)
    assert registry.count(server="token") == 2, "once with the credentials, once without"
    assert len({id(error) for error in errors}) == 5
    registry.assert_no_secret(*map(str, errors))


def test_a_token_is_replaced_shortly_before_it_expires(start: StartRegistry) -> None:
    registry = start(auth=Bearer(ttl=3.0))
    image = put_image(registry)

    async def work(client: RegistryClient) -> None:
        await pull(client, registry, image)
        # A tenth of its life early: the server itself would still take it.
        await trio.sleep(2.79)
        await pull(client, registry, image)

    run(registry, work)
    assert registry.count(server="token") == 2
    assert [request.status for request in registry.matching(server="registry")] == [401, 200, 200, 200, 200]


def test_a_token_withdrawn_early_is_fetched_anew(start: StartRegistry) -> None:
    registry = start(auth=Bearer())
    image = put_image(registry)
    registry.fault(ExpireToken(path="/blobs/"))
    assert run(registry, lambda client: pull(client, registry, image)) == LAYER
    assert registry.count(server="token") == 2


def test_a_token_without_a_stated_lifetime_is_kept_for_a_minute(start: StartRegistry) -> None:
    registry = start(auth=Bearer(state_lifetime=False))
    image = put_image(registry)

    async def work(client: RegistryClient) -> None:
        await pull(client, registry, image)
        await pull(client, registry, image)

    run(registry, work)
    assert registry.count(server="token") == 1


def test_the_public_gets_a_token_without_credentials(start: StartRegistry) -> None:
    registry = start(auth=Bearer(anonymous_pull=True))
    image = put_image(registry)
    assert run(registry, lambda client: pull(client, registry, image), keychain=StaticKeychain({})) == LAYER
    assert "authorization" not in registry.matching(server="token")[0].headers


class Failing:
    """A keychain whose helper does not work."""

    async def lookup(
        self, host: str, repository: str = "", *, refused: Collection[Credentials] = ()
    ) -> Credentials | None:
        raise AuthenticationFailed(f"credential helper x: exit status 1 for {host}")


def useless(registry: Registry) -> StaticKeychain:
    """Credentials that `registry` refuses."""
    registry.auth.secrets.append("wrong-pass")
    return StaticKeychain({registry.host: Credentials(registry.auth.username, "wrong-pass")})


def attempts(registry: Registry) -> list[bool]:
    """Whether each request for a token came with credentials."""
    return ["authorization" in request.headers for request in registry.matching(server="token")]


@pytest.mark.parametrize(("broken", "tried"), [(False, [True, False]), (True, [False])])
def test_what_is_public_needs_no_credentials_that_work(
    start: StartRegistry, expected_logs: ExpectedLogs, broken: bool, tried: list[bool]
) -> None:
    expected_logs.allow("asking as anybody, without credentials")
    registry = start(auth=Bearer(anonymous_pull=True))
    images = [put_image(registry), put_image(registry, "team/other")]

    async def work(client: RegistryClient) -> None:
        for image in images:
            assert await pull(client, registry, image) == LAYER

    run(registry, work, keychain=Failing() if broken else useless(registry))
    # Each repository has credentials of its own.
    assert attempts(registry) == tried * 2
    assert [record.__dict__["host"] for record in expected_logs.records] == [registry.host]
    registry.assert_no_secret(*(str(record.__dict__) for record in expected_logs.records))


def test_credentials_that_were_refused_are_tried_again_for_what_is_not_public(
    start: StartRegistry, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("asking as anybody, without credentials")
    auth = Bearer(anonymous_pull=True)
    registry = start(auth=auth)
    image = put_image(registry)
    private = registry.fault(ExpireToken(path="/manifests/", count=-1))

    async def work(client: RegistryClient) -> None:
        with pytest.raises(AuthenticationFailed, match="401 UNAUTHORIZED"):
            await pull(client, registry, image)
        assert attempts(registry) == [True, False, False]
        private.count = private.hits
        auth.password = "wrong-pass"
        assert await pull(client, registry, image) == LAYER

    run(registry, work, keychain=useless(registry))
    assert attempts(registry) == [True, False, False, True]


def test_nothing_is_pushed_without_credentials(start: StartRegistry) -> None:
    registry = start(auth=Bearer(anonymous_pull=True))
    wrong = useless(registry)
    reference = registry.reference("team/app")
    failure(
        registry,
        AuthenticationFailed,
        lambda: run(registry, lambda client: client.push_blob(reference, LAYER), keychain=wrong),
    )
    assert attempts(registry) == [True]


def test_an_identity_token_is_exchanged_by_post(start: StartRegistry) -> None:
    registry = start(auth=Bearer(identity_token="identity-token-word"))
    image = put_image(registry)
    known = StaticKeychain({registry.host: Credentials("<token>", "identity-token-word")})
    assert run(registry, lambda client: pull(client, registry, image), keychain=known) == LAYER
    request = registry.matching(server="token")[0]
    assert request.method == "POST"
    assert b"grant_type=refresh_token" in request.body
    assert b"scope=repository%3Ateam%2Fapp%3Apull" in request.body


@pytest.mark.parametrize("mode", [Basic, Ecr])
def test_a_rotated_password_is_looked_up_again(start: StartRegistry, mode: type[Basic]) -> None:
    registry = start(auth=mode())
    image = put_image(registry)
    known = {registry.host: Credentials(registry.auth.username, registry.auth.password)}

    class Rotating:
        async def lookup(
            self, host: str, repository: str = "", *, refused: Collection[Credentials] = ()
        ) -> Credentials | None:
            return known[host]

    async def work(client: RegistryClient) -> bytes:
        await pull(client, registry, image)
        registry.auth.rotate("second-password")
        known[registry.host] = Credentials(registry.auth.username, "second-password")
        return await pull(client, registry, image)

    assert run(registry, work, keychain=Rotating()) == LAYER
    refused = 403 if mode is Ecr else 401
    assert [request.status for request in registry.requests] == [401, 200, 200, refused, 200, 200]


@pytest.mark.parametrize("mode", [Basic, Ecr, Bearer])
def test_wrong_credentials_are_tried_once(start: StartRegistry, mode: type[NoAuth]) -> None:
    registry = start(auth=mode())
    image = put_image(registry)
    registry.auth.secrets.append("wrong-pass")
    wrong = StaticKeychain({registry.host: Credentials(registry.auth.username, "wrong-pass")})
    error = failure(
        registry,
        AuthenticationFailed,
        lambda: run(registry, lambda client: pull(client, registry, image), keychain=wrong),
    )
    assert "401 UNAUTHORIZED" in str(error)
    assert registry.host in str(error)
    # A token server is asked once more, for a token that anybody gets.
    assert len(registry.requests) == (3 if mode is Bearer else 2)


@pytest.mark.parametrize("mode", [Basic, Ecr])
def test_no_credentials_are_named_as_the_reason(start: StartRegistry, mode: type[NoAuth]) -> None:
    registry = start(auth=mode())
    image = put_image(registry)
    error = failure(
        registry,
        AuthenticationFailed,
        lambda: run(registry, lambda client: pull(client, registry, image), keychain=StaticKeychain({})),
    )
    assert str(error) == f"registry {registry.host}: wants credentials, and no keychain has any"


def test_a_real_403_is_no_invitation_to_log_in_again(start: StartRegistry) -> None:
    registry = start(auth=Ecr())
    image = put_image(registry)
    registry.fault(Status(status=403, code="DENIED", path="/blobs/", count=-1))
    error = failure(
        registry, AuthenticationFailed, lambda: run(registry, lambda client: pull(client, registry, image))
    )
    assert str(error).endswith(f"{registry.host} answered 403 DENIED")
    assert registry.count(path="/blobs/") == 1


def test_credentials_that_expire_for_ever_are_given_up(start: StartRegistry) -> None:
    registry = start(auth=Bearer())
    image = put_image(registry)
    registry.fault(ExpireToken(path="/blobs/", count=-1))
    error = failure(
        registry, AuthenticationFailed, lambda: run(registry, lambda client: pull(client, registry, image))
    )
    assert str(error).startswith(
        f"blob {image.layers[0].digest} of {registry.host}/team/app: {registry.host} answered"
    )
    assert registry.count(path="/blobs/") == 3


def test_a_way_in_that_nobody_knows_is_named(start: StartRegistry) -> None:
    registry = start()
    image = put_image(registry)
    registry.fault(Status(status=401, headers={"WWW-Authenticate": "Negotiate, Digest realm=x"}, count=-1))
    error = failure(
        registry, AuthenticationFailed, lambda: run(registry, lambda client: pull(client, registry, image))
    )
    assert (
        str(error)
        == f"registry {registry.host}: wants digest, negotiate authentication, which is not supported"
    )


@pytest.mark.parametrize("realm", ["", "not a url", "ftp://x/token", "http://[::1", "/token"])
def test_an_unusable_token_server_is_refused(start: StartRegistry, realm: str) -> None:
    registry = start()
    image = put_image(registry)
    registry.fault(Status(status=401, headers={"WWW-Authenticate": f'Bearer realm="{realm}"'}, count=-1))
    error = failure(
        registry, AuthenticationFailed, lambda: run(registry, lambda client: pull(client, registry, image))
    )
    assert str(error) == f"token for {registry.host}: the registry names no usable token server"


def test_a_password_is_not_sent_from_https_to_a_plain_token_server(
    start: StartRegistry, certificate: Certificate
) -> None:
    registry, plain = start(auth=Basic(), certificate=certificate), start()
    image = put_image(registry)
    realm = f'Bearer realm="{plain.url}/token"'
    registry.fault(Status(status=401, headers={"WWW-Authenticate": realm}, count=-1))
    error = failure(
        registry, AuthenticationFailed, lambda: run(registry, lambda client: pull(client, registry, image))
    )
    assert str(error) == f"token for {registry.host}: token server {plain.host} is plain http"
    assert plain.requests == []


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"not json",
        b"[]",
        b"{}",
        b'{"token":""}',
        b'{"token":5}',
        b'{"token":"a\\r\\nb"}',
        b'{"token":"\xc3\xa4"}',
    ],
)
def test_an_answer_without_a_token_is_refused(start: StartRegistry, answer: bytes) -> None:
    registry = start(auth=Bearer())
    image = put_image(registry)
    registry.fault(Status(path="/token", status=200, body=answer, count=-1))
    error = failure(
        registry, AuthenticationFailed, lambda: run(registry, lambda client: pull(client, registry, image))
    )
    assert "holds no token" in str(error)


def test_an_endless_answer_for_a_token_is_cut_off(start: StartRegistry) -> None:
    registry = start(auth=Bearer())
    image = put_image(registry)
    body = json.dumps({"token": "x" * (1 << 20)}).encode()
    registry.fault(Status(path="/token", status=200, body=body, count=-1))
    error = failure(
        registry, RegistryRefused, lambda: run(registry, lambda client: pull(client, registry, image))
    )
    assert "sends more than 262144 bytes" in str(error)


@pytest.mark.parametrize("lifetime", ["0", "-5", '"60"', "true", "null"])
def test_an_odd_lifetime_means_the_default(start: StartRegistry, lifetime: str) -> None:
    registry = start(auth=Bearer())
    image = put_image(registry)
    # Good for nothing at this registry, so that each call is refused; the token itself is taken as usable.
    registry.fault(
        Status(path="/token", status=200, body=b'{"token":"t","expires_in":%s}' % lifetime.encode(), count=-1)
    )
    failure(
        registry, AuthenticationFailed, lambda: run(registry, lambda client: pull(client, registry, image))
    )
    assert registry.count(server="token") == 2


@pytest.mark.parametrize("fault", [Status(path="/token", status=503), Drop(path="/token")])
def test_a_token_server_that_recovers_is_asked_again(start: StartRegistry, fault: Status | Drop) -> None:
    registry = start(auth=Bearer())
    image = put_image(registry)
    fault = registry.fault(type(fault)(path="/token"))
    assert run(registry, lambda client: pull(client, registry, image)) == LAYER
    assert fault.hits == 1


def test_a_token_server_that_is_down_is_named(start: StartRegistry) -> None:
    registry = start(auth=Bearer())
    image = put_image(registry)
    registry.fault(Status(path="/token", status=502, count=-1))
    error = failure(
        registry, RegistryUnavailable, lambda: run(registry, lambda client: pull(client, registry, image))
    )
    assert str(error).startswith(f"token for {registry.host}: 127.0.0.1:")
    assert str(error).endswith("answered 502 INJECTED")


def test_a_token_server_without_a_page_is_no_missing_image(start: StartRegistry) -> None:
    registry = start(auth=Bearer())
    image = put_image(registry)
    registry.fault(Status(path="/token", status=404, count=-1))
    failure(
        registry, AuthenticationFailed, lambda: run(registry, lambda client: pull(client, registry, image))
    )


def test_a_silent_token_server_is_a_timeout(start: StartRegistry) -> None:
    registry = start(auth=Bearer())
    image = put_image(registry)
    registry.fault(Stall(path="/token", count=-1))
    started = time.monotonic()
    failure(
        registry,
        RegistryTimeout,
        lambda: run(registry, lambda client: pull(client, registry, image), timeouts=IMPATIENT, retry=ONCE),
    )
    assert time.monotonic() - started < 30
