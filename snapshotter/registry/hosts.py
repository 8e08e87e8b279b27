"""The hosts that stand for a registry: its mirrors, in the order in which they are asked, and at last itself.

Values and their sources; which of them is well at the moment is health.py's, and how one is asked session.py's.

Concurrency: values are frozen; a source of hosts belongs to one thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol
from urllib.parse import urlsplit

from snapshotter.oci.reference import api_host, default_scheme
from snapshotter.registry.tls import SYSTEM, Trust

PULL: Final = "pull"
"""Content by its digest, which tells when the host lies."""
RESOLVE: Final = "resolve"
"""What a tag names and what refers to an image: the host is believed."""
PUSH: Final = "push"
EVERYTHING: Final = frozenset({PULL, RESOLVE, PUSH})

API_PATH: Final = "/v2"
NO_LIMIT: Final = float("inf")


@dataclass(frozen=True, slots=True)
class Host:
    """One place where the API of a registry is spoken."""

    name: str
    """For messages, metrics and keychains: a registry by its own name, another host by `host:port`."""
    scheme: str
    authority: str
    """Host, and port if it is not the scheme's own."""
    path: str = API_PATH
    """What comes before the repository."""
    capabilities: frozenset[str] = EVERYTHING
    namespace: str = ""
    """The registry it stands for, which a mirror of many has to be told; "" for a registry itself."""
    headers: Mapping[str, str] = field(default_factory=dict, hash=False, repr=False)
    """Sent with every request to it, and to nobody else."""
    trust: Trust = SYSTEM
    timeout: float | None = None
    """Seconds for one whole request; None: as any."""
    connect_timeout: float | None = None


class Hosts(Protocol):
    """Where hosts come from."""

    def of(self, registry: str) -> tuple[Host, ...]:
        """Return the hosts of `registry`, the registry itself last; never empty."""


class OwnHosts:
    """Every registry stands for itself. `plain_http` True or False forces the scheme of all of them."""

    def __init__(self, *, plain_http: bool | None = None, trust: Trust = SYSTEM) -> None:
        self._plain_http = plain_http
        self._trust = trust

    def of(self, registry: str) -> tuple[Host, ...]:
        """Return the registry itself."""
        return (own_host(registry, plain_http=self._plain_http, trust=self._trust),)


def own_host(registry: str, *, plain_http: bool | None = None, trust: Trust = SYSTEM) -> Host:
    """Return the host that `registry` is by itself."""
    scheme = default_scheme(registry) if plain_http is None else "http" if plain_http else "https"
    return Host(registry, scheme, api_host(registry), trust=trust)


def named_host(
    registry: str, url: str, *, plain_http: bool, timeout: float | None, is_literal: bool = True
) -> Host:
    """Return the host that `url` (a URL, `host` or `host:port`) names for `registry`.

    A path in it is the API's, as it is if `is_literal`, else with `/v2` behind it. Raises ValueError.
    """
    own = own_host(registry)
    if "://" not in url:
        authority = url.partition("/")[0]
        scheme = own.scheme if authority == own.authority else default_scheme(authority)
        url = f"{scheme}://{url}"
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or "@" in parts.netloc:
        raise ValueError(f"{url!r} is not the URL of a host")
    _ = parts.port  # raises ValueError for one that is no number
    scheme = "http" if plain_http else parts.scheme
    path = parts.path.rstrip("/")
    if not is_literal and not path.endswith(API_PATH):
        path += API_PATH
    is_own = parts.netloc == own.authority
    return Host(
        registry if is_own else parts.netloc,
        scheme,
        parts.netloc,
        path or API_PATH,
        namespace="" if is_own else registry,
        timeout=timeout,
    )
