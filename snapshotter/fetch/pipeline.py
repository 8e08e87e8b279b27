"""What happens to the bytes of one span: hash, write, inflate, write. All of it in worker threads.

Nothing here touches a span's state: a worker returns an `Outcome`, and the main loop writes the state after
it. So bytes are always on their way to the disk before anybody is told that they are there, and a process
that is killed in between leaves a span that counts as missing.

A disk that takes no bytes does not stop a reader: what is inflated for one is *lent* then, in a sealed file in
memory that goes to the servers that wait and is nowhere else.

Hashing, inflating and pread/pwrite of a span release the interpreter lock.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from snapshotter.errors import CorruptData, SpanDigestMismatch
from snapshotter.fetch.layerstate import LayerFiles
from snapshotter.layer.holes import punch_hole
from snapshotter.layer.spans import SpanState
from snapshotter.units import sha256_digest
from snapshotter.ztoc.inflate import decompress_stream, inflate_span
from snapshotter.ztoc.model import Algorithm
from snapshotter.ztoc.spans import Span

WINDOW_SIZE = 32768

_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE

PIECE = 1 << 20
"""Bytes per read or write. A write of more than 2 MiB at once costs ten times as much on ext4 with large folios
(Linux 6.18: 4 MiB in 6.4 ms, in pieces of 1 MiB 0.9 ms)."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How far a span has come; `error` says why not further, `refused` why the disk did not take it."""

    state: SpanState
    checksum: int = 0
    error: Exception | None = None
    refused: OSError | None = None
    lent: int = -1
    """Descriptor of the inflated bytes where they are not in `data`; the receiver of the outcome closes it."""

    def close(self) -> None:
        """Close what comes with the outcome, for nobody wants it any more."""
        if self.lent >= 0:
            os.close(self.lent)


def store(
    files: LayerFiles,
    number: int,
    compressed: memoryview,
    header: memoryview,
    goal: Callable[[], SpanState],
    *,
    keep: bool = True,
) -> Outcome:
    """Take a span from the network: check it, keep it in `blob`, and inflate it if that is the goal by then.

    `header` are the blob's bytes before span 0, if they came with it. Without `keep`, or when the disk refuses,
    nothing is stored, and what is inflated is lent. Raises SpanDigestMismatch.
    """
    span = files.span(number)
    _check_digest(files, span, compressed)
    refused = None
    if keep:
        try:
            if header:
                _write(files.blob_fd, header, 0)
            _write(files.blob_fd, compressed, span.compressed_start)
        except OSError as error:
            keep, refused = False, error
            _give_back(files.blob_fd, span.compressed_start, span.compressed_end)
    stored = Outcome(SpanState.FETCHED if keep else SpanState.MISSING, refused=refused)
    return _inflate(files, span, compressed, stored, keep=keep) if goal() is SpanState.INFLATED else stored


def inflate(files: LayerFiles, number: int, *, keep: bool = True) -> Outcome:
    """Inflate a fetched span from `blob` into `data`, after hashing it: the disk may have failed since it came.

    Returns MISSING when the bytes in `blob` are wrong or cannot be read. Without `keep` the bytes are lent.
    """
    span = files.span(number)
    compressed = _from_blob(files, span)
    if compressed is None:
        return Outcome(SpanState.MISSING)
    return _inflate(files, span, compressed, Outcome(SpanState.FETCHED), keep=keep)


def give_back(files: LayerFiles, numbers: Sequence[int], *, blob: bool) -> None:
    """Free the disk space of the spans `numbers` (ascending) in `data`, and in `blob` too if told so.

    Raises OSError when the file system cannot make holes.
    """
    spans = [files.span(number) for number in numbers]
    if blob:
        for start, end in _runs([(span.compressed_start, span.compressed_end) for span in spans]):
            punch_hole(files.blob_fd, start, end)
    if not files.shared:
        for start, end in _runs([(span.uncompressed_start, span.uncompressed_end) for span in spans]):
            punch_hole(files.data_fd, start, end)


def check(files: LayerFiles, number: int, checksum: int) -> Outcome:
    """Hash a span that is stored but not trusted; `checksum` is that of its inflated bytes, 0 for none.

    Returns MISSING when the bytes in `blob` are wrong or cannot be read, FETCHED when only those are right.
    """
    span = files.span(number)
    if _from_blob(files, span) is None:
        return Outcome(SpanState.MISSING)
    if checksum and files.shared:
        return Outcome(SpanState.INFLATED, checksum)
    if checksum:
        try:
            data = _read(files.data_fd, span.uncompressed_start, span.uncompressed_end)
        except OSError:
            return Outcome(SpanState.FETCHED)
        if checksum_of(data) == checksum:
            return Outcome(SpanState.INFLATED, checksum)
    return Outcome(SpanState.FETCHED)


def checksum_of(data: bytes | bytearray | memoryview) -> int:
    """Return the checksum of a span's inflated bytes: not 0, which stands for none.

    CRC-32, because it only has to notice what a crash or a disk did: 6.3 GB/s where sha256 gives 1.8.
    """
    return zlib.crc32(data) | 1 << 32


def blob_has_digest(files: LayerFiles) -> bool:
    """Return whether the whole blob has the layer's digest, reading it in bounded memory. Raises OSError."""
    hasher = hashlib.sha256()
    for piece in _pieces(files.blob_fd, files.compressed_size):
        hasher.update(piece)
    return f"sha256:{hasher.hexdigest()}" == files.digest


@dataclass(frozen=True, slots=True)
class Proof:
    """What came of looking at a layer as a whole."""

    wrong: str
    """What is wrong with it; empty when nothing is."""
    diff_id: str = ""
    """The digest of its tar stream, when nothing is wrong."""


