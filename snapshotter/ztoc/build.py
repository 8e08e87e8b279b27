"""Layer blob -> zTOC, with one pass over a stream and in bounded memory.

While the blob passes by, its compressed bytes go into the layer digest and the span digests; what
comes out of the checkpoint scan goes through the tar scanner, and in a thread beside it into the
diffID. What has to be kept is the result: a window of 32 KiB per span and a record per file.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from snapshotter.errors import UsageError
from snapshotter.units import Digest, sha256_digest
from snapshotter.ztoc.checkpoints import CheckpointScanner
from snapshotter.ztoc.model import VERSION, Algorithm, Buffer, CompressionInfo, Ztoc, header_starts
from snapshotter.ztoc.serialize import serialize_with_offset
from snapshotter.ztoc.tar import TarScanner
from snapshotter.ztoc.zinfo import GzipWriter, write_tar

DEFAULT_SPAN_SIZE = 1 << 22
DEFAULT_BUILD_TOOL = "soci-lazy-snapshotter v0.1"

_PIECE = 1 << 20
"""Larger chunks are worked through in pieces of this size, to keep them in the cache and copies small."""


@dataclass(frozen=True, slots=True)
class BuiltZtoc:
    """A zTOC (`ztoc`, its bytes `data`, their digest) and what the same pass learned about the layer:
    the digest and size of the blob, and the diffID, which is the digest of the tar stream."""

    data: bytes
    digest: Digest
    ztoc: Ztoc
    layer_digest: Digest
    diff_id: Digest
    layer_size: int


def build(
    chunks: Iterable[Buffer],
    *,
    algorithm: Algorithm,
    span_size: int = DEFAULT_SPAN_SIZE,
    build_tool: str = DEFAULT_BUILD_TOOL,
    backend: str | None = None,
) -> BuiltZtoc:
    """Return the zTOC of the layer whose blob is the concatenation of `chunks`.

    The result depends on the blob, `span_size` and `build_tool`, and on nothing else (`backend` is one
    of blockinflate.BACKENDS). Raises InvalidTar for a damaged gzip or tar stream, UnsupportedLayer for
    an entry that the format cannot hold, UsageError for a span size that is negative, or 0 for a
    layer that is not compressed.
    """
    if span_size < (0 if algorithm is Algorithm.GZIP else 1):
        raise UsageError(f"a span size of {span_size} bytes is not possible")
    with _TarPass() as tar:
        if algorithm is Algorithm.GZIP:
            blob = _pass_gzip(chunks, span_size, tar, backend)
        else:
            blob = _pass_uncompressed(chunks, span_size, tar)
        diff_id = tar.finish()
    entries = tuple(tar.scanner.entries)
    ztoc = Ztoc(
        version=VERSION,
        build_tool=build_tool,
        compressed_size=blob.size,
        uncompressed_size=tar.scanner.end_offset,
        entries=entries,
        header_starts=header_starts(entries),
        compression=CompressionInfo(algorithm, len(blob.span_digests) - 1, blob.span_digests, blob.zinfo),
    )
    data, zinfo_offset = serialize_with_offset(ztoc)
    return BuiltZtoc(
        data=data,
        digest=sha256_digest(data),
        ztoc=dataclasses.replace(ztoc, zinfo_offset=zinfo_offset),
        layer_digest=blob.digest,
        diff_id=diff_id,
        layer_size=blob.size,
    )


def read_tar(chunks: Iterable[Buffer]) -> tuple[Ztoc, Digest]:
    """Return the table of contents of the tar stream `chunks`, as one span, and its diffID.

    It is what unpacking takes; hashing the stream once is all that it costs beside. Raises as `build` does.
    """
    size = 0
    with _TarPass() as tar:
        for piece in _pieces(chunks):
            tar.feed(memoryview(piece))
            size += len(piece)
        diff_id = tar.finish()
    entries = tuple(tar.scanner.entries)
    ztoc = Ztoc(
        version=VERSION,
        build_tool=DEFAULT_BUILD_TOOL,
        compressed_size=size,
        uncompressed_size=tar.scanner.end_offset,
        entries=entries,
        header_starts=header_starts(entries),
        compression=CompressionInfo(Algorithm.UNCOMPRESSED, 0, (diff_id,), write_tar(max(size, 1), size)),
    )
    return ztoc, diff_id


@dataclass(frozen=True, slots=True)
class _Blob:
    """What is learned from the compressed side."""

    digest: Digest
    size: int
    span_digests: tuple[Digest, ...]
    zinfo: bytes


def _pass_gzip(chunks: Iterable[Buffer], span_size: int, tar: _TarPass, backend: str | None) -> _Blob:
    hashes = _BlobHashes()
    zinfo = GzipWriter(span_size)
    with CheckpointScanner(span_size, tar.feed, backend=backend) as scanner:
        for piece in _pieces(chunks):
            found = scanner.feed(piece)
            hashes.update(piece, [(point.compressed_in, point.bits) for point in found])
            for point in found:
                zinfo.add(point)
        scanner.close()
    return hashes.finish(zinfo.finish())


def _pass_uncompressed(chunks: Iterable[Buffer], span_size: int, tar: _TarPass) -> _Blob:
    hashes = _BlobHashes()
    for piece in _pieces(chunks):
        first = -(-hashes.size // span_size) * span_size
        borders = range(first, hashes.size + len(piece), span_size)
        hashes.update(piece, [(border, 0) for border in borders])
        tar.feed(memoryview(piece))
    return hashes.finish(write_tar(span_size, hashes.size))


def _pieces(chunks: Iterable[Buffer]) -> Iterator[bytes]:
    for chunk in chunks:
        if isinstance(chunk, bytes) and len(chunk) <= _PIECE:
            yield chunk
        else:
            view = memoryview(chunk)
            for start in range(0, len(view), _PIECE):
                yield bytes(view[start : start + _PIECE])


class _BlobHashes:
    """The digests of the blob as a whole and of each span, from one stream of pieces."""

    def __init__(self) -> None:
        self.size = 0
        self._blob = hashlib.sha256()
        self._spans: list[hashlib._Hash] = []
        self._last_byte = b""

    def update(self, piece: bytes, starts: Sequence[tuple[int, int]]) -> None:
        """Take the next bytes of the blob, in which a span starts at each (blob offset, bits) of `starts`.

        With bits, the byte before that offset belongs to the span, too; it may be in the piece before.
        """
        view = memoryview(piece)
        self._blob.update(view)
        at = 0
        for start, bits in starts:
            border = start - self.size
            if self._spans:
                self._spans[-1].update(view[at:border])
            self._spans.append(hashlib.sha256())
            if bits:
                self._spans[-1].update(view[border - 1 : border] if border else self._last_byte)
            at = border
        if self._spans:
            self._spans[-1].update(view[at:])
        self.size += len(view)
        self._last_byte = piece[-1:] or self._last_byte

    def finish(self, zinfo: bytes) -> _Blob:
        """Return the digests with the zinfo that they belong to."""
        return _Blob(_digest(self._blob), self.size, tuple(map(_digest, self._spans)), zinfo)


class _TarPass:
    """The uncompressed side: tar scanner in the calling thread, sha256 in one of its own.

    Fits CheckpointScanner's sink: when `feed` returns, the piece before has been hashed.
    """

    def __init__(self) -> None:
        self.scanner = TarScanner()
        self._hash = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, "ztoc-diff-id")
        self._hashing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()

    def feed(self, view: memoryview) -> None:
        """Take the next bytes of the tar stream. Raises InvalidTar or UnsupportedLayer."""
        self._await_hash()
        self._hashing = self._thread.submit(self._hash.update, view)
        self.scanner.feed(view)

    def finish(self) -> Digest:
        """Say that the stream ends here, and return its digest. Raises InvalidTar."""
        self.scanner.close()
        self._await_hash()
        return _digest(self._hash)

    def _await_hash(self) -> None:
        if self._hashing is not None:
            self._hashing.result()


def _digest(sha256: hashlib._Hash) -> Digest:
    return Digest("sha256:" + sha256.hexdigest())
