"""ECR: names, tokens from a simulated AWS by the real botocore, and renewal long before the end."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from snapshotter.errors import AuthenticationFailed
from snapshotter.registry import ecrtoken
from snapshotter.registry.client import RegistryClient
from snapshotter.registry.ecr import EcrKeychain, is_available
from snapshotter.registry.ecrnames import EcrRegistry, parse_host
from snapshotter.registry.keychain import Credentials
from tests.conftest import ExpectedLogs
from tests.registry.conftest import StartRegistry
from tests.support.ecr import Aws
from tests.support.registry_clients import run

HOST = "123456789012.dkr.ecr.eu-west-1.amazonaws.com"
PUBLIC = "public.ecr.aws"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        (HOST, EcrRegistry("eu-west-1", "123456789012")),
        ("123456789012.dkr.ecr.us-gov-west-1.amazonaws.com", EcrRegistry("us-gov-west-1", "123456789012")),
        ("123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn", EcrRegistry("cn-north-1", "123456789012")),
        ("123456789012.dkr.ecr.eusc-de-east-1.amazonaws.eu", EcrRegistry("eusc-de-east-1", "123456789012")),
        ("123456789012.dkr.ecr.us-iso-east-1.c2s.ic.gov", EcrRegistry("us-iso-east-1", "123456789012")),
        ("123456789012.dkr.ecr.us-isob-east-1.sc2s.sgov.gov", EcrRegistry("us-isob-east-1", "123456789012")),
        ("123456789012.dkr.ecr.eu-isoe-west-1.cloud.adc-e.uk", EcrRegistry("eu-isoe-west-1", "123456789012")),
        (
            "123456789012.dkr.ecr.us-isof-south-1.csp.hci.ic.gov",
            EcrRegistry("us-isof-south-1", "123456789012"),
        ),
        (
            "123456789012.dkr.ecr-fips.us-east-1.amazonaws.com",
            EcrRegistry("us-east-1", "123456789012", fips=True),
        ),
        ("123456789012.dkr-ecr.us-east-1.on.aws", EcrRegistry("us-east-1", "123456789012", dual_stack=True)),
        (
            "123456789012.dkr-ecr-fips.us-east-1.on.aws",
            EcrRegistry("us-east-1", "123456789012", fips=True, dual_stack=True),
        ),
        (
            "123456789012.dkr-ecr.cn-north-1.on.amazonwebservices.com.cn",
            EcrRegistry("cn-north-1", "123456789012", dual_stack=True),
        ),
        (PUBLIC, EcrRegistry("us-east-1")),
        ("123456789012.dkr.ecr.eu-west-1.amazonaws.com.evil.example", None),
        ("123456789012.dkr.ecr.eu-west-1.on.aws", None),
        ("12345.dkr.ecr.eu-west-1.amazonaws.com", None),
        ("x123456789012.dkr.ecr.eu-west-1.amazonaws.com", None),
        ("docker.io", None),
    ],
)
def test_names(host: str, expected: EcrRegistry | None) -> None:
    assert parse_host(host) == expected


def test_names_choose_the_endpoint() -> None:
    options = ecrtoken.client_options(EcrRegistry("us-east-1", "1", fips=True, dual_stack=True))
    assert options["use_fips_endpoint"]
    assert options["use_dualstack_endpoint"]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Aws, str], None]:
    def use_source(aws: Aws, source: str) -> None:
        for name, value in aws.environ(source, tmp_path).items():
            monkeypatch.setenv(name, value)

    return use_source


@pytest.mark.parametrize("source", ["environment", "profile", "web identity", "container", "instance"])
def test_every_source_of_credentials_gives_a_token(use: Callable[[Aws, str], None], source: str) -> None:
    assert is_available()
    with Aws() as aws:
        use(aws, source)
        found = trio.run(EcrKeychain(timeout=60.0).lookup, HOST)
        assert found is not None
        assert found.username == "AWS"
        assert found.secret in aws.registry.secrets
        assert aws.sources == [source]
        assert aws.services == ["private"]


def test_public_ecr_has_a_service_of_its_own_and_needs_no_credentials(
    use: Callable[[Aws, str], None],
) -> None:
    with Aws() as aws:
        use(aws, "nothing")
        assert trio.run(EcrKeychain(timeout=60.0).lookup, PUBLIC) is None
        use(aws, "environment")
        assert trio.run(EcrKeychain(timeout=60.0).lookup, PUBLIC) is not None
        assert aws.services == ["public"]


def test_what_goes_wrong_is_said_without_what_was_answered(
    use: Callable[[Aws, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with Aws() as aws:
        use(aws, "environment")
        aws.broken = True
        ecrtoken.main([HOST])
        assert capsys.readouterr().out == (
            '{"error": "failed", "message": "ecr in eu-west-1 answered AccessDeniedException"}'
        )
    ecrtoken.main(["r.example"])
    assert "is not a host of ECR" in capsys.readouterr().out


def scripted(tmp_path: Path, body: str) -> EcrKeychain:
    """Return a keychain with a helper of the test's own."""
    script = tmp_path / "helper.py"
    script.write_text(
        f"import json, sys, time, os, pathlib\nhere = pathlib.Path({str(tmp_path)!r})\n{body}\n"
    )
    return EcrKeychain(command=[sys.executable, "-S", str(script)], timeout=60.0)


