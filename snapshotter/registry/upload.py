"""A blob that is uploaded by one request, while it is still being made or read: memory holds none of it.

POST, then a PUT with the whole blob, as containerd pushes. What breaks is gone on with where the registry says that it
has got to, or begun anew where it does not remember. A registry has all of the blob in the end or nothing.

Concurrency: an upload belongs to one task; its source runs in a thread.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Final

import httpx
import trio

from snapshotter.errors import (
    AuthenticationFailed,
    BlobNotFound,
    RangeNotHonoured,
    RegistryError,
    RegistryRefused,
    SnapshotterError,
)
from snapshotter.oci.descriptor import Descriptor
from snapshotter.oci.media_types import OCTET_STREAM
from snapshotter.oci.reference import Reference
from snapshotter.registry.hosts import Host
from snapshotter.registry.push import has_blob, with_digest
from snapshotter.registry.replies import MAX_ERROR_BODY
from snapshotter.registry.sending import Piece, SendingClient
from snapshotter.registry.session import Call, Session, headers_for
from snapshotter.registry.source import BlobSource
from snapshotter.registry.wire import Reply, host_of, joined

PROGRESS: Final = 1 << 20
"""Bytes that an attempt must bring for the count of attempts to start again."""

_RANGE: Final = re.compile(r"(?:bytes=)?0-(\d+)")

Source = Callable[[int], Iterator[Piece]]
"""Yields a blob from an offset on; asked again, in a thread, after an attempt that broke."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the registry wants the blob, as the last reply told it."""

    host: Host
    reply: Reply = field(repr=False)
    headers: dict[str, str] = field(repr=False)
    """What may go there to say who asks."""


class BlobUpload:
    """One blob on its way into the repository of `ref`."""

    def __init__(
        self, session: Session, sender: SendingClient, ref: Reference, blob: Descriptor, source: Source
    ) -> None:
        self._session = session
        self._sender = sender
        self._ref = ref
        self._blob = blob
        self._source = source
        self._what = f"upload of blob {blob.digest} to {ref.locator}"
        self._place: _Place | None = None
        self._taken = 0
        """How far any attempt has read the source."""
        self._source_error: BaseException | None = None

    async def run(self) -> None:
        """Return once the repository has the blob. Raises RegistryError, and what the source raises."""
        try:
            await self._run()
        except SnapshotterError:
            await self._forget()
            raise

    async def _run(self) -> None:
        attempt, best, refused_at = 1, 0, -1
        while (start := await self._begin()) is not None:
            if start >= best + PROGRESS:
                best, attempt = start, 1
            try:
                await self._send(start)
            except RegistryError as error:
                if error is self._source_error:
                    raise
                if isinstance(error, AuthenticationFailed) and refused_at != start:
                    # The token was good for the request before: asked how far it is, the registry names another.
                    refused_at = start
                elif start and isinstance(error, RegistryRefused | RangeNotHonoured | BlobNotFound):
                    self._place = None  # it does not take the rest of an upload; it may take all of another
                else:
                    await self._session.pause(self._what, attempt, error)
                attempt += 1
            else:
                return

    async def _begin(self) -> int | None:
        """Return from which offset on to send, None if the repository has the blob by now. Raises RegistryError."""
        if self._place is not None:
            try:
                start = await self._ask()
            except BlobNotFound:
                # Forgotten, or finished by a request whose reply was lost.
                if await has_blob(self._session, self._ref, self._blob.digest):
                    return None
            else:
                if start <= min(self._taken, self._blob.size):
                    return start
        await self._call("POST", "blobs/uploads/", content=b"", success=202)
        return 0

    async def _ask(self) -> int:
        """Return how many bytes the registry has."""
        place = self._place
        assert place is not None
        reply = await self._call("GET", self._url(place), success=204)
        match = _RANGE.fullmatch(reply.headers.get("Range", ""))
        last = 0 if match is None else int(match[1])
        # "0-0" is what registries say of nothing; one byte alone is sent again.
        return last + 1 if last else 0

    async def _send(self, start: int) -> None:
        """Send the blob from `start` on: one attempt."""
        place = self._place
        assert place is not None
        url = with_digest(self._what, place.reply, self._blob.digest)
        host = host_of(httpx.URL(url))
        target = BlobSource(url, place.headers, host, self._what, trust=place.host.trust)
        headers = {"Content-Type": OCTET_STREAM}
        if 0 < start < self._blob.size:
            headers["Content-Range"] = f"{start}-{self._blob.size - 1}"

        def put() -> None:
            with contextlib.closing(self._body(start)) as body:
                self._sender.put(target, body, headers, size=self._blob.size - start)

        await trio.to_thread.run_sync(put, abandon_on_cancel=True)

    def _body(self, start: int) -> Generator[Piece, None, None]:
        """Yield the blob from `start` on. What the source raises is remembered, for it is not the registry's doing."""
        position = start
        try:
            for piece in self._source(start):
                position += len(piece)
                self._taken = max(self._taken, position)
                yield piece
        except SnapshotterError as error:
            self._source_error = error
            raise

    async def _forget(self) -> None:
        """Tell the registry to forget what was sent; it does so by itself later, if this does not arrive."""
        if self._place is None:
            return
        call = Call(
            self._what, self._ref, "DELETE", self._url(self._place), push=True, success=frozenset({204})
        )
        self._place = None
        with contextlib.suppress(RegistryError):
            await self._session.once(call, limit=MAX_ERROR_BODY)

    async def _call(self, method: str, path: str, *, content: bytes | None = None, success: int) -> Reply:
        """Send a call about the upload, tried as often as the policy says; its reply says what `_place` is then."""
        call = Call(
            self._what, self._ref, method, path, content=content, push=True, success=frozenset({success})
        )

        async def ask(host: Host) -> _Place:
            deadline = self._session.wire.deadline(host.timeout)
            response = await self._session.open(host, call, deadline)
            body = await self._session.wire.read(response, call.what, limit=MAX_ERROR_BODY, deadline=deadline)
            reply = Reply(response.status_code, response.headers, body, response.url)
            if method == "GET" and "Location" not in reply.headers:
                reply.headers["Location"] = str(reply.url)
            url = httpx.URL(with_digest(call.what, reply, self._blob.digest))
            return _Place(host, reply, headers_for(host, response, url))

        self._place = await self._session.retrying(call.what, lambda: self._session.first(call, ask))
        return self._place.reply

    def _url(self, place: _Place) -> str:
        return str(joined(self._what, place.reply.url, place.reply.headers["Location"]))
