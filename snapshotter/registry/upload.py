"""A blob that is uploaded in pieces, while it is still being made or read: memory holds one piece, whatever its size.

A piece whose fate is not known is asked about before it is sent again. Without `commit` the registry has nothing.

Concurrency: an upload belongs to one task at a time.
"""

from __future__ import annotations

import gc
import re
from typing import Final

from snapshotter.errors import RegistryError, RegistryRefused
from snapshotter.oci.media_types import OCTET_STREAM
from snapshotter.oci.reference import Reference
from snapshotter.registry.push import with_digest
from snapshotter.registry.replies import MAX_ERROR_BODY
from snapshotter.registry.session import Call, Session
from snapshotter.registry.wire import Reply, joined
from snapshotter.units import Digest

_RANGE: Final = re.compile(r"(?:bytes=)?0-(\d+)")


class BlobUpload:
    """One blob on its way into the repository of `ref`. Call `open` first, and `commit` or `abort` last."""

    def __init__(self, session: Session, ref: Reference, digest: Digest) -> None:
        self._session = session
        self._ref = ref
        self._digest = digest
        self._what = f"upload of blob {digest} to {ref.locator}"
        self._location: Reply | None = None
        self._offset = 0
        self._is_sure = True
        """Whether the registry has exactly `_offset` bytes; not so after an attempt that broke."""

    async def open(self) -> None:
        """Begin the upload. Raises RegistryError."""
        call = self._call("POST", "blobs/uploads/", content=b"", success=202)
        self._location = await self._session.fetch(call, limit=MAX_ERROR_BODY)

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append `data`. Raises RegistryError when it cannot be brought there."""
        start, view = self._offset, memoryview(data)
        await self._session.retrying(self._what, lambda: self._send(start, view))

    async def commit(self) -> None:
        """End the upload: the registry compares what it has with the digest. Raises RegistryError."""
        call = self._call(
            "PUT", with_digest(self._what, self._reply(), self._digest), content=b"", success=201
        )
        await self._session.fetch(call, limit=MAX_ERROR_BODY)
        self._location = None

    async def abort(self) -> None:
        """Tell the registry to forget what was sent; it does so by itself later, if this does not arrive."""
        if self._location is None:
            return
        call = self._call("DELETE", self._url(), success=204)
        self._location = None
        try:
            await self._session.once(call, limit=MAX_ERROR_BODY)
        except RegistryError:
            return

    async def _send(self, start: int, view: memoryview) -> None:
        """Send what is missing of the piece that begins at `start`: one attempt."""
        if not self._is_sure:
            self._offset = await self._ask()
            self._is_sure = True
        end = start + len(view)
        if not start <= self._offset <= end:
            raise RegistryRefused(f"{self._what}: the registry has {self._offset} bytes of {start} to {end}")
        if self._offset == end:
            return
        headers = {
            "Content-Type": OCTET_STREAM,
            "Content-Range": f"{self._offset}-{end - 1}",
        }
        content = bytes(view[self._offset - start :])
        call = self._call("PATCH", self._url(), headers, content=content, success=202)
        self._is_sure = False
        self._location = await self._session.once(call, limit=MAX_ERROR_BODY)
        self._is_sure = True
        self._offset = end
        # httpx's requests are in cycles with their replies: without this, dozens of pieces wait for the collector.
        gc.collect(1)

    async def _ask(self) -> int:
        """Return how many bytes the registry has."""
        self._location = await self._session.once(
            self._call("GET", self._url(), success=204), limit=MAX_ERROR_BODY
        )
        match = _RANGE.fullmatch(self._location.headers.get("Range", ""))
        last = 0 if match is None else int(match[1])
        # "0-0" is what registries say of nothing; a piece of one byte does not occur.
        return last + 1 if last else 0

    def _url(self) -> str:
        reply = self._reply()
        return str(joined(self._what, reply.url, reply.headers.get("Location") or str(reply.url)))

    def _reply(self) -> Reply:
        if self._location is None:
            raise RegistryRefused(f"{self._what}: not begun, or ended already")
        return self._location

    def _call(
        self,
        method: str,
        path: str,
        headers: dict[str, str] | None = None,
        *,
        content: bytes | None = None,
        success: int,
    ) -> Call:
        expected = frozenset({success, 204} if method == "PUT" else {success})
        return Call(self._what, self._ref, method, path, headers or {}, content, push=True, success=expected)
