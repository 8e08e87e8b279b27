"""A whole blob as a stream that survives its connection: what is missing is asked for as a range.

Concurrency: a stream belongs to one task.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

import httpx

from snapshotter.errors import (
    DigestMismatch,
    RangeNotHonoured,
    RegistryError,
    RegistryRefused,
    RegistryUnavailable,
)
from snapshotter.oci.reference import Reference
from snapshotter.registry.hosts import Host
from snapshotter.registry.replies import check_content_range
from snapshotter.registry.session import Call, Session, blob_call
from snapshotter.registry.wire import host_of
from snapshotter.units import Digest, digest_hex

PROGRESS: Final = 1 << 20
"""Bytes that an attempt must bring for the count of attempts to start again."""


async def stream_blob(
    session: Session, ref: Reference, digest: Digest, size: int | None
) -> AsyncGenerator[bytes, None]:
    """Yield a blob, of `size` bytes if that is known. Use with contextlib.aclosing.

    Raises RegistryError when the policy's attempts are used up, and DigestMismatch after the last piece.
    """
    hasher = hashlib.sha256()
    stream = _Stream(session, ref, digest, size)
    attempt = 0
    while True:
        attempt += 1
        start = stream.position
        try:
            async with aclosing(stream.attempt()) as pieces:
                async for piece in pieces:
                    hasher.update(piece)
                    yield piece
            break
        except RegistryError as error:
            if stream.position - start >= PROGRESS:
                attempt = 1
            await session.pause(stream.what, attempt, error)
    if hasher.hexdigest() != digest_hex(digest) or size not in {None, stream.position}:
        raise DigestMismatch(
            f"{stream.what}: the registry sent {stream.position} bytes that are not it",
            elsewhere=stream.blame_mirrors(),
        )


class _Stream:
    """A whole blob, attempt by attempt; `position` bytes have come so far."""

    def __init__(self, session: Session, ref: Reference, digest: Digest, size: int | None) -> None:
        self._session = session
        self._ref = ref
        self._digest = digest
        self._size = size
        self.what = blob_call(ref, digest).what
        self.position = 0
        self._mirrors: set[str] = set()
        """Those that sent a part of it."""

    def blame_mirrors(self) -> bool:
        """The whole is wrong: nobody knows whose part, so that none of the mirrors is asked for a while.

        Say whether there was any.
        """
        for mirror in self._mirrors:
            self._session.blame(mirror, DigestMismatch(f"{self.what}: a blob of another digest"))
        return bool(self._mirrors)

    async def attempt(self) -> AsyncGenerator[bytes, None]:
        """Yield what is missing. Raises a RegistryError when it does not all come."""
        if self.position == self._size:
            return
        end = None
        if self.position:
            if self._size is None:
                raise RegistryRefused(
                    f"{self.what}: it broke off, and without its size it cannot be gone on with"
                )
            end = self._size
        call = blob_call(self._ref, self._digest, start=self.position, end=end)
        mirrors = {host.name for host in self._session.hosts_for(call)[:-1]}
        host, response, deadline = await self._session.first(call, lambda host: self._open(host, call))
        try:
            async with aclosing(self._session.wire.pieces(response, call.what, deadline=deadline)) as pieces:
                self._check(call, response, end)
                async for piece in pieces:
                    self._mirrors |= mirrors & {host.name}
                    self.position += len(piece)
                    if self._size is not None and self.position > self._size:
                        raise RegistryRefused(
                            f"{call.what}: {host_of(response.url)} sends more than {self._size} bytes"
                        )
                    yield piece
        except RegistryError as error:
            if host.name not in mirrors:
                raise
            self._session.blame(host.name, error)
            raise RegistryUnavailable(str(error)) from None  # there is somebody else to ask

    async def _open(self, host: Host, call: Call) -> tuple[Host, httpx.Response, float]:
        deadline = self._session.wire.deadline(host.timeout)
        return host, await self._session.open(host, call, deadline), deadline

    def _check(self, call: Call, response: httpx.Response, end: int | None) -> None:
        """See that the reply is what is missing, and learn the size from the first one."""
        if end is not None:
            host = host_of(response.url)
            if response.status_code != 206:
                raise RangeNotHonoured(f"{call.what}: {host} answers a range request with everything")
            check_content_range(call.what, host, response.headers.get("Content-Range"), self.position, end)
            return
        length = response.headers.get("Content-Length", "")
        if (
            self._size is None
            and "Transfer-Encoding" not in response.headers
            and length.isascii()
            and length.isdigit()
        ):
            self._size = int(length)
