"""One open layer: its files, and what is going on with it.

`LayerFiles` is what threads may use: descriptors, sizes and span geometry, none of which change while the
layer is open. `ActiveLayer` is what only the main loop may use: span states, flights, read-ahead, the trace,
the blob's source. A thread's task *pins* the layer, so that a layer that is closed meanwhile keeps its
descriptors until the last task has come back.

Deliberately not here: any decision. This is the desk that the other modules work at.
"""

from __future__ import annotations

import array
import hashlib
import os
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from snapshotter.errors import InvalidLayerFile
from snapshotter.fetch import trace
from snapshotter.fetch.ahead import ReadAhead
from snapshotter.fetch.flight import FlightTable
from snapshotter.layer.spans import SpanFile, SpanState
from snapshotter.layer.store import LayerPaths, LayerStore
from snapshotter.layer.tree import Tree
from snapshotter.registry.source import BlobSource
from snapshotter.units import Digest, digest_hex
from snapshotter.ztoc.model import Algorithm
from snapshotter.ztoc.spans import Span

if TYPE_CHECKING:
    from snapshotter.fetch.readers import Reader


PREDECESSOR_SECONDS = 2.0
"""How long a fetcher waits for the files of one that is just ending; that takes some milliseconds."""


class LayerFiles:
    """Descriptors and geometry of one layer. Threads may use everything but `states`, which is the main loop's."""

    def __init__(self, digest: Digest, paths: LayerPaths, tree: Tree) -> None:
        self.digest = digest
        self.paths = paths
        self.tree = tree
        self.algorithm: Algorithm = tree.algorithm
        self.compressed_size = tree.compressed_size
        self.uncompressed_size = tree.uncompressed_size
        self.header_end = tree.blob_header_end
        self.span_count = tree.span_count
        self.sizes = array.array("Q")
        """Compressed bytes of each span."""
        self.blob_fd = self.data_fd = self.ztoc_fd = -1
        self.shared = False
        """Whether `data` is `blob` under another name."""
        self.states: SpanFile
        self.recorded: list[int] = []
        """The trace of former runs."""
        self._fixed_usage = 0
        """Bytes of the files that do not grow."""
        self._undo = ExitStack()

    @classmethod
    def open(cls, store: LayerStore, digest: Digest, *, boot_id: str, span_max: int) -> LayerFiles:
        """Open the files of `digest`, making those that the fetcher owns. Slow: for a thread.

        The zTOC is hashed, because spans are inflated with the windows in it, and a wrong window makes wrong bytes
        of right ones. Raises InvalidLayerFile (damaged, of another version, or in use by another fetcher; a span
        larger than `span_max`) and OSError.
        """
        paths = store.paths(digest)
        with ExitStack() as undo:
            tree_fd = os.open(_any_tree(paths), os.O_RDONLY | os.O_CLOEXEC)
            try:
                tree = Tree(tree_fd)
            finally:
                os.close(tree_fd)
            undo.callback(tree.close)
            files = cls(digest, paths, tree)
            spans = [tree.span(i) for i in range(tree.span_count)]
            files.sizes.extend(span.compressed_end - span.compressed_start for span in spans)
            _refuse_huge(digest, spans, span_max)
            files.ztoc_fd = os.open(paths.ztoc, os.O_RDONLY | os.O_CLOEXEC)
            undo.callback(os.close, files.ztoc_fd)
            _refuse_damaged(files.ztoc_fd, paths.ztoc, tree.ztoc_digest)
            files.recorded = trace.load(paths.trace, files.span_count)
            # Before the caches: should this process die among them, the next one finds that it did not end cleanly.
            files.states = _open_states(paths.spans, files.span_count, boot_id, digest)
            with ExitStack() as unclean:
                unclean.callback(files.states.abandon)
                files._open_caches(store, undo, own_tar=_is_its_own_tar(tree, spans))
                unclean.pop_all()
            fixed = (path for path in paths.directory.iterdir() if path not in {paths.blob, paths.data})
            files._fixed_usage = sum(path.stat().st_blocks for path in fixed) * 512
            files._undo = undo.pop_all()
        return files

    def _open_caches(self, store: LayerStore, undo: ExitStack, *, own_tar: bool) -> None:
        """Open `blob` and `data`. What was deleted or cut off since the states were written is not trusted."""
        blob, data = self.paths.blob, self.paths.data
        if own_tar and (blob.exists() or data.exists()):
            self.shared = store.share_cache(blob, data)
        has_blob = _has_size(blob, self.compressed_size)
        if self.states.is_new and has_blob and blob.stat().st_blocks:
            self.states.suspect(everything=True)  # only what is known of it was lost
            self.states.set_fetched_bytes(sum(self.sizes))
        elif not (has_blob and _has_size(data, self._data_size)):
            self.states.suspect()  # first: what is missing is nothing but zeros from here on
        self.blob_fd = store.open_cache(blob, self.compressed_size)
        undo.callback(os.close, self.blob_fd)
        if own_tar:
            self.shared = store.share_cache(blob, data)
        self.data_fd = store.open_cache(data, self._data_size)
        undo.callback(os.close, self.data_fd)

    @property
    def _data_size(self) -> int:
        return self.compressed_size if self.shared else self.uncompressed_size

    def is_displaced(self) -> bool:
        """Whether a file that is written to has lost its name: who opens the layer now does not get it."""
        return any(not _is_at(fd, path) for fd, path in self._cache_names())

    def displace(self) -> None:
        """Take `data` and `spans` away together, unless both are in their places. Raises OSError.

        The servers that have them open go on reading what was there, which nobody writes to any more; one of the two
        alone would be a lie to them.
        """
        pairs = [(fd, path) for fd, path in self._cache_names() if path != self.paths.blob]
        if not all(_is_at(fd, path) for fd, path in pairs):
            for _fd, path in pairs:
                path.unlink(missing_ok=True)

    def _cache_names(self) -> list[tuple[int, Path]]:
        paths = self.paths
        return [
            (self.blob_fd, paths.blob),
            (self.data_fd, paths.data),
            (self.states.fileno(), paths.spans),
        ]

    def span(self, span: int) -> Span:
        """Return where `span` is."""
        return self.tree.span(span)

    def disk_usage(self) -> int:
        """Return the bytes that the layer's files occupy on disk. Not so slow: it looks at open inodes."""
        files = {self.blob_fd, self.data_fd} if not self.shared else {self.blob_fd}
        return self._fixed_usage + sum(os.fstat(fd).st_blocks for fd in files) * 512

    def close(self) -> None:
        """Close everything but the span states."""
        self._undo.close()


