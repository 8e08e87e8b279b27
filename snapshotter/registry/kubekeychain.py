"""Credentials from a cluster's image pull secrets: listed, then watched, in all namespaces.

It owns what the secrets say, in memory only. While the API server is away, what was known stays known; the first
lookups wait a moment for the first list.

Concurrency: one trio run. Which pod an image is for is not known here: all secrets for its registry are tried.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

import httpx
import trio

from snapshotter.errors import AuthenticationFailed
from snapshotter.registry.keychain import Credentials, entry_for, from_entry
from snapshotter.registry.kubeconfig import Cluster, find_cluster
from snapshotter.registry.tls import USER_AGENT, silence_libraries
from snapshotter.registry.wire import abandon

_log = logging.getLogger(__name__)

FIRST_LIST: Final = 5.0
"""Seconds that a lookup waits for the first list."""
FIRST_WAIT: Final = 1.0
LONGEST_WAIT: Final = 60.0
WATCH_SECONDS: Final = 300
PAGE: Final = 500
MAX_EVENT: Final = 8 << 20
"""Bytes; etcd takes 1.5 MiB for an object."""
_TYPE: Final = "type=kubernetes.io/dockerconfigjson"


@dataclass(slots=True)
class KubeStatistics:
    """What the keychain knows."""

    secrets: int = 0
    failures: int = 0
    """Lists and watches that failed."""
    is_synced: bool = False


class KubeKeychain:
    """The pull secrets of the cluster that `path` (None: the usual places) names."""

    def __init__(self, path: Path | None) -> None:
        silence_libraries()
        self._path = path
        self._secrets: dict[str, Mapping[str, Any]] = {}
        """`auths` by namespace and name."""
        self._synced = trio.Event()
        self.statistics = KubeStatistics()

    async def lookup(
        self, host: str, repository: str = "", *, refused: Collection[Credentials] = ()
    ) -> Credentials | None:
        """Return what a secret has for the repository and was not refused; the most specific entry first.

        Raises AuthenticationFailed when the secrets were never read.
        """
        if not self._synced.is_set():
            with trio.move_on_after(FIRST_LIST):
                await self._synced.wait()
        if not self._synced.is_set():
            raise AuthenticationFailed("the cluster's pull secrets could not be read yet")
        found = sorted(self._matching(host, repository), key=lambda match: match[0], reverse=True)
        return next((credentials for _, credentials in found if credentials not in refused), None)

    async def run(self) -> None:
        """List and watch, until cancelled."""
        wait = FIRST_WAIT
        while True:
            try:
                cluster = await find_cluster(self._path)
                async with httpx.AsyncClient(
                    verify=cluster.context, timeout=httpx.Timeout(10.0), headers=_headers(cluster)
                ) as client:
                    url = f"{cluster.server}/api/v1/secrets"
                    version = await self._list(client, url)
                    wait = FIRST_WAIT
                    await self._watch(client, url, version)
            except (
                AuthenticationFailed,
                httpx.HTTPError,
                httpx.InvalidURL,
                ValueError,
                KeyError,
                TypeError,
            ) as error:
                self.statistics.failures += 1
                if wait == FIRST_WAIT:
                    # httpx's texts may show the URL, which holds nothing secret but says no more than the class.
                    reason = str(error) if isinstance(error, AuthenticationFailed) else type(error).__name__
                    _log.warning("pull secrets of the cluster cannot be read", extra={"error": reason})
                await trio.sleep(wait)
                wait = min(wait * 2, LONGEST_WAIT)

    async def _list(self, client: httpx.AsyncClient, url: str) -> str:
        """Take what there is; return the version from which to watch."""
        found: dict[str, Mapping[str, Any]] = {}
        following = ""
        while True:
            query = {"fieldSelector": _TYPE, "limit": str(PAGE), "continue": following}
            reply = await client.get(url, params=query)
            if reply.status_code != 200:
                raise AuthenticationFailed(
                    f"the API server answered {reply.status_code} to a list of secrets"
                )
            page = reply.json()
            for secret in page.get("items") or ():
                found[_name(secret)] = _auths(secret)
            following = page["metadata"].get("continue", "")
            if not following:
                break
        self._secrets = found
        self.statistics.secrets = len(found)
        self.statistics.is_synced = True
        self._synced.set()
        return str(page["metadata"]["resourceVersion"])

    async def _watch(self, client: httpx.AsyncClient, url: str, version: str) -> None:
        """Follow changes until the server wants a new list."""
        while True:
            query = {
                "fieldSelector": _TYPE,
                "watch": "true",
                "allowWatchBookmarks": "true",
                "resourceVersion": version,
                "timeoutSeconds": str(WATCH_SECONDS),
            }
            timeout = httpx.Timeout(10.0, read=WATCH_SECONDS + 10.0)
            before = trio.current_time()
            async with client.stream("GET", url, params=query, timeout=timeout) as reply:
                if reply.status_code != 200:
                    return
                raw = reply.aiter_raw()
                rest = b""
                try:
                    async for piece in raw:
                        *lines, rest = (rest + piece).split(b"\n")
                        if len(rest) > MAX_EVENT:
                            raise ValueError("an event without an end")
                        for line in lines:
                            event = json.loads(line)
                            if event["type"] == "ERROR":
                                return  # what we know is too old to go on from
                            version = str(event["object"]["metadata"]["resourceVersion"])
                            self._apply(event)
                finally:
                    await abandon(reply, raw)
            if trio.current_time() - before < FIRST_WAIT:
                await trio.sleep(FIRST_WAIT)

    def _apply(self, event: Mapping[str, Any]) -> None:
        secret = event["object"]
        if event["type"] in {"ADDED", "MODIFIED"}:
            self._secrets[_name(secret)] = _auths(secret)
        elif event["type"] == "DELETED":
            self._secrets.pop(_name(secret), None)
        self.statistics.secrets = len(self._secrets)

    def _matching(self, host: str, repository: str) -> Iterator[tuple[int, Credentials]]:
        for name, auths in self._secrets.items():
            for key, entry in auths.items():
                if not _matches(key, host, repository):
                    continue
                try:
                    credentials = from_entry(entry, host, f"secret {name}")
                except AuthenticationFailed:
                    continue  # one of many: the others may do
                if credentials is not None:
                    yield len(key), credentials


def _headers(cluster: Cluster) -> dict[str, str]:
    return {"User-Agent": USER_AGENT} | (
        {"Authorization": cluster.authorization} if cluster.authorization else {}
    )


def _name(secret: Mapping[str, Any]) -> str:
    metadata = secret["metadata"]
    return f"{metadata.get('namespace', '')}/{metadata['name']}"


def _auths(secret: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the secret's `auths`; nothing where it is not what it should be."""
    try:
        config = json.loads(base64.b64decode(secret["data"][".dockerconfigjson"]))
        auths = config["auths"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return auths if isinstance(auths, dict) else {}


def _matches(key: str, host: str, repository: str) -> bool:
    """Say whether an entry is for the repository: by host, by a pattern of it, or by a path below it, as kubelet has it."""
    if entry_for({key: True}, host) is not None:
        return True
    name, slash, path = key.removeprefix("https://").removeprefix("http://").partition("/")
    if path in {"v1/", "v2/", "v1", "v2"}:
        path = ""
    same_parts = name.count(".") == host.count(".")
    if not (name == host or (same_parts and fnmatchcase(host, name))):
        return False
    path = path.strip("/") if slash else ""
    return not path or repository == path or repository.startswith(path + "/")
