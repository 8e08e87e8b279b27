"""urllib3's connection pools: one for what is reached directly, one for each proxy that the environment names.

The API client goes by the same variables (`HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY`, `NO_PROXY`, in either case),
for httpx reads them itself: a host that needs a proxy for its manifests needs it for its ranges.

Concurrency: any number of threads; the environment is read once.
"""

from __future__ import annotations

import ssl
from typing import Any, Final
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies_environment, proxy_bypass

import urllib3
from urllib3.exceptions import LocationValueError

HOSTS: Final = 64
"""Hosts whose idle connections are kept, per pool. A machine pulls from a handful."""


class Pools:
    """Finds the pool for a URL. `connections` idle ones are kept per host."""

    def __init__(self, *, connections: int, context: ssl.SSLContext) -> None:
        self._proxies: dict[str, str] = getproxies_environment()
        options: dict[str, Any] = {"num_pools": HOSTS, "maxsize": connections, "ssl_context": context}
        self._direct = urllib3.PoolManager(**options)
        self._proxied = {
            scheme: urllib3.ProxyManager(_with_scheme(proxy), proxy_headers=_credentials(proxy), **options)
            for scheme, proxy in self._proxies.items()
            if scheme in {"http", "https", "all"}
        }

    def find(self, url: str) -> urllib3.PoolManager:
        """Return the pool by which `url` is to be reached. Raises LocationValueError, as the pool would."""
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