@dataclass(slots=True, eq=False)
class SourceState:
    """What is known about where the blob is; `sources.py` changes it."""

    source: BlobSource | None = None
    generation: int = 0
    """Goes up with each source, so that a refusal of an old one is recognised."""
    asked: bool = False
    failures: int = 0
    """Temporary failures in a row."""
    expired: int = -1
    """The generation whose host said that a signature or a token was over, and since when no span has come."""
    not_before: float = 0.0


@dataclass(slots=True, eq=False)
class ActiveLayer:
    """An open layer as the main loop sees it."""

    files: LayerFiles
    background: bool = False
    """Whether it is to become complete."""
    image: str = ""
    """The first image that it came with."""
    flights: FlightTable[Reader] = field(default_factory=FlightTable)
    readers: set[Reader] = field(default_factory=set)
    source: SourceState = field(default_factory=SourceState)
    ahead: ReadAhead = field(init=False)
    trace: trace.Trace = field(init=False)
    trace_pending: bool = False
    """Whether the trace is going to be written soon."""
    used: array.array[float] = field(init=False)
    """When each span was last asked for or first used by a server; 0: not since it was opened."""
    evictions: int = 0
    """Spans whose compressed bytes were given up to make room."""
    absent: int = 0
    """Spans that are MISSING or SUSPECT."""
    read_until: float = 0.0
    """So long it counts as being read."""
    rest_until: float = 0.0
    """The background leaves the layer alone until then."""
    rests: int = 0
    """Failures of its background in a row."""
    verifying: bool = False
    wrong: Counter[int] = field(default_factory=Counter)
    """How often a span came with a wrong digest."""
    header_fresh: bool = False
    """Whether the bytes before span 0 have come during this process's life."""
    mismatched: bool = False
    """The whole did not have the layer's digest: it is not completed again."""
    pins: int = 0
    """Tasks in threads that use the files."""
    closed: bool = False

    def __post_init__(self) -> None:
        self.ahead = ReadAhead(self.files.sizes)
        self.trace = trace.Trace(self.files.recorded)
        self.used = array.array("d", bytes(8 * self.files.span_count))
        counts = self.files.states.counts()
        self.absent = counts[SpanState.MISSING] + counts[SpanState.SUSPECT]
        if self.files.header_end == 0:
            self.header_has_come()

    @property
    def digest(self) -> Digest:
        """The layer's digest, by which everybody knows it."""
        return self.files.digest

    @property
    def wants_background(self) -> bool:
        """Whether the layer is to become complete, and can."""
        return self.background and not self.mismatched

    def state(self, span: int) -> SpanState:
        """Return the state of `span`."""
        return self.files.states.state(span)

    def header_has_come(self) -> None:
        """The bytes before span 0 are in `blob`, straight from the registry."""
        self.header_fresh = True
        self.files.states.set_header_fetched(True)

    def pin(self) -> None:
        """A task in a thread begins to use the files."""
        self.pins += 1

    def unpin(self) -> None:
        """A task in a thread has come back."""
        self.pins -= 1
        if self.closed and self.pins == 0:
            self.files.close()

    def close(self) -> None:
        """Give the layer up: the span states are marked clean now, the rest is closed when no task uses it.

        Until then tasks may still write; what they write are the right bytes, and nobody is told of them.
        """
        self.closed = True
        for flight in self.flights:
            flight.waiters.clear()
        self.files.states.close()
        if self.pins == 0:
            self.files.close()


