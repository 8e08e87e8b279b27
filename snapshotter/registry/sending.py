"""Bulk uploads from threads: one call, one request, whose body is made while it is sent.

One attempt. Deliberately not here, as in ranges.py: retries, logging in, and what the registry does with the bytes.
Bounded for each record that is sent, and for the reply; a body may take as long as its bytes need.

Concurrency: any number of threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, cast

import urllib3

from snapshotter.errors import RegistryRefused
from snapshotter.registry.failures import translated
from snapshotter.registry.pools import Pools
from snapshotter.registry.replies import MAX_ERROR_BODY, error_for
from snapshotter.registry.retry import Timeouts
from snapshotter.registry.source import BlobSource
from snapshotter.registry.tls import silence_libraries

Piece = bytes | bytearray | memoryview

CONNECTIONS: Final = 8
"""Idle ones kept for each host."""


class SendingClient:
    """Sends bodies over pooled connections. `ca_file` is trusted besides the system's authorities."""

    def __init__(self, *, timeouts: Timeouts, user_agent: str, ca_file: Path | None) -> None:
        silence_libraries()
        # What is sent has the time of a connection, and may pause as long as any reply; the reply comes when the
        # registry has stored the whole blob where it belongs, which takes stores behind it minutes.
        self._timeout = urllib3.Timeout(timeouts.read, timeouts.total)
        self._headers = {"User-Agent": user_agent, "Accept-Encoding": "identity"}
        self._pools = Pools(connections=CONNECTIONS, ca_file=ca_file)

    def close(self) -> None:
        """Close the idle connections; those in use close when their request ends."""
        self._pools.clear()

    def put(
        self, target: BlobSource, body: Iterable[Piece], headers: Mapping[str, str], *, size: int
    ) -> None:
        """Send a PUT with the `size` bytes of `body` to where `target` says, and wait until it is accepted.

        `body` is left alone as soon as the connection breaks. Raises what the reply means: AuthenticationFailed,
        BlobNotFound, RangeNotHonoured, RegistryRefused; RegistryUnavailable, RegistryTimeout; and what `body` raises.
        """
        what, host = target.what, target.host
        own = {"Content-Length": str(size), **headers}
        with translated(what, host, in_body=False):
            response = self._pools.find(target.url, target.trust).request(
                "PUT",
                target.url,
                # It goes to the socket as it is: any buffer will do.
                body=cast("Iterable[bytes]", body),
                headers=self._headers | dict(target.headers) | own,
                timeout=self._timeout,
                retries=False,
                redirect=False,
                preload_content=False,
                decode_content=False,
            )
        with translated(what, host, in_body=True):
            try:
                reply = response.read(MAX_ERROR_BODY, decode_content=False)
            finally:
                # A refusal may come before the body has been sent: nobody must find such a connection in the pool.
                (response.release_conn if response.status in {201, 204} else response.close)()
        if response.status in {201, 204}:
            return
        if 300 <= response.status < 400:
            raise RegistryRefused(
                f"{what}: {host} sends us elsewhere by {response.status} in the middle of it"
            )
        raise error_for(what, host, response.status, response.headers, reply)
