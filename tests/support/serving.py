"""A layer server's parts without a mount: tree, spans and data of a layer, and a fetcher played by the test."""

from __future__ import annotations

import os
import signal
import socket
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import trio

from snapshotter.counters import CounterPage
from snapshotter.fuse.contents import Contents
from snapshotter.fuse.counters import NAMES
from snapshotter.fuse.operations import LayerOperations
from snapshotter.fuse.spanlink import SpanLink
from snapshotter.layer import wire
from snapshotter.layer.spans import SpanFile, SpanState, SpanView
from snapshotter.layer.tree import Tree
from tests.support.lazylayer import BOOT_ID, LazyLayer


class Fetcher:
    """The other end of a server's socket; it inflates what it is told to, and nothing by itself."""

    def __init__(self, serving: Serving) -> None:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        serving.link.connect(near.detach())
        self._sock = trio.socket.from_stdlib_socket(far)
        self._serving = serving

    async def next(self) -> wire.Message:
        """Return the server's next message."""
        with trio.fail_after(60):
            return wire.decode(await self._sock.recv(wire.PACKET_SIZE))

    async def next_want(self) -> wire.Want:
        """Return the server's next demand; touches are passed over."""
        while True:
            message = await self.next()
            if isinstance(message, wire.Want):
                return message

    def pending(self) -> bool:
        """Tell whether the server has said something that was not read yet."""
        try:
            return bool(socket.socket.recv(self._raw(), 1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return False

    async def send(self, message: wire.Message) -> None:
        """Send an answer."""
        await self._sock.send(wire.encode(message))

    async def deliver(self, *spans: int) -> None:
        """Inflate spans and say so, one by one."""
        for span in spans:
            self._serving.inflate(span)
            await self.send(wire.Ready(span, span + 1))

    async def lend(self) -> None:
        """Answer every demand with the bytes themselves."""
        while True:
            span = (await self.next_want()).first
            where = self._serving.tree.span(span)
            fd = os.memfd_create("lent")
            os.write(fd, self._serving.layer.tar[where.uncompressed_start : where.uncompressed_end])
            socket.send_fds(self._raw(), [wire.encode(wire.Lent(span))], [fd])
            os.close(fd)

    async def confirm(self, mend: Callable[[], object] = bool) -> None:
        """Say of every span in doubt that it has been looked at, and is as it should be, after `mend`."""
        while True:
            message = wire.decode(await self._sock.recv(wire.PACKET_SIZE))
            if isinstance(message, wire.Doubt):
                mend()
                await self.send(wire.Ready(message.span, message.span + 1))

    async def serve(self, rounds: int = 1 << 30) -> None:
        """Deliver the first span of each demand."""
        for _ in range(rounds):
            await self.deliver((await self.next_want()).first)

    def close(self) -> None:
        """Hang up."""
        self._sock.close()

    def _raw(self) -> socket.socket:
        return self._sock._sock  # type: ignore[attr-defined,no-any-return]


class Serving:
    """The parts over the files of one layer. A context manager."""

    def __init__(self, layer: LazyLayer, *, budget: float = 10.0, data_fd: int | None = None) -> None:
        self.layer = layer
        with open(layer.paths.tree, "rb") as file:
            self.tree = Tree(file.fileno())
        self.spans = SpanFile.create_or_open(
            layer.paths.spans, self.tree.span_count, boot_id=BOOT_ID, digest=layer.digest
        )
        with open(layer.paths.spans, "rb") as file:
            self.view = SpanView(file.fileno())
        self.data = os.open(layer.paths.data, os.O_RDWR) if data_fd is None else data_fd
        self._page = CounterPage.create("counters", NAMES)
        self.counters = CounterPage(self._page, NAMES, writable=True)
        self._handler = signal.getsignal(signal.SIGALRM)
        self.lost = 0
        """How often the keeper would have been asked for a socket."""
        self.link = SpanLink(
            self.view, self.counters, layer=layer.digest, budget=budget, on_lost=self._count_loss
        )
        self.contents = Contents(self.tree, self.data, self.view, self.link, self.counters)
        self.operations = LayerOperations(self.tree, self.contents, self.counters)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._handler)
        if self.link._socket is not None:  # the link is never closed: its process ends
            self.link._socket.close()
        self.view.close()
        self.spans.close()
        self.tree.close()
        self.counters.close()
        os.close(self.data)
        os.close(self._page)

    def _count_loss(self) -> None:
        self.lost += 1

    def ino(self, path: str) -> int:
        """Return the inode at `path`."""
        ino = 1
        for name in path.split("/"):
            ino = self.tree.lookup(ino, name.encode())
            assert ino, path
        return ino

    async def read(self, path: str, offset: int = 0, size: int = 1 << 20) -> bytes:
        """Read a file as the kernel asks for it."""
        ino = self.ino(path)
        return bytes(await self.contents.read(ino, self.tree.row(ino), offset, size))

    def spans_of(self, path: str) -> range:
        """Return the spans that a file's bytes are in."""
        node = self.tree.row(self.ino(path))
        return self.tree.spans_for(node.data_offset, node.data_offset + node.size)

    def inflate(self, span: int) -> None:
        """Put a span's bytes in place, as the fetcher does."""
        where = self.tree.span(span)
        content = self.layer.tar[where.uncompressed_start : where.uncompressed_end]
        os.pwrite(self.data, content, where.uncompressed_start)
        if self.spans.state(span) is SpanState.MISSING:
            self.spans.set_fetched(span)
        if self.spans.state(span) is SpanState.FETCHED:
            self.spans.set_inflated(span, zlib.crc32(content))

    def evict(self, span: int) -> None:
        """Take a span's inflated bytes away, as the fetcher does: state first."""
        where = self.tree.span(span)
        self.spans.evict_data(span)
        os.pwrite(
            self.data, bytes(where.uncompressed_end - where.uncompressed_start), where.uncompressed_start
        )

    def count(self, name: str) -> int:
        """Return a counter."""
        return self.counters.snapshot()[name]


@contextmanager
def serving(layer: LazyLayer, *, budget: float = 10.0, data_fd: int | None = None) -> Iterator[Serving]:
    """Give the parts, and close them."""
    with Serving(layer, budget=budget, data_fd=data_fd) as parts:
        yield parts
