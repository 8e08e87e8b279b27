"""Credentials that kubelet sends with its pulls: by image, in memory only, the newest first.

Of each repository the last few are kept: one pod's wrong secret must not take away what another one's lazy layers
are read with. What a registry refuses is passed over (auth.py).

Concurrency: any threads; gRPC's bring credentials, the loop looks them up.
"""

from __future__ import annotations

import base64
import threading
from collections import OrderedDict
from collections.abc import Collection
from typing import Final

from snapshotter.errors import UsageError
from snapshotter.oci.reference import Reference
from snapshotter.registry.keychain import IDENTITY_TOKEN_USER, Credentials, entry_for

MAX_REPOSITORIES: Final = 4096
MAX_EACH: Final = 4


class CriKeychain:
    """What kubelet offered."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._offers: OrderedDict[str, list[Credentials]] = OrderedDict()

    def offer(
        self,
        image: str,
        *,
        username: str = "",
        password: str = "",
        auth: str = "",
        server_address: str = "",
        identity_token: str = "",
    ) -> bool:
        """Keep what came with a pull of `image`; say whether there was anything to keep.

        Credentials for another server than the image's are none, as containerd has it.
        """
        credentials = _credentials(username, password, auth, identity_token)
        where = _locator(image)
        if credentials is None or where is None:
            return False
        host = where.partition("/")[0]
        if server_address and entry_for({server_address: True}, host) is None:
            return False
        with self._lock:
            known = self._offers.pop(where, [])
            self._offers[where] = [credentials, *(one for one in known if one != credentials)][:MAX_EACH]
            if len(self._offers) > MAX_REPOSITORIES:
                self._offers.popitem(last=False)
        return True

    def forget(self, image: str) -> None:
        """Drop what came with `image`, which was removed."""
        where = _locator(image)
        with self._lock:
            self._offers.pop(where or "", None)

    async def lookup(
        self, host: str, repository: str = "", *, refused: Collection[Credentials] = ()
    ) -> Credentials | None:
        """Return the newest offer for the repository that was not refused."""
        with self._lock:
            offers = list(self._offers.get(f"{host}/{repository}", ()))
        return next((one for one in offers if one not in refused), None)

    def __len__(self) -> int:
        """Repositories with credentials."""
        return len(self._offers)


def _locator(image: str) -> str | None:
    """Return the repository of an image's name; None for an identifier, which names none."""
    try:
        return Reference.parse(image).locator
    except UsageError:
        return None


def _credentials(username: str, password: str, auth: str, identity_token: str) -> Credentials | None:
    if username:
        return Credentials(username, password)
    if identity_token:
        return Credentials(IDENTITY_TOKEN_USER, identity_token)
    if auth:
        try:
            name, colon, secret = base64.b64decode(auth, validate=True).decode().partition(":")
        except ValueError:  # not ASCII, not base64, or not UTF-8 in it
            return None
        return Credentials(name, secret.rstrip("\0")) if colon else None
    return None
