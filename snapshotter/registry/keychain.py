"""Keychains: credentials by registry host, from where the user keeps them for Docker and containerd.

Concurrency: one trio thread; nothing is kept between two lookups, so a rotated password is seen at the next
one. Deliberately not here: caching, which belongs to whoever knows when credentials were refused.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from snapshotter.errors import AuthenticationFailed
from snapshotter.registry.programs import run_program

IDENTITY_TOKEN_USER: Final = "<token>"
HELPER_TIMEOUT: Final = 20.0
"""Seconds for a credential helper. Out of the air; ECR's asks AWS for a token and needs one or two."""

_DOCKER_HUB_KEY: Final = "https://index.docker.io/v1/"
_DOCKER_HUB: Final = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})
_HELPER: Final = re.compile("[A-Za-z0-9._-]+")
_HELPER_FOUND_NOTHING: Final = (b"credentials not found", b"no credentials server url")


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user name and its secret; the name `<token>` says that the secret is an identity token."""

    username: str
    secret: str = field(repr=False)


class Keychain(Protocol):
    """Where credentials come from."""

    async def lookup(
        self, host: str, repository: str = "", *, refused: Collection[Credentials] = ()
    ) -> Credentials | None:
        """Return the credentials for `repository` at the registry `host` (`docker.io`, `r.example:5000`), or None.

        `refused` did not get in just now: whoever can get others does. Raises AuthenticationFailed when there
        is an answer but it cannot be read.
        """


class StaticKeychain:
    """Credentials that are given once, by registry host."""

    def __init__(self, credentials: Mapping[str, Credentials]) -> None:
        self._credentials = dict(credentials)

    async def lookup(
        self,
        host: str,
        repository: str = "",  # noqa: ARG002
        *,
        refused: Collection[Credentials] = (),  # noqa: ARG002
    ) -> Credentials | None:
        """Return the credentials given for `host`."""
        return self._credentials.get(host)


class DockerConfigKeychain:
    """Docker's config.json: a helper for this host, else a helper for all, else the file itself.

    `path` defaults to `$DOCKER_CONFIG/config.json`, else `~/.docker/config.json`; no file, no credentials.
    """

    def __init__(self, path: Path | None = None, *, helper_timeout: float = HELPER_TIMEOUT) -> None:
        self._path = path
        self._helper_timeout = helper_timeout

    async def lookup(
        self,
        host: str,
        repository: str = "",  # noqa: ARG002
        *,
        refused: Collection[Credentials] = (),  # noqa: ARG002
    ) -> Credentials | None:
        """Return what the file, or the credential helper it names, knows about `host`.

        Raises AuthenticationFailed naming the file or the helper that cannot be used.
        """
        path = _default_path() if self._path is None else self._path
        config = _load(path)
        helpers = _member(config, "credHelpers", dict, path)
        failure: AuthenticationFailed | None = None
        for name in (entry_for(helpers, host), config.get("credsStore")):
            if name:
                try:
                    credentials = await self._ask(name, host, path)
                except AuthenticationFailed as error:
                    failure = failure or error
                    continue
                if credentials is not None:
                    return credentials
        entry = entry_for(_member(config, "auths", dict, path), host)
        found = None if entry is None else from_entry(entry, host, f"docker config {path}")
        if found is None and failure is not None:
            raise failure
        return found

    async def _ask(self, name: object, host: str, path: Path) -> Credentials | None:
        """Run `docker-credential-<name> get`."""
        if not isinstance(name, str) or _HELPER.fullmatch(name) is None:
            raise AuthenticationFailed(
                f"docker config {path}: {name!r} is not the name of a credential helper"
            )
        helper = f"docker-credential-{name}"
        server = _DOCKER_HUB_KEY if host in _DOCKER_HUB else host
        done = await run_program(
            [helper, "get"],
            what=f"credential helper {helper}",
            about=host,
            timeout=self._helper_timeout,
            stdin=server.encode(),
        )
        return _from_helper(helper, host, done)


def _from_helper(helper: str, host: str, done: subprocess.CompletedProcess[bytes]) -> Credentials | None:
    """Return the credentials in a helper's output. What it printed is never shown: it may be the secret."""
    if done.returncode != 0:
        said = done.stdout.lower()
        if any(text in said for text in _HELPER_FOUND_NOTHING):
            return None
        raise AuthenticationFailed(f"credential helper {helper}: exit status {done.returncode} for {host}")
    try:
        answer = json.loads(done.stdout)
        username, secret = answer["Username"], answer["Secret"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise AuthenticationFailed(
            f"credential helper {helper}: its answer for {host} is not understood"
        ) from None
    if not isinstance(username, str) or not isinstance(secret, str):
        raise AuthenticationFailed(f"credential helper {helper}: its answer for {host} is not text")
    return Credentials(username, secret) if username or secret else None


def from_entry(entry: object, host: str, source: str) -> Credentials | None:
    """Return the credentials in one member of `auths`; None for the empty entries that helpers leave there."""
    where = f"{source}: auths entry of {host}"
    if not isinstance(entry, dict):
        raise AuthenticationFailed(f"{where}: not an object")
    identity, encoded = entry.get("identitytoken"), entry.get("auth")
    if isinstance(identity, str) and identity:
        return Credentials(IDENTITY_TOKEN_USER, identity)
    if isinstance(encoded, str) and encoded:
        try:
            username, colon, secret = base64.b64decode(encoded, validate=True).decode().partition(":")
        except ValueError:  # not ASCII, not base64, or not UTF-8 in it
            colon = ""
        if not colon:
            raise AuthenticationFailed(f"{where}: `auth` is not base64 of user:password") from None
        return Credentials(username, secret.rstrip("\0"))
    name, password = entry.get("username"), entry.get("password")
    if isinstance(name, str) and isinstance(password, str) and name:
        return Credentials(name, password)
    return None


def entry_for(entries: Mapping[str, Any], host: str) -> Any | None:
    """Return the entry for the registry `host`: by its own name first, then by the ways in which Docker writes it."""
    if host in entries:
        return entries[host]
    names = _DOCKER_HUB if host in _DOCKER_HUB else frozenset({host})
    return next((entry for key, entry in entries.items() if _host_of(key) in names), None)


def _host_of(key: str) -> str:
    """Return the host that a key means; keys of a path below a host mean none."""
    host, _, path = key.removeprefix("https://").removeprefix("http://").partition("/")
    return host if path.strip("/") in {"", "v1", "v2"} else ""


def _default_path() -> Path:
    directory = os.environ.get("DOCKER_CONFIG")
    return (Path(directory) if directory else Path.home() / ".docker") / "config.json"


def _load(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise AuthenticationFailed(f"docker config {path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise AuthenticationFailed(f"docker config {path}: not JSON") from None
    if not isinstance(config, dict):
        raise AuthenticationFailed(f"docker config {path}: not a JSON object")
    return config


def _member(config: Mapping[str, Any], key: str, kind: type[dict[str, Any]], path: Path) -> dict[str, Any]:
    value = config.get(key)
    if value is not None and not isinstance(value, kind):
        raise AuthenticationFailed(f"docker config {path}: {key} is not an object")
    return value or {}
