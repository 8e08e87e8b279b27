"""The bytes of a layer's files, as a layer server hands them out.

Between the page cache above and the fetcher beside it: finds the spans of a read, waits for those that are
not there, reads `data`, makes sure that nothing was evicted in between, and checks a file's tar header
against the zTOC before its first byte goes out. What turns out short or wrong is doubted: the fetcher hashes it, gets
it again if need be, and it is read once more.

It owns which files were checked and one buffer, and nothing else; all may be forgotten at any time.

Concurrency: trio; any number of readers at once. Blocking reads of the disk happen in worker threads, and
only after the page cache said no (RWF_NOWAIT).
"""

from __future__ import annotations

import errno
import logging
import os
from functools import partial

import trio

from snapshotter.counters import CounterPage
from snapshotter.errors import HeaderMismatch
from snapshotter.fuse import kernel
from snapshotter.fuse.spanlink import SpanLink
from snapshotter.layer.header import check as check_header
from snapshotter.layer.spans import SpanState, SpanView
from snapshotter.layer.tree import Node, Tree

_log = logging.getLogger(__name__)

_MAX_TRIES = 8
"""Reads of one range that find it evicted in between, before giving up; each needs an eviction of its own."""

_INFLATED = int(SpanState.INFLATED)

_NOT_AT_ONCE = frozenset({errno.EAGAIN, errno.EOPNOTSUPP})
"""Not in the page cache; or a file system that cannot tell (tmpfs, among others)."""


class Contents:
    """Reads ranges of files of one layer."""

    def __init__(
        self, tree: Tree, data_fd: int, view: SpanView, link: SpanLink, counters: CounterPage
    ) -> None:
        self._tree = tree
        self._fd = data_fd
        self._view = view
        self._link = link
        self._counters = counters
        self._checked = bytearray(tree.highest_ino + 1)
        self._local = counters.index("spans_local")
        self._buffer = memoryview(bytearray(kernel.MAX_READ))
        """For what is read at once: clearing half a megabyte, or faulting it in, takes longer than copying it."""

    def read_at_once(self, ino: int, offset: int, size: int) -> bytes | memoryview | None:
        """Return what `read` would, if nothing has to be waited for and the file's header was checked; else None.

        Good until the next call: pyfuse3 sends a handler's answer before anything else can run. This is the way of
        nearly all reads, hence one function of plain steps. Raises KeyError for an unknown inode.
        """
        data_offset, file_size = self._tree.extent(ino)
        end = min(offset + size, file_size)
        if offset >= end:
            return b""
        if not self._checked[ino] or end - offset > len(self._buffer):
            return None
        start, end = data_offset + offset, data_offset + end
        spans, word_of = self._tree.spans_for(start, end), self._view.word
        words = [word_of(span) for span in spans]
        for word in words:
            if word & 0xFF != _INFLATED:
                return None
        data = self._buffer[: end - start]
        try:
            if os.preadv(self._fd, (data,), start, os.RWF_NOWAIT) != end - start:
                return None
        except OSError:
            return None  # not in the page cache, or something that `read` will say
        if [word_of(span) for span in spans] != words:
            return None
        self._link.touch(spans)
        self._counters.add_at(self._local, len(words))
        return data

    async def read(self, ino: int, node: Node, offset: int, size: int) -> bytes | bytearray | memoryview:
        """Return the bytes `[offset, offset + size)` of a regular file, shortened at its end.

        Raises HeaderMismatch, or OSError (EIO) when the bytes cannot be had.
        """
        end = min(offset + size, node.size)
        if offset >= end:
            return b""
        if not self._checked[ino]:
            await self._check_header(ino, node)
        start = node.data_offset
        return await self._range(ino, start + offset, start + end, start + node.size)

    async def _check_header(self, ino: int, node: Node) -> None:
        start, end, file_end = node.header_start, node.data_offset, node.data_offset + node.size
        try:
            try:
                check_header(bytes(await self._range(ino, start, end, file_end)), node.fingerprint)
            except HeaderMismatch:  # of the zTOC, or of a disk that has lost bytes
                await self._link.doubt(self._tree.spans_for(start, end), partial(self._path, ino))
                check_header(bytes(await self._range(ino, start, end, file_end)), node.fingerprint)
        except HeaderMismatch as error:
            self._counters.add("header_mismatches")
            raise HeaderMismatch(f"{self._path(ino)}: {error}") from error
        self._checked[ino] = 1

    def _path(self, ino: int) -> str:
        return self._tree.path(ino).decode(errors="backslashreplace")

    async def _range(self, ino: int, start: int, end: int, file_end: int) -> bytearray | memoryview:
        """Return `[start, end)` of the tar stream, which belongs to the file `ino`."""
        spans = self._tree.spans_for(start, end)
        view = self._view
        self._link.touch(spans)
        for _try in range(_MAX_TRIES):
            words = [view.word(span) for span in spans]
            if any(word & 0xFF != SpanState.INFLATED for word in words):
                ahead_end = self._tree.spans_for(start, file_end).stop
                await self._link.want(spans, ahead_end, partial(self._path, ino))
                lent = self._lent(spans, start, end)
                if lent is not None:
                    return lent
                continue
            self._counters.add_at(self._local, len(words))
            buffer = bytearray(end - start)
            got = await self._pread(buffer, start)
            if [view.word(span) for span in spans] == words:
                if got == len(buffer):
                    return buffer
                short = self._tree.spans_for(start + got, end)
                _log.warning("data file is short", extra={"spans": f"{short.start}-{short.stop}"})
                await self._link.doubt(short, partial(self._path, ino))
        raise OSError(
            errno.EIO,
            f"spans {spans.start}-{spans.stop} were short or evicted {_MAX_TRIES} times during one read",
        )

    def _lent(self, spans: range, start: int, end: int) -> bytearray | None:
        """Return `[start, end)` when at least one of `spans`, all to be had, was lent by the fetcher.

        In one step, for what is lent may be replaced at any await; None when something is not to be had any more.
        """
        words = [self._view.word(span) for span in spans]
        buffer, filled, some = bytearray(end - start), 0, False
        for span, word in zip(spans, words, strict=True):
            where = self._tree.span(span)
            first, last = max(where.uncompressed_start, start), min(where.uncompressed_end, end)
            target = memoryview(buffer)[first - start : last - start]
            if word & 0xFF == SpanState.INFLATED:
                filled += os.preadv(self._fd, [target], first)
                continue
            fd = self._link.lent(span)
            if fd is None:
                return None
            some = True
            filled += os.preadv(fd, [target], first - where.uncompressed_start)
        unchanged = [self._view.word(span) for span in spans] == words
        return buffer if some and unchanged and filled == len(buffer) else None

    async def _pread(self, buffer: bytearray, start: int) -> int:
        """Fill `buffer` from `data`; from the page cache at once, else in a thread. Returns the bytes read."""
        try:
            got = os.preadv(self._fd, [buffer], start, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno not in _NOT_AT_ONCE:
                raise
            got = 0
        if got == len(buffer):
            return got
        return await trio.to_thread.run_sync(self._pread_blocking, buffer, start, got)

    def _pread_blocking(self, buffer: bytearray, start: int, got: int) -> int:
        view = memoryview(buffer)
        while got < len(buffer):
            count = os.preadv(self._fd, [view[got:]], start + got)
            if count == 0:
                break
            got += count
        return got
