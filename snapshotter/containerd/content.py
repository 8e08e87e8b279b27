"""containerd's content store: blobs by digest, with labels that steer its garbage collector.

Concurrency: `ContentStore` may be used from any thread; an `Ingest` belongs to one thread at a time.
"""

from __future__ import annotations

import io
import os
import queue
import threading
import uuid
from collections.abc import Iterator, Mapping
from typing import Final, Self

import grpc
from google.protobuf.field_mask_pb2 import FieldMask

from snapshotter.api import content_pb2 as pb
from snapshotter.api import introspection_pb2
from snapshotter.api.content_pb2_grpc import ContentStub
from snapshotter.api.introspection_pb2_grpc import IntrospectionStub
from snapshotter.containerd.connection import Connection
from snapshotter.errors import AlreadyExists, CorruptData, NotFound, SnapshotterError
from snapshotter.units import Digest, sha256_digest

MESSAGE_SIZE: Final = 1 << 20
"""Bytes of data per message: 16 MiB is the limit, and beyond 1 MiB nothing gets faster."""
MESSAGES_AHEAD: Final = 2
"""Messages sent before the first is answered, so that containerd hashes while the next ones travel."""


class ContentStore:
    """The blobs of one namespace. Usable wherever a content source or an artifact store is asked for."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = ContentStub(connection.channel)
        self._lock = threading.Lock()
        self._directory: str | None = None
        """Where containerd keeps blobs as files; None until somebody asks."""

    def size(self, digest: Digest) -> int:
        """Return the number of bytes. Raises NotFound."""
        return self._info(digest).size

    def labels(self, digest: Digest) -> dict[str, str]:
        """Return the labels. Raises NotFound."""
        return dict(self._info(digest).labels)

    def digests(self) -> Iterator[Digest]:
        """Yield the digest of every blob of the namespace."""
        request = pb.ListContentRequest()
        for answer in self._connection.stream(self._stub.List, request, "content"):
            for info in answer.info:
                yield Digest(info.digest)

    def labelled(self, label: str) -> Iterator[tuple[float, Digest]]:
        """Yield time (seconds since the epoch) and digest of every blob that has the label, whatever it says."""
        request = pb.ListContentRequest(filters=[f'labels."{label}"'])
        for answer in self._connection.stream(self._stub.List, request, "content"):
            for info in answer.info:
                yield info.created_at.ToNanoseconds() / 1e9, Digest(info.digest)

    def exists(self, digest: Digest) -> bool:
        """Say whether the namespace has the blob."""
        try:
            self._info(digest)
        except NotFound:
            return False
        return True

    def read_range(self, digest: Digest, start: int, end: int) -> bytes:
        """Return the bytes `[start, end)`, not verified. Raises NotFound, CorruptData when there are fewer."""
        # To containerd, size 0 means "to the end".
        data = b"".join(self._read(digest, start, end - start)) if end > start else b""
        if len(data) != end - start:
            raise CorruptData(f"content {digest} in containerd: shorter than {end} bytes")
        return data

    def chunks(self, digest: Digest) -> Iterator[bytes]:
        """Yield the whole blob in pieces, not verified. Raises NotFound.

        From containerd's own file where that can be read here: over the socket a GB costs 2.4 s of processor time.
        """
        file = self.open_file(digest)
        if file is None:
            yield from self._read(digest, 0, 0)
            return
        with file:
            while piece := file.read(MESSAGE_SIZE):
                yield piece

    def open_file(self, digest: Digest) -> io.FileIO | None:
        """Open containerd's own file of a blob; None where that cannot be had: as another user, in a container.

        Raises NotFound when the namespace does not have the blob.
        """
        size = self.size(digest)
        with self._lock:
            if self._directory is None:
                self._directory = os.path.join(self._root(), "blobs")
        try:
            file = io.FileIO(os.path.join(self._directory, digest.replace(":", "/", 1)))
        except OSError:
            return None
        if os.fstat(file.fileno()).st_size == size:
            return file
        file.close()
        return None

    def write(self, data: bytes, *, labels: Mapping[str, str] | None = None) -> Digest:
        """Store `data` unless it is there, set the labels in any case, and return the digest."""
        digest = sha256_digest(data)
        try:
            with self.ingest(digest, len(data)) as ingest:
                ingest.write(data)
                ingest.commit(labels)
        except AlreadyExists:
            if labels:
                self.label(digest, labels)
        return digest

    def ingest(self, digest: Digest, size: int) -> Ingest:
        """Return a writer for a blob that comes in pieces. Raises AlreadyExists when the namespace has it."""
        return Ingest(self._connection, self._stub, digest, size)

    def label(self, digest: Digest, labels: Mapping[str, str]) -> None:
        """Set `labels`, an empty value removing one; others stay. Raises NotFound."""
        self._connection.call(
            self._stub.Update,
            pb.UpdateRequest(
                info=pb.Info(digest=digest, labels=labels),
                update_mask=FieldMask(paths=[f"labels.{name}" for name in labels]),
            ),
            f"content {digest}",
        )

    def remove(self, digest: Digest) -> None:
        """Remove the blob from the namespace. Raises NotFound."""
        self._connection.call(self._stub.Delete, pb.DeleteContentRequest(digest=digest), f"content {digest}")

    def ingests(self) -> list[str]:
        """Return the names of the writes that are under way, or were left behind."""
        answer = self._connection.call(self._stub.ListStatuses, pb.ListStatusesRequest(), "content ingests")
        return [status.ref for status in answer.statuses]

    def _info(self, digest: Digest) -> pb.Info:
        return self._connection.call(self._stub.Info, pb.InfoRequest(digest=digest), f"content {digest}").info

    def _root(self) -> str:
        """Return where containerd says that its content is; what cannot have files in it when it does not say."""
        stub = IntrospectionStub(self._connection.channel)
        request = introspection_pb2.PluginsRequest(filters=["type==io.containerd.content.v1,id==content"])
        try:
            plugins = self._connection.call(stub.Plugins, request, "content plugin").plugins
        except SnapshotterError:
            return os.devnull
        return plugins[0].exports.get("root", os.devnull) if plugins else os.devnull

    def _read(self, digest: Digest, offset: int, size: int) -> Iterator[bytes]:
        request = pb.ReadContentRequest(digest=digest, offset=offset, size=size)
        for answer in self._connection.stream(self._stub.Read, request, f"content {digest}"):
            yield answer.data


class Ingest:
    """One blob on its way into the store. Left without `commit`, it leaves nothing behind."""

    def __init__(self, connection: Connection, stub: ContentStub, digest: Digest, size: int) -> None:
        self._connection = connection
        self._stub = stub
        self._digest = digest
        self._size = size
        # A name of its own: two programs that fetch one blob do not wait for each other.
        self._ref = f"soci-{uuid.uuid4().hex}-{digest}"
        self._requests: queue.SimpleQueue[pb.WriteContentRequest | None] = queue.SimpleQueue()
        self._open = True
        self._offset = 0
        self._unanswered = 0
        self._call = stub.Write(
            iter(self._requests.get, None), metadata=connection.metadata, timeout=connection.timeout()
        )
        try:
            self._send(pb.STAT)
            # Of a blob that another namespace has, everything is there: only the commit is missing.
            self._offset = self._receive().offset
        except BaseException:
            self._requests.put(None)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def complete(self) -> bool:
        """Whether the store has every byte: all that was written, or another namespace's copy."""
        return self._offset == self._size

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append `data`; does nothing when the store has the whole blob already."""
        if self.complete:
            return
        view = memoryview(data)
        for start in range(0, len(view), MESSAGE_SIZE):
            self._send(pb.WRITE, bytes(view[start : start + MESSAGE_SIZE]))
            if self._unanswered > MESSAGES_AHEAD:
                self._receive()

    def commit(self, labels: Mapping[str, str] | None = None) -> None:
        """Make the blob visible, under its labels.

        Raises AlreadyExists when somebody was faster, FailedPrecondition when size or digest are not what was
        announced.
        """
        self._send(pb.COMMIT, labels=labels)
        while self._unanswered:
            self._receive()
        self._finish()

    def close(self) -> None:
        """Forget what was written, unless it was committed. Errors are ignored: containerd expires such remains."""
        if not self._open:
            return
        self._call.cancel()
        self._finish()
        try:
            self._stub.Abort(pb.AbortRequest(ref=self._ref), metadata=self._connection.metadata, timeout=10.0)
        except grpc.RpcError:
            return

    def _finish(self) -> None:
        self._open = False
        self._requests.put(None)

    def _send(
        self, action: pb.WriteAction.ValueType, data: bytes = b"", *, labels: Mapping[str, str] | None = None
    ) -> None:
        self._requests.put(
            pb.WriteContentRequest(
                action=action,
                ref=self._ref,
                total=self._size,
                expected=self._digest,
                offset=self._offset,
                data=data,
                labels=labels,
            )
        )
        self._offset += len(data)
        self._unanswered += 1

    def _receive(self) -> pb.WriteContentResponse:
        try:
            answer = next(self._call)
        except grpc.RpcError as error:
            raise self._connection.translated(error, f"content {self._digest}") from error
        self._unanswered -= 1
        return answer