def prove(files: LayerFiles, pause: Callable[[], None]) -> Proof:
    """Look whether a layer of which everything is stored is right; if so it is on disk for good.

    Two proofs: the blob has the layer's digest; and inflating it from its beginning, as an ordinary pull does,
    gives the bytes that its spans give one by one, so that the diffID is that of what is served. (A zTOC whose
    windows are wrong passes every other check.) `pause` is called between two spans. Raises OSError.
    """
    if not blob_has_digest(files):
        return Proof("the blob does not have the layer's digest")
    try:
        diff_id = str(files.digest) if files.shared else _digest_of_stream(files, pause)
    except CorruptData as error:
        return Proof(f"the blob does not unpack: {error}")
    if diff_id is None:
        return Proof("its spans do not inflate to what the blob unpacks to")
    os.fdatasync(files.blob_fd)
    return Proof("", diff_id)


def make_durable(files: LayerFiles) -> None:
    """Have the span states, and the names of the layer's files, on disk. Raises OSError."""
    for path, flags in ((files.paths.spans, os.O_RDONLY), (files.paths.directory, os.O_DIRECTORY)):
        fd = os.open(path, flags | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _digest_of_stream(files: LayerFiles, pause: Callable[[], None]) -> str | None:
    """Return the digest of the blob inflated from its beginning; None when its spans inflate to anything else.

    In bounded memory, and only as far as the spans go has the stream to be theirs.
    """
    compression = "gzip" if files.algorithm is Algorithm.GZIP else "uncompressed"
    stream = decompress_stream(_pieces(files.blob_fd, files.compressed_size), compression)
    hasher = hashlib.sha256()
    ahead = b""
    for number in range(files.span_count):
        span = files.span(number)
        # As bytes: two memoryviews are compared item by item, which takes longer than inflating them.
        expected = bytes(
            inflated(files, span, _read(files.blob_fd, span.compressed_start, span.compressed_end))
        )
        start = 0
        while start < len(expected):
            if not ahead:
                ahead = next(stream, b"")
                hasher.update(ahead)
            count = min(len(ahead), len(expected) - start)
            if not count or ahead[:count] != expected[start : start + count]:
                return None
            ahead, start = ahead[count:], start + count
        pause()
    for rest in stream:
        hasher.update(rest)
    return f"sha256:{hasher.hexdigest()}"


def _pieces(fd: int, size: int) -> Iterator[bytes]:
    for start in range(0, size, PIECE):
        yield _read(fd, start, min(start + PIECE, size))


def inflated(files: LayerFiles, span: Span, compressed: bytes | memoryview) -> bytes | memoryview:
    """Return what `compressed`, which has the right digest, inflates to. Raises SpanInflateError, OSError."""
    window = None
    if span.window_offset >= 0:
        window = _read(files.ztoc_fd, span.window_offset, span.window_offset + WINDOW_SIZE)
    return inflate_span(
        compressed,
        algorithm=files.algorithm,
        bits=span.bits,
        window=window,
        length=span.uncompressed_end - span.uncompressed_start,
    )


def _inflate(
    files: LayerFiles, span: Span, compressed: bytes | memoryview, stored: Outcome, *, keep: bool
) -> Outcome:
    """Inflate `compressed` into `data`, or lend it; `stored` is how far the span has come so far."""
    try:
        data = inflated(files, span, compressed)
    except (CorruptData, OSError) as error:
        return replace(stored, error=error)
    refused = stored.refused
    if keep:
        try:
            if not files.shared:
                _write(files.data_fd, memoryview(data), span.uncompressed_start)
            return Outcome(SpanState.INFLATED, checksum_of(data))
        except OSError as error:
            refused = error
            _give_back(files.data_fd, span.uncompressed_start, span.uncompressed_end)
    try:
        return replace(stored, refused=refused, lent=_lend(data))
    except OSError as error:
        return replace(stored, error=error)


def _lend(data: bytes | memoryview) -> int:
    """Return a descriptor of a file in memory that holds `data` and that nobody can change. Raises OSError."""
    fd = os.memfd_create("soci-span", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        _write(fd, memoryview(data), 0)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _give_back(fd: int, start: int, end: int) -> None:
    """Free what a write that failed has left behind, if that is possible."""
    with suppress(OSError):
        punch_hole(fd, start, end)


def _runs(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return `ranges` (ascending) with neighbours joined, so that the block between two is freed too."""
    joined: list[tuple[int, int]] = []
    for start, end in ranges:
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def _from_blob(files: LayerFiles, span: Span) -> bytes | None:
    """Return the stored bytes of `span`, None when they are wrong or cannot be read."""
    try:
        compressed = _read(files.blob_fd, span.compressed_start, span.compressed_end)
        _check_digest(files, span, compressed)
    except (SpanDigestMismatch, OSError):
        return None
    return compressed


def _check_digest(files: LayerFiles, span: Span, compressed: bytes | memoryview) -> None:
    found = sha256_digest(compressed)
    if found != span.digest:
        raise SpanDigestMismatch(
            f"layer {files.digest}: span {span.id} has digest {found} instead of {span.digest}"
        )


def _read(fd: int, start: int, end: int) -> bytes:
    """Return the bytes `[start, end)`. Raises OSError, also when the file ends before."""
    data = os.pread(fd, end - start, start)
    while len(data) < end - start:
        more = os.pread(fd, end - start - len(data), start + len(data))
        if not more:
            raise OSError(errno.EIO, f"file ends at {start + len(data)} instead of {end}")
        data += more
    return data


def _write(fd: int, data: memoryview, start: int) -> None:
    """Write all of `data` at `start`. Raises OSError; ENOSPC and EDQUOT mean that the disk is full."""
    while data:
        written = os.pwrite(fd, data[:PIECE], start)
        data, start = data[written:], start + written
