"""Bulk ranged reads from threads: one call, one GET, one attempt, exactly the bytes that were asked for.

urllib3 in threads reads 4 MiB ranges at a third of httpx's CPU time per byte, and its threads do not hold the
interpreter lock while they wait for the network or for TLS. Deliberately not here: retries, renewing a source,
and verifying content: the caller has the digests and decides. Not bounded by a call's limits, but by the
system's: the lookup of a name. A header that comes byte by byte is bounded for each byte only.

Concurrency: any number of threads.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import urllib3
from urllib3.exceptions import HTTPError

from snapshotter.errors import (
    AuthenticationFailed,
    RangeNotHonoured,
    RegistryRefused,
    RegistryTimeout,
    ShortBody,
)
from snapshotter.registry.failures import translated
from snapshotter.registry.pools import Pools
from snapshotter.registry.replies import MAX_ERROR_BODY, check_content_range, error_for
from snapshotter.registry.retry import DEFAULT_TIMEOUTS, Timeouts
from snapshotter.registry.source import BlobSource
from snapshotter.registry.tls import USER_AGENT, silence_libraries

PIECE: Final = 256 << 10
"""Bytes asked of the socket at a time."""


class RangeClient:
    """Ranged reads over pooled connections. Keeps up to `connections` idle ones per host.

    `connections` is how many threads will read at once. `ca_file` is trusted besides the system's authorities.
    """

    def __init__(
        self,
        *,
        connections: int,
        timeouts: Timeouts = DEFAULT_TIMEOUTS,
        user_agent: str = USER_AGENT,
        ca_file: Path | None = None,
    ) -> None:
        silence_libraries()
        self._timeouts = timeouts
        self._headers = {"User-Agent": user_agent, "Accept-Encoding": "identity"}
        self._pools = Pools(connections=connections, ca_file=ca_file)

    def close(self) -> None:
        """Close the idle connections; those in use close when their read ends."""
        self._pools.clear()

    def read(
        self,
        source: BlobSource,
        start: int,
        end: int,
        *,
        deadline: float | None = None,
        into: memoryview | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> bytearray | memoryview:
        """Return the bytes [start, end) of the blob, in `into` when given (of exactly that length).

        `deadline`, on time.monotonic's clock, ends the attempt early. `on_progress` is called, in this thread,
        with the count of every piece that has come. Raises AuthenticationFailed when the source must be
        renewed, BlobNotFound, RangeNotHonoured, RegistryRefused, RegistryUnavailable, RegistryTimeout,
        ShortBody; then `into` may hold anything. Raises ValueError for an empty range or an `into` that does
        not fit.
        """
        if not 0 <= start < end or (into is not None and into.nbytes != end - start):
            raise ValueError(f"range [{start}, {end}) cannot be read")
        if not source.url.startswith(("https://", "http://")):
            raise RegistryRefused(f"{source.what}: its source is no URL")
        target = bytearray(end - start) if into is None else into
        what = f"bytes [{start}, {end}) of {source.what}"
        limit = time.monotonic() + (source.timeout or self._timeouts.total)
        limit = limit if deadline is None else min(limit, deadline)
        with self._opened(source, what, start, end, limit) as response, memoryview(target).cast("B") as view:
            self._check(response, what, source.host, start, end)
            body = _Body(response, what, source.host, limit)
            position = 0
            while position < len(view):
                piece = body.read(min(PIECE, len(view) - position))
                if not piece:
                    raise ShortBody(f"{what}: {source.host} ended the body after {position} bytes")
                view[position : position + len(piece)] = piece
                position += len(piece)
                if on_progress is not None:
                    on_progress(len(piece))
            # Takes the end of a chunked body off the connection, which can then be used again.
            if body.read(1):
                raise RangeNotHonoured(f"{what}: {source.host} sends more than that")
        return target

    @contextlib.contextmanager
    def _opened(
        self, source: BlobSource, what: str, start: int, end: int, limit: float
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        """Send the request and lend the reply; its connection is kept only if all went well."""
        patience = max(limit - time.monotonic(), 0.001)
        timeout = urllib3.Timeout(min(self._timeouts.connect, patience), min(self._timeouts.read, patience))
        # HTTP's ranges are closed: the only place where an end is inclusive.
        headers = self._headers | dict(source.headers) | {"Range": f"bytes={start}-{end - 1}"}
        with translated(what, source.host, in_body=False):
            response = self._pools.find(source.url, source.trust).request(
                "GET",
                source.url,
                headers=headers,
                timeout=timeout,
                retries=False,
                redirect=False,
                preload_content=False,
                decode_content=False,
            )
        try:
            yield response
        except BaseException:
            response.close()
            raise
        response.release_conn()

    def _check(self, response: urllib3.BaseHTTPResponse, what: str, host: str, start: int, end: int) -> None:
        """Raise what a reply means that is not the range [start, end)."""
        status = response.status
        if status == 206:
            check_content_range(what, host, response.headers.get("Content-Range"), start, end)
            if response.headers.get("Content-Length", str(end - start)) != str(end - start):
                raise RangeNotHonoured(f"{what}: {host} announces a body of another length")
        elif 200 <= status < 300:
            raise RangeNotHonoured(f"{what}: {host} answers a range request with {status}")
        elif 300 <= status < 400:
            raise AuthenticationFailed(
                f"{what}: {host} sends us elsewhere by {status}; the source is to be renewed"
            )
        else:
            body = b""
            # What cannot be read of an error is not missed.
            with contextlib.suppress(HTTPError, OSError):
                body = response.read(MAX_ERROR_BODY, decode_content=False)
            raise error_for(what, host, status, response.headers, body)


class _Body:
    """The body of one reply, none of whose waits goes beyond `limit`."""

    def __init__(self, response: urllib3.BaseHTTPResponse, what: str, host: str, limit: float) -> None:
        self._response = response
        self._what = what
        self._host = host
        self._limit = limit

    def read(self, size: int) -> bytes:
        """Return what comes next, at most `size` bytes; nothing at the end. Raises RegistryTimeout, ShortBody."""
        left = self._limit - time.monotonic()
        if left <= 0:
            raise RegistryTimeout(f"{self._what}: {self._host} did not send it in time")
        # None once the server has said that the connection ends with this body; then the read timeout alone holds.
        sock = getattr(self._response.connection, "sock", None)
        if sock is not None and sock.gettimeout() > left:
            sock.settimeout(left)
        with translated(self._what, self._host, in_body=True):
            return self._response.read1(size, decode_content=False)
