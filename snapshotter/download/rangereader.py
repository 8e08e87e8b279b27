"""Ranges of an image's layers, read with retries, and from elsewhere when a URL, a token or a mirror has run out.

Concurrency: any number of tasks of one trio run; the reading itself is done in threads.
"""

from __future__ import annotations

import functools
import time
from typing import Final

import trio

from snapshotter.errors import AuthenticationFailed, DigestMismatch, RegistryError
from snapshotter.oci.descriptor import Descriptor
from snapshotter.oci.reference import Reference
from snapshotter.registry.client import RegistryClient
from snapshotter.registry.ranges import RangeClient
from snapshotter.registry.retry import DEFAULT_RETRY, DEFAULT_TIMEOUTS, RetryPolicy, Timeouts
from snapshotter.registry.source import BlobSource
from snapshotter.units import Digest

RANGE_SIZE: Final = 16 << 20
"""Bytes per request: a round trip of 20 ms every 134 ms of a 1 Gbit/s link, and three layers fill each other's gaps."""


class RangeReader:
    """Reads blobs of one repository, at most `connections` ranges at once."""

    def __init__(
        self,
        registry: RegistryClient,
        reference: Reference,
        *,
        connections: int,
        retry: RetryPolicy = DEFAULT_RETRY,
        timeouts: Timeouts = DEFAULT_TIMEOUTS,
    ) -> None:
        self._registry = registry
        self._reference = reference
        self._ranges = RangeClient(connections=connections, timeouts=timeouts)
        self._retry = retry
        self._range_seconds = timeouts.total
        # Of their own: whoever else needs a thread does not queue behind downloads.
        self._threads = trio.CapacityLimiter(connections)
        self._givers: dict[Digest, set[str]] = {}
        """The mirrors that sent some of a blob."""
        self._liars: set[str] = set()

    def close(self) -> None:
        """Drop the connections."""
        self._ranges.close()

    async def read(self, layer: Descriptor, start: int, end: int) -> bytearray | memoryview:
        """Return the bytes `[start, end)` of a blob, not verified. Raises RegistryError after the last attempt."""
        source = await self._find(layer)
        renewed = False
        attempt = 1
        while True:
            try:
                deadline = time.monotonic() + self._range_seconds
                read = functools.partial(self._ranges.read, source, start, end, deadline=deadline)
                data = await trio.to_thread.run_sync(read, abandon_on_cancel=True, limiter=self._threads)
            except RegistryError as error:
                if isinstance(error, AuthenticationFailed) and not renewed:  # a URL or a token has run out
                    renewed = True
                    source = await self._find(layer, renew=True)
                    continue
                delay = self._retry.delay(attempt, error)
                if source.mirror and attempt < self._retry.attempts:
                    self._registry.blame(source.mirror, error)
                    source = await self._find(layer, renew=True)
                    renewed, delay = False, delay or 0.0
                if delay is None:
                    raise
                attempt += 1
                await trio.sleep(delay)
            else:
                if source.mirror:
                    self._givers.setdefault(layer.digest, set()).add(source.mirror)
                return data

    def distrust(self, layer: Descriptor) -> bool:
        """Have the mirrors that sent some of a blob, which is wrong as a whole, not asked for a while: nobody knows
        whose part it was. Say whether there are any: somebody else is asked, then, from now on."""
        givers = self._givers.pop(layer.digest, set())
        for mirror in givers:
            self._registry.blame(
                mirror, DigestMismatch(f"blob {layer.digest} of {self._reference.locator}: another digest")
            )
        self._liars |= givers
        return bool(givers)

    async def _find(self, layer: Descriptor, *, renew: bool = False) -> BlobSource:
        """Return the source of a blob; of one that was found before a mirror lied, another one."""
        source = await self._registry.blob_source(self._reference, layer.digest, renew=renew)
        if source.mirror in self._liars and not renew:
            source = await self._registry.blob_source(self._reference, layer.digest, renew=True)
        return source
