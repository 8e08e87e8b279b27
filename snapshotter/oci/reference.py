"""Image references: the names that people and containerd use, in one normal form."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, replace
from typing import Final

from snapshotter.errors import UsageError
from snapshotter.units import Digest, parse_digest

DEFAULT_REGISTRY: Final = "docker.io"
DEFAULT_TAG: Final = "latest"
MAX_NAME_LENGTH: Final = 255

_LABEL = "(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_REGISTRY: Final = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:]+\])(?::[0-9]+)?")
_COMPONENT = "[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_REPOSITORY: Final = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG: Final = re.compile("[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_BARE_HEX: Final = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Reference:
    """A manifest, or the repository of a blob, in a registry. With a digest, the digest decides."""

    registry: str
    repository: str
    tag: str | None
    digest: Digest | None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Return the reference that `text` names, by Docker's rules of short names.

        `redis` is `docker.io/library/redis:latest`. Raises UsageError saying what is wrong with it.
        """
        name, at, digest_text = text.partition("@")
        slash = name.rfind("/")
        colon = name.rfind(":")
        tag = None
        if colon > slash:
            name, tag = name[:colon], name[colon + 1 :]
        registry, repository = _split_registry(name)
        if _BARE_HEX.fullmatch(name):
            raise UsageError(f"image reference {text!r}: 64 hex digits are an identifier, not a name")
        if _REGISTRY.fullmatch(registry) is None:
            raise UsageError(f"image reference {text!r}: {registry!r} is not a registry host")
        if _REPOSITORY.fullmatch(repository) is None:
            raise UsageError(
                f"image reference {text!r}: {repository!r} is not a repository name (lower case)"
            )
        if len(registry) + 1 + len(repository) > MAX_NAME_LENGTH:
            raise UsageError(f"image reference {text!r}: longer than {MAX_NAME_LENGTH} characters")
        if tag is not None and _TAG.fullmatch(tag) is None:
            raise UsageError(f"image reference {text!r}: {tag!r} is not a tag")
        if not at:
            return cls(registry, repository, tag or DEFAULT_TAG, None)
        try:
            return cls(registry, repository, tag, parse_digest(digest_text))
        except ValueError as error:
            raise UsageError(f"image reference {text!r}: {error}") from None

    @property
    def locator(self) -> str:
        """`registry/repository`, without tag and digest."""
        return f"{self.registry}/{self.repository}"

    def with_digest(self, digest: Digest) -> Reference:
        """Return this repository at `digest`; the tag is dropped, for it may name something else."""
        return replace(self, tag=None, digest=digest)

    def with_tag(self, tag: str) -> Reference:
        """Return this repository at `tag`, without a digest."""
        return replace(self, tag=tag, digest=None)

    def __str__(self) -> str:
        tag = "" if self.tag is None else f":{self.tag}"
        digest = "" if self.digest is None else f"@{self.digest}"
        return self.locator + tag + digest


def api_host(registry: str) -> str:
    """Return the host, with its port if any, that speaks the API of `registry`."""
    return "registry-1.docker.io" if registry == DEFAULT_REGISTRY else registry


def default_scheme(registry: str) -> str:
    """Return "http" for this machine's own loopback names, with or without a port; otherwise "https"."""
    host = registry[1:].partition("]")[0] if registry.startswith("[") else registry.partition(":")[0]
    if host == "localhost":
        return "http"
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    return "http" if loopback else "https"


def _split_registry(name: str) -> tuple[str, str]:
    """Split at the first slash where what stands before it looks like a host, not like a path."""
    first, slash, rest = name.partition("/")
    is_host = "." in first or ":" in first or first == "localhost" or first != first.lower()
    registry, repository = (first, rest) if slash and is_host else (DEFAULT_REGISTRY, name)
    if registry == "index.docker.io":
        registry = DEFAULT_REGISTRY
    if registry == DEFAULT_REGISTRY and "/" not in repository:
        repository = "library/" + repository
    return registry, repository
