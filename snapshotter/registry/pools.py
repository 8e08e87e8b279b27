"""urllib3's connection pools: one for what is reached directly, one for each proxy that the environment names.

The API client goes by the same variables (`HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY`, `NO_PROXY`, in either case),
for httpx reads them itself: a host that needs a proxy for its manifests needs it for its ranges.

Hosts that are trusted in different ways have pools of their own.

Concurrency: any number of threads; the environment is read once.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies_environment, proxy_bypass

import urllib3
from urllib3.exceptions import LocationValueError

from snapshotter.registry.tls import SYSTEM, Trust, client_context

HOSTS: Final = 64
"""Hosts whose idle connections are kept, per pool. A machine pulls from a handful."""


class Pools:
    """Finds the pool for a URL. `connections` idle ones are kept per host; `ca_file` is trusted everywhere."""

    def __init__(self, *, connections: int, ca_file: Path | None) -> None:
        self._connections = connections
        self._ca_file = ca_file
        self._lock = threading.Lock()
        self._by_trust = {SYSTEM: _Pools(connections, SYSTEM, ca_file)}

    def find(self, url: str, trust: Trust = SYSTEM) -> urllib3.PoolManager:
        """Return the pool by which `url` is to be reached.

        Raises LocationValueError, as the pool would, and ConfigError for files that cannot be used.
        """
        with self._lock:
            pools = self._by_trust.get(trust)
            if pools is None:
                pools = self._by_trust[trust] = _Pools(self._connections, trust, self._ca_file)
        return pools.find(url)

    def clear(self) -> None:
        """Close every idle connection."""
        with self._lock:
            for pools in self._by_trust.values():
                pools.clear()


class _Pools:
    """The pools of one trust."""

    def __init__(self, connections: int, trust: Trust, ca_file: Path | None) -> None:
        self._proxies: dict[str, str] = getproxies_environment()
        options: dict[str, Any] = {
            "num_pools": HOSTS,
            "maxsize": connections,
            "ssl_context": client_context(trust, ca_file),
        }
        if trust.skip_verify:
            options |= {"cert_reqs": "CERT_NONE", "assert_hostname": False}
        self._direct = urllib3.PoolManager(**options)
        self._proxied = {
            scheme: urllib3.ProxyManager(_with_scheme(proxy), proxy_headers=_credentials(proxy), **options)
            for scheme, proxy in self._proxies.items()
            if scheme in {"http", "https", "all"}
        }

    def find(self, url: str) -> urllib3.PoolManager:
        """Return the pool by which `url` is to be reached. Raises LocationValueError."""
        try:
            parts = urlsplit(url)
        except ValueError:
            raise LocationValueError("not a URL") from None
        pool = self._proxied.get(parts.scheme) or self._proxied.get("all")
        if pool is None or proxy_bypass(parts.netloc.rpartition("@")[2], self._proxies):
            return self._direct
        return pool

    def clear(self) -> None:
        """Close every idle connection."""
        for pool in (self._direct, *self._proxied.values()):
            pool.clear()


def _with_scheme(proxy: str) -> str:
    return proxy if "://" in proxy else f"http://{proxy}"


def _credentials(proxy: str) -> dict[str, str]:
    parts = urlsplit(_with_scheme(proxy))
    if parts.username is None:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return dict(urllib3.make_headers(proxy_basic_auth=pair))
