"""Keychains: what each knows, docker's config.json in all its spellings, and real helper programs."""

import base64
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from snapshotter.errors import AuthenticationFailed
from snapshotter.registry.keychain import (
    Credentials,
    DockerConfigKeychain,
    Keychain,
)
from tests.support.process import is_alive, wait_until

ALICE = Credentials("alice", "s3cret-word")
WriteHelper = Callable[[str, str], None]


def lookup(keychain: Keychain, host: str) -> Credentials | None:
    return trio.run(keychain.lookup, host)


def entry(username: str, secret: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{username}:{secret}".encode()).decode()}


def write(path: Path, config: object, helper_timeout: float = 60.0) -> DockerConfigKeychain:
    path.parent.mkdir(exist_ok=True)
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return DockerConfigKeychain(path, helper_timeout=helper_timeout)


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteHelper:
    """Write `docker-credential-<name>` with a shell script as its body, into PATH."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")

    def write_helper(name: str, body: str) -> None:
        script = directory / f"docker-credential-{name}"
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o755)

    return write_helper


def test_credentials_do_not_show_their_secret() -> None:
    assert repr(ALICE) == "Credentials(username='alice')"


@pytest.mark.parametrize(
    ("key", "host"),
    [
        ("r.example", "r.example"),
        ("r.example:5000", "r.example:5000"),
        ("https://r.example", "r.example"),
        ("http://r.example/", "r.example"),
        ("https://r.example/v1/", "r.example"),
        ("https://r.example/v2", "r.example"),
        ("https://index.docker.io/v1/", "docker.io"),
        ("docker.io", "docker.io"),
        ("index.docker.io", "docker.io"),
        ("registry-1.docker.io", "docker.io"),
    ],
)
def test_every_spelling_of_a_host_is_found(docker_config: Path, key: str, host: str) -> None:
    keychain = write(
        docker_config, {"auths": {"other.example": entry("x", "y"), key: entry("alice", "s3cret-word")}}
    )
    assert lookup(keychain, host) == ALICE


@pytest.mark.parametrize("key", ["r.example:5000", "r.example/team", "sub.r.example", "r.example.org", ""])
def test_another_host_is_not_found(docker_config: Path, key: str) -> None:
    assert lookup(write(docker_config, {"auths": {key: entry("alice", "x")}}), "r.example") is None


def test_the_exact_name_wins_over_another_spelling(docker_config: Path) -> None:
    auths = {"https://r.example": entry("bob", "x"), "r.example": entry("alice", "s3cret-word")}
    assert lookup(write(docker_config, {"auths": auths}), "r.example") == ALICE


@pytest.mark.parametrize(
    ("value", "credentials"),
    [
        (entry("alice", "a:b:c"), Credentials("alice", "a:b:c")),
        (entry("alice", "padded\0\0"), Credentials("alice", "padded")),
        ({"username": "alice", "password": "pw"}, Credentials("alice", "pw")),
        (entry("x", "y") | {"identitytoken": "tok"}, Credentials("<token>", "tok")),
        ({}, None),
        ({"auth": ""}, None),
        ({"username": "alice"}, None),
    ],
)
def test_the_forms_of_an_entry(
    docker_config: Path, value: dict[str, str], credentials: Credentials | None
) -> None:
    assert lookup(write(docker_config, {"auths": {"r.example": value}}), "r.example") == credentials


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{ not json s3cret", "not JSON"),
        ("[]", "not a JSON object"),
        ({"auths": []}, "auths is not an object"),
        ({"credHelpers": "x"}, "credHelpers is not an object"),
        ({"auths": {"r.example": "s3cret"}}, "auths entry of r.example: not an object"),
        ({"auths": {"r.example": {"auth": "s3cret!"}}}, "`auth` is not base64 of user:password"),
        ({"auths": {"r.example": {"auth": "czNjcmV0"}}}, "`auth` is not base64 of user:password"),
        ({"auths": {"r.example": {"auth": "/////w=="}}}, "`auth` is not base64 of user:password"),
        ({"auths": {"r.example": {"auth": "\u044fw"}}}, "`auth` is not base64 of user:password"),
        ({"credsStore": "../../bin/sh"}, "is not the name of a credential helper"),
        ({"credsStore": 5}, "is not the name of a credential helper"),
    ],
)
def test_a_broken_config_is_named_and_not_shown(docker_config: Path, config: Any, said: str) -> None:
    with pytest.raises(AuthenticationFailed, match=said) as caught:
        lookup(write(docker_config, config), "r.example")
    assert str(docker_config) in str(caught.value)
    assert "czNjcmV0" not in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_no_file_no_credentials(tmp_path: Path) -> None:
    assert lookup(DockerConfigKeychain(tmp_path / "absent.json"), "r.example") is None
    (tmp_path / "file").write_text("")
    assert lookup(DockerConfigKeychain(tmp_path / "file" / "config.json"), "r.example") is None


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        AuthenticationFailed, match=f"docker config {tmp_path}: cannot be read: Is a directory"
    ):
        lookup(DockerConfigKeychain(tmp_path), "r.example")


def test_the_default_place_is_dockers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DOCKER_CONFIG", raising=False)
    write(tmp_path / ".docker" / "config.json", {"auths": {"r.example": entry("home", "x")}})
    write(tmp_path / "elsewhere" / "config.json", {"auths": {"r.example": entry("elsewhere", "x")}})
    assert lookup(DockerConfigKeychain(), "r.example") == Credentials("home", "x")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "elsewhere"))
    assert lookup(DockerConfigKeychain(), "r.example") == Credentials("elsewhere", "x")


def test_a_rotated_password_is_seen_at_the_next_lookup(docker_config: Path) -> None:
    keychain = write(docker_config, {"auths": {"r.example": entry("alice", "old")}})
    assert lookup(keychain, "r.example") == Credentials("alice", "old")
    write(docker_config, {"auths": {"r.example": entry("alice", "new")}})
    assert lookup(keychain, "r.example") == Credentials("alice", "new")


def test_a_helper_is_asked_for_the_host(docker_config: Path, helper: WriteHelper) -> None:
    helper(
        "ours", 'read host; printf \'{"ServerURL":"x","Username":"%s","Secret":"%s"}\' "$1-$host" s3cret-word'
    )
    keychain = write(
        docker_config, {"credHelpers": {"r.example": "ours"}, "auths": {"r.example": entry("bob", "x")}}
    )
    assert lookup(keychain, "r.example") == Credentials("get-r.example", "s3cret-word")
    assert lookup(keychain, "other.example") is None


def test_docker_hub_is_asked_for_by_its_old_name(docker_config: Path, helper: WriteHelper) -> None:
    helper("store", 'read host; printf \'{"Username":"%s","Secret":"x"}\' "$host"')
    assert lookup(write(docker_config, {"credsStore": "store"}), "docker.io") == Credentials(
        "https://index.docker.io/v1/", "x"
    )


def test_a_helper_that_knows_nothing_leaves_it_to_the_next(docker_config: Path, helper: WriteHelper) -> None:
    helper("ours", "echo credentials not found in native keychain; exit 1")
    helper("store", 'echo \'{"Username":"","Secret":""}\'')
    config = {
        "credHelpers": {"r.example": "ours"},
        "credsStore": "store",
        "auths": {"r.example": entry("alice", "x")},
    }
    assert lookup(write(docker_config, config), "r.example") == Credentials("alice", "x")


def test_a_helper_may_give_an_identity_token(docker_config: Path, helper: WriteHelper) -> None:
    helper("store", 'echo \'{"Username":"<token>","Secret":"tok"}\'')
    assert lookup(write(docker_config, {"credsStore": "store"}), "r.example") == Credentials("<token>", "tok")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("echo s3cret-word; echo s3cret-word >&2; exit 7", "exit status 7 for r.example"),
        ("echo s3cret-word", "its answer for r.example is not understood"),
        ("echo '[\"s3cret-word\"]'", "is not understood"),
        ('echo \'{"Username":"s3cret-word"}\'', "is not understood"),
        ('echo \'{"Username":"a","Secret":["s3cret-word"]}\'', "is not text"),
        ("head -c 300000 /dev/zero | tr '\\0' '['", "is not understood"),
        ("kill -9 $$", "exit status -9"),
    ],
)
def test_a_broken_helper_is_named_and_what_it_printed_is_not_shown(
    docker_config: Path, helper: WriteHelper, body: str, said: str
) -> None:
    helper("broken", body)
    with pytest.raises(
        AuthenticationFailed, match=f"credential helper docker-credential-broken: .*{said}"
    ) as caught:
        lookup(write(docker_config, {"credsStore": "broken"}), "r.example")
    assert "s3cret-word" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_missing_helper_is_named(docker_config: Path) -> None:
    with pytest.raises(AuthenticationFailed, match="docker-credential-absent: cannot be run: No such file"):
        lookup(write(docker_config, {"credsStore": "absent"}), "r.example")


def test_a_helper_that_hangs_is_ended_with_its_children(
    docker_config: Path, helper: WriteHelper, tmp_path: Path
) -> None:
    helper("hanging", f"trap '' TERM; sleep 60 & echo $! > {tmp_path}/child; wait")
    started = time.monotonic()
    with pytest.raises(
        AuthenticationFailed, match=r"docker-credential-hanging: no answer for r\.example within 2 s"
    ):
        lookup(write(docker_config, {"credsStore": "hanging"}, helper_timeout=2.0), "r.example")
    assert time.monotonic() - started < 30
    child = int((tmp_path / "child").read_text())
    # Adopted by init, which may take a moment to reap it; the kernel too takes one on a busy machine.
    wait_until(lambda: not is_alive(child), timeout=60, what="end of the helper's child")
