"""What happens to the bytes of one span: hash, write, inflate, write. All of it in worker threads.

Nothing here touches a span's state: a worker returns an `Outcome`, and the main loop writes the state after
it. So bytes are always on their way to the disk before anybody is told that they are there, and a process
that is killed in between leaves a span that counts as missing.

Hashing, inflating and pread/pwrite of a span release the interpreter lock.
"""

from __future__ import annotations

import errno
import hashlib
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from snapshotter.errors import CorruptData, SpanDigestMismatch
from snapshotter.fetch.layerstate import LayerFiles
from snapshotter.layer.spans import SpanState
from snapshotter.units import sha256_digest
from snapshotter.ztoc.inflate import inflate_span
from snapshotter.ztoc.spans import Span

WINDOW_SIZE = 32768

PIECE = 1 << 20
"""Bytes per read or write. A write of more than 2 MiB at once costs ten times as much on ext4 with large folios
(Linux 6.18: 4 MiB in 6.4 ms, in pieces of 1 MiB 0.9 ms)."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How far a span has come; `error` says why not further."""

    state: SpanState
    checksum: int = 0
    error: Exception | None = None


def store(
    files: LayerFiles,
    number: int,
    compressed: memoryview,
    header: memoryview,
    goal: Callable[[], SpanState],
) -> Outcome:
    """Take a span from the network: check it, keep it in `blob`, and inflate it if that is the goal by then.

    `header` are the blob's bytes before span 0, if they came with it. Raises SpanDigestMismatch and OSError;
    then nothing is stored.
    """
    span = files.span(number)
    _check_digest(files, span, compressed)
    if header:
        _write(files.blob_fd, header, 0)
    _write(files.blob_fd, compressed, span.compressed_start)
    if goal() is not SpanState.INFLATED:
        return Outcome(SpanState.FETCHED)
    return _inflate(files, span, compressed)


def inflate(files: LayerFiles, number: int) -> Outcome:
    """Inflate a fetched span from `blob` into `data`, after hashing it: the disk may have failed since it came.

    Returns MISSING when the bytes in `blob` are wrong or cannot be read.
    """
    span = files.span(number)
    compressed = _from_blob(files, span)
    return Outcome(SpanState.MISSING) if compressed is None else _inflate(files, span, compressed)


def check(files: LayerFiles, number: int, checksum: int) -> Outcome:
    """Hash a span that is stored but not trusted; `checksum` is that of its inflated bytes, 0 for none.

    Returns MISSING when the bytes in `blob` are wrong or cannot be read, FETCHED when only those are right.
    """
    span = files.span(number)
    if _from_blob(files, span) is None:
        return Outcome(SpanState.MISSING)
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
    for start in range(0, files.compressed_size, PIECE):
        hasher.update(_read(files.blob_fd, start, min(start + PIECE, files.compressed_size)))
    return f"sha256:{hasher.hexdigest()}" == files.digest


def _inflate(files: LayerFiles, span: Span, compressed: bytes | memoryview) -> Outcome:
    """Inflate `compressed`, which has the right digest, into `data`."""
    try:
        window = None
        if span.window_offset >= 0:
            window = _read(files.ztoc_fd, span.window_offset, span.window_offset + WINDOW_SIZE)
        data = inflate_span(
            compressed,
            algorithm=files.algorithm,
            bits=span.bits,
            window=window,
            length=span.uncompressed_end - span.uncompressed_start,
        )
        _write(files.data_fd, memoryview(data), span.uncompressed_start)
        return Outcome(SpanState.INFLATED, checksum_of(data))
    except (CorruptData, OSError) as error:
        return Outcome(SpanState.FETCHED, error=error)


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