COUNTING = """
count = here / "count"
number = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(number))
if (here / "broken").exists():
    print(json.dumps({"error": "failed", "message": "no luck"}))
else:
    life = float((here / "life").read_text())
    print(json.dumps({"username": "AWS", "secret": f"t{number}", "expires_at": time.time() + life}))
"""


def life(tmp_path: Path, seconds: float) -> None:
    (tmp_path / "life").write_text(str(seconds))


def test_a_token_is_kept_asked_for_once_and_replaced_when_refused(tmp_path: Path) -> None:
    life(tmp_path, 1000)
    keychain = scripted(tmp_path, COUNTING)

    async def main() -> None:
        found: list[Credentials | None] = []

        async def look() -> None:
            found.append(await keychain.lookup(HOST))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(look)
        first = Credentials("AWS", "t1")
        assert found == [first] * 5
        assert await keychain.lookup(HOST, refused=[first]) == Credentials("AWS", "t2")
        assert await keychain.lookup(HOST) == Credentials("AWS", "t2")
        assert await keychain.lookup("docker.io") is None
        life(tmp_path, -1)
        assert await keychain.lookup(HOST, refused=[Credentials("AWS", "t2")]) == Credentials("AWS", "t3")
        assert await keychain.lookup(HOST) == Credentials("AWS", "t4"), "one that is over is not used"

    trio.run(main)


def test_a_token_is_renewed_at_a_third_of_its_life(tmp_path: Path) -> None:
    life(tmp_path, 6.0)
    keychain = scripted(tmp_path, COUNTING)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keychain.run)
            await keychain.lookup(HOST)
            life(tmp_path, 1000.0)
            with trio.fail_after(60):
                while dict(keychain.states())[HOST].renewals == 0:
                    await trio.sleep(0.02)
            state = dict(keychain.states())[HOST]
            assert state.failures == 0
            assert state.expires_at - time.time() > 100
            assert await keychain.lookup(HOST) == Credentials("AWS", "t2")
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_renewal_that_fails_is_counted_while_the_token_lives(
    tmp_path: Path, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("an ECR token cannot be renewed")
    life(tmp_path, 600.0)
    keychain = scripted(tmp_path, COUNTING)

    async def main() -> None:
        await keychain.lookup(HOST)
        (tmp_path / "broken").touch()
        keychain._tokens[HOST].due = 0.0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keychain.run)
            with trio.fail_after(60):
                while dict(keychain.states())[HOST].failures == 0:
                    await trio.sleep(0.02)
            assert await keychain.lookup(HOST) == Credentials("AWS", "t1")
            assert keychain._tokens[HOST].due > trio.current_time() + 20
            (tmp_path / "broken").unlink()
            keychain._tokens[HOST].due = 0.0
            keychain._changed.set()
            with trio.fail_after(60):
                while dict(keychain.states())[HOST].renewals == 0:
                    await trio.sleep(0.02)
            state = dict(keychain.states())[HOST]
            assert (state.failures, state.failing) == (1, 0)
            nursery.cancel_scope.cancel()

    trio.run(main)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("print('garbage')", "is not understood"),
        ("print('[]')", "is not understood"),
        ("sys.exit(3)", "exit status 3"),
        ("print(json.dumps({'username': 'AWS'}))", "is not understood"),
        ("print(json.dumps({'error': 'none', 'message': 'no AWS credentials'}))", "no AWS credentials"),
    ],
)
def test_a_helper_that_does_not_answer_well_is_named(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(AuthenticationFailed, match=message):
        trio.run(scripted(tmp_path, body).lookup, HOST)


def test_a_helper_that_hangs_is_ended(tmp_path: Path) -> None:
    script = tmp_path / "helper.py"
    script.write_text("import time\ntime.sleep(600)\n")
    keychain = EcrKeychain(command=[sys.executable, str(script)], timeout=0.5)
    with pytest.raises(AuthenticationFailed, match=r"no answer for .* within 0\.5 s"):
        trio.run(keychain.lookup, HOST)


def test_a_registry_whose_tokens_expire_goes_on(
    start: StartRegistry, use: Callable[[Aws, str], None]
) -> None:
    with Aws(ttl=0.5) as aws:
        use(aws, "environment")
        registry = start(auth=aws.registry, presigned_ttl=0.3)
        digest = registry.add_blob(b"data")

        class Local(EcrKeychain):
            """ECR by its name, at the test's address."""

            async def _fetch(self, host: str, registry: EcrRegistry) -> object:  # type: ignore[override]
                return self._keep(
                    host, Credentials("AWS", aws.registry.issue(aws.ttl)), time.time() + aws.ttl
                )

        async def work(client: RegistryClient) -> None:
            for _ in range(8):
                assert await client.blob(registry.reference("app"), digest, max_size=10) == b"data"
                await trio.sleep(0.2)

        run(registry, work, keychain=Local(parse=lambda _: EcrRegistry("eu-west-1", "1")))
        assert len(aws.registry.issued) >= 3