def _any_tree(paths: LayerPaths) -> Path:
    """Return a tree of the layer: all of them describe the same spans."""
    if paths.tree.exists():
        return paths.tree
    for path in sorted(paths.directory.glob("tree.*")):
        return path
    raise InvalidLayerFile(f"layer directory {paths.directory}: no compiled tree")


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def _is_at(fd: int, path: Path) -> bool:
    """Return whether `path` is still a name of the open file."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _is_its_own_tar(tree: Tree, spans: list[Span]) -> bool:
    """Say whether the blob is the tar stream, with nothing but padding behind it."""
    return tree.algorithm is Algorithm.UNCOMPRESSED and all(
        span.compressed_start == span.uncompressed_start and span.compressed_end >= span.uncompressed_end
        for span in spans
    )


def _open_states(path: Path, span_count: int, boot_id: str, digest: Digest) -> SpanFile:
    """Open the span file, waiting a moment for a former fetcher to be gone. Raises InvalidLayerFile, OSError."""
    until = time.monotonic() + PREDECESSOR_SECONDS
    while True:
        try:
            return SpanFile.create_or_open(path, span_count, boot_id=boot_id, digest=digest)
        except BlockingIOError:
            if time.monotonic() > until:
                raise InvalidLayerFile(f"layer {digest}: another fetcher has its span file") from None
        time.sleep(0.05)


def _refuse_damaged(fd: int, path: Path, digest: Digest) -> None:
    """Raise InvalidLayerFile when the zTOC is not the one that the tree was compiled from."""
    with open(fd, "rb", closefd=False) as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != digest_hex(digest):
        raise InvalidLayerFile(f"zTOC {path} has digest sha256:{found} instead of {digest}")


def _refuse_huge(digest: Digest, spans: list[Span], span_max: int) -> None:
    """Raise InvalidLayerFile when a span has more than `span_max` bytes, compressed or not."""
    for span in spans:
        size = max(
            span.compressed_end - span.compressed_start, span.uncompressed_end - span.uncompressed_start
        )
        if size > span_max:
            raise InvalidLayerFile(
                f"layer {digest}: span {span.id} has {size} bytes; more than {span_max} are not held in memory"
            )
