"""An image in a registry as a content source for code that runs in threads: layers are streamed, never stored.

A layer is read in ranges, some of them ahead of what the reader works on; so memory holds a few ranges per layer that
is being read, however large it is. A registry that does not honour ranges is read from one connection instead. What a
layer's bytes are also wanted for (an upload elsewhere) gets each range while the reader works on it.

Concurrency: made and closed in the task of a trio run; the methods are for threads of their own, not for that task.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Final, Protocol, Self, TypeVar

import trio

from snapshotter.download.rangereader import RangeReader
from snapshotter.errors import InvalidIndex, NotFound, RangeNotHonoured, SnapshotterError
from snapshotter.oci.descriptor import Descriptor
from snapshotter.oci.manifest import ImageManifest, parse
from snapshotter.oci.media_types import INDEX_TYPES, MANIFEST_TYPES
from snapshotter.oci.reference import Reference
from snapshotter.registry.client import RegistryClient
from snapshotter.registry.sending import Piece
from snapshotter.soci.content import CHUNK_SIZE, MAX_DOCUMENT_SIZE
from snapshotter.units import Digest

RANGE: Final = 4 << 20
"""Bytes per request."""
AHEAD: Final = 3
"""Ranges of a layer that are on their way or waiting: with what is worked on and sent on, some 30 MB for each layer."""
LAYERS: Final = 4
"""Layers that are read at the same time, however many processors there are: with two, both are now and then at their end
at once, and the link rests; more would not stay below 300 MB."""

T = TypeVar("T")


class Sink(Protocol):
    """Where else a layer goes; called in the thread that reads it."""

    def write(self, piece: Piece) -> None:
        """Take the next piece. Raises SnapshotterError."""

    def commit(self) -> None:
        """That was all."""

    def abort(self) -> None:
        """No more will come. Raises nothing."""


class RegistryContent:
    """The content of the image `root` in the repository of `reference`."""

    def __init__(self, registry: RegistryClient, reference: Reference, root: Descriptor) -> None:
        """`registry` must live longer. To be made in the trio run that it belongs to."""
        self.root = root
        self._registry = registry
        self._reference = reference
        self._token = trio.lowlevel.current_trio_token()
        self._ranges = RangeReader(registry, reference, connections=LAYERS * AHEAD)
        self._known: dict[Digest, Descriptor] = {root.digest: root}
        """What some document has named; a dict is safe to add to from several threads."""
        self._documents: dict[Digest, bytes] = {}
        self._stopped = threading.Event()
        self.sink: Callable[[Descriptor], Sink | None] = lambda _: None
        """Asked before a layer is read."""

    def close(self) -> None:
        """Make every reader end, with an error, and drop the connections."""
        self._stopped.set()
        self._ranges.close()

    def add(self, entry: Descriptor) -> None:
        """Let what `entry` describes, a manifest beside the image, be content of it."""
        self._known.setdefault(entry.digest, entry)

    def size(self, digest: Digest) -> int:
        """Return the number of bytes. Raises NotFound for what no document of the image names."""
        entry = self._entry(digest)
        # A layer with URLs of its own need not be in the registry.
        if entry.urls and not self.call(lambda: self._registry.has_blob(self._reference, digest)):
            raise NotFound(f"content {digest}: not in {self._reference.locator}")
        return entry.size

    def read_range(self, digest: Digest, start: int, end: int) -> bytes:
        """Return the bytes `[start, end)`: of a document from memory, of a layer by a request. Raises NotFound."""
        entry = self._entry(digest)
        if entry.size > MAX_DOCUMENT_SIZE:
            return bytes(self.call(lambda: self._ranges.read(entry, start, end)))
        if digest not in self._documents:
            self._documents[digest] = self._document(entry)
        return self._documents[digest][start:end]

    def chunks(self, digest: Digest) -> Iterator[bytes]:
        """Yield a whole layer in pieces, not verified. Raises NotFound, RegistryError."""
        layer = self._entry(digest)
        # The first ranges are asked for while another registry is asked whether it wants them.
        with self._ahead(layer, 0, layer.size) as ahead:
            sink = self.sink(layer)
            try:
                for piece in self._in_order(layer, ahead):
                    if sink is not None:
                        sink.write(piece)
                    view = memoryview(piece)
                    for start in range(0, len(view), CHUNK_SIZE):
                        yield bytes(view[start : start + CHUNK_SIZE])
                if sink is not None:
                    sink.commit()
            except BaseException:
                if sink is not None:
                    sink.abort()
                raise

    def pieces(self, layer: Descriptor, start: int, end: int) -> Iterator[Piece]:
        """Yield the bytes `[start, end)` of a layer in pieces, not verified, and give them to nobody else."""
        with self._ahead(layer, start, end) as ahead:
            yield from self._in_order(layer, ahead)

    def call(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do `work` in the trio run and return its result."""
        if self._stopped.is_set():
            raise SnapshotterError(f"{self._reference.locator}: interrupted")
        return trio.from_thread.run(work, trio_token=self._token)

    def _ahead(self, layer: Descriptor, start: int, end: int) -> _Ahead:
        def read(one: int, other: int) -> Piece:
            return self.call(lambda: self._ranges.read(layer, one, other))

        return _Ahead(read, start, end)

    def _in_order(self, layer: Descriptor, ahead: _Ahead) -> Iterator[Piece]:
        """Yield what `ahead` reads of a layer, from one connection if the registry has no ranges."""
        begun = False
        try:
            for piece in ahead:
                begun = True
                yield piece
        except RangeNotHonoured:
            if begun:
                raise
            with contextlib.closing(self._by_stream(layer, ahead.start, ahead.end)) as pieces:
                yield from pieces

    def _by_stream(self, layer: Descriptor, start: int, end: int) -> Generator[Piece, None, None]:
        """Yield the bytes `[start, end)` of a layer, all of which is read for it."""
        stream = self._registry.stream_blob(self._reference, layer)
        position = 0
        try:
            while (piece := self.call(lambda: anext(stream, None))) is not None:
                wanted = piece[max(start - position, 0) : max(end - position, 0)]
                position += len(piece)
                if wanted:
                    yield wanted
        finally:
            self.call(stream.aclose)

    def _entry(self, digest: Digest) -> Descriptor:
        entry = self._known.get(digest)
        if entry is None:
            raise NotFound(f"content {digest}: not named by the image in {self._reference.locator}")
        return entry

    def _document(self, entry: Descriptor) -> bytes:
        """Return a manifest or config, and remember what it names."""
        if entry.media_type not in MANIFEST_TYPES | INDEX_TYPES:
            limit = MAX_DOCUMENT_SIZE
            return self.call(lambda: self._registry.blob(self._reference, entry, max_size=limit))
        reference = self._reference.with_digest(entry.digest)
        _, data = self.call(lambda: self._registry.manifest(reference))
        if len(data) != entry.size:
            raise InvalidIndex(f"manifest {entry.digest}: {len(data)} bytes, not the {entry.size} announced")
        document = parse(data, entry.media_type)
        if isinstance(document, ImageManifest):
            children: tuple[Descriptor, ...] = (document.config, *document.layers)
        else:
            children = document.manifests
        for child in children:
            self._known.setdefault(child.digest, child)
        return data


class _Ahead:
    """The bytes `[start, end)` of a layer in order, range after range; some are asked for before they are wanted.

    A context manager: what is on its way when it ends is not waited for.
    """

    def __init__(self, read: Callable[[int, int], Piece], start: int, end: int) -> None:
        self.start = start
        self.end = end
        self._read = read
        self._starts = iter(range(start, end, RANGE))
        self._coming: deque[Future[Piece]] = deque()
        self._pool = ThreadPoolExecutor(AHEAD, thread_name_prefix="range")
        self._ask()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __iter__(self) -> Iterator[Piece]:
        while self._coming:
            piece = self._coming.popleft().result()
            self._ask()
            yield piece

    def _ask(self) -> None:
        """Ask for as many ranges as may be ahead."""
        while len(self._coming) < AHEAD and (start := next(self._starts, None)) is not None:
            self._coming.append(self._pool.submit(partial(self._read, start, min(start + RANGE, self.end))))
