"""A layer server's side of its socket to the fetcher: ask for spans, wait, be told.

It owns the waiters of this server, one per span in demand. The span file is the truth and the messages
only wake: a waiter is registered before the state is looked at, so an answer between the two is not lost;
and whoever is woken looks again. The exception is a span that the disk has no room for: it is lent, in a file in
memory that comes with the message, and the last few of those are kept for the next reads. When the socket ends (the
fetcher died, or dropped it) the keeper brings another one, by itself or because it is asked to (`on_lost`), and
everything that is still wanted is asked for again. A reader notices none of that but the time.

Concurrency: trio, one task per reader plus `run`; between two awaits nothing else touches the table.
"""

from __future__ import annotations

import array
import errno
import logging
import os
import signal
import socket
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

import trio

from snapshotter.counters import CounterPage
from snapshotter.fuse.waits import Awaited, Waits
from snapshotter.layer import wire
from snapshotter.layer.spans import SpanState, SpanView

_log = logging.getLogger(__name__)

_UNBLOCK_S = 0.25
"""How often a read of /dev/fuse is interrupted while readers wait, in seconds. The descriptor must be blocking
(its flags are shared by all copies), so a request that is withdrawn between poll and read would stop the
loop until the next request; a signal ends such a read with EINTR, which libfuse and pyfuse3 take as
"look again"."""


MAX_LENT = 8
"""Lent spans that are kept, each usually 4 MiB: a few readers at once, each reading on in its own."""

_ASK_AGAIN_S = 0.5
"""How often the keeper is asked for a socket while there is none, or a dead one, and readers wait."""


class _Demand:
    """One span that readers wait for."""

    __slots__ = ("error", "event", "readers")

    def __init__(self) -> None:
        self.event = trio.Event()
        self.readers = 0
        self.error = 0

    async def answered(self, span: int) -> None:
        """Wait for the answer. Raises OSError when it is that the span cannot be had."""
        await self.event.wait()
        if self.error:
            raise OSError(self.error, f"span {span} cannot be had")


class SpanLink:
    """Asks the fetcher for spans on behalf of this server's readers."""

    def __init__(
        self,
        view: SpanView,
        counters: CounterPage,
        *,
        layer: str,
        budget: float,
        on_lost: Callable[[], None],
    ) -> None:
        self._view = view
        self._counters = counters
        self._budget = budget
        self._layer = layer
        self._on_lost = on_lost
        self._waits = Waits(layer, counters)
        self._demands: dict[int, _Demand] = {}
        self._lent: OrderedDict[int, int] = OrderedDict()
        """Descriptors of lent spans, the latest last."""
        self._touched = bytearray(view.span_count)
        self._socket: trio.socket.SocketType | None = None
        self._sending = trio.Lock()
        self._replaced = trio.Event()
        self._connected = False
        signal.signal(signal.SIGALRM, lambda *_ignored: None)

    def connect(self, fd: int) -> None:
        """Use `fd`, a socket to the fetcher, from now on; a former one is dropped."""
        if self._socket is not None:
            self._socket.close()
        self._socket = trio.socket.from_stdlib_socket(socket.socket(fileno=fd))
        self._replaced.set()
        self._replaced = trio.Event()

    async def run(self) -> None:
        """Receive answers for ever; ask again for what is wanted whenever the socket is a new one."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._waits.watch)
            while True:
                replaced = self._replaced
                if self._socket is not None:
                    self._connected = True
                    with suppress(OSError, trio.ClosedResourceError):
                        await self._receive(self._socket)
                    self._connected = False
                while not replaced.is_set():
                    if self._demands:
                        self._on_lost()
                    with trio.move_on_after(_ASK_AGAIN_S):
                        await replaced.wait()

    async def _receive(self, sock: trio.socket.SocketType) -> None:
        for span in sorted(self._demands):
            await self._send(sock, wire.Want(span, span + 1, span + 1))
        while True:
            data, ancillary, _, _ = await sock.recvmsg(
                wire.PACKET_SIZE, socket.CMSG_SPACE(array.array("i").itemsize), socket.MSG_CMSG_CLOEXEC
            )
            if not data:
                return
            match wire.decode(data):
                case wire.Ready(first, end):
                    for span in range(first, end):
                        self._wake(span, 0)
                case wire.Lent(span):
                    self._keep(span, array.array("i", ancillary[0][2])[0])
                    self._wake(span, 0)
                case wire.Failed(span, number):
                    self._wake(span, number)
                case other:
                    _log.error("fetcher sent a message that is not an answer", extra={"answer": str(other)})

    def _keep(self, span: int, fd: int) -> None:
        """Take a lent span, in place of one lent long ago."""
        if span in self._lent:
            os.close(self._lent.pop(span))
        self._lent[span] = fd
        if len(self._lent) > MAX_LENT:
            os.close(self._lent.popitem(last=False)[1])

    def lent(self, span: int) -> int | None:
        """Return the descriptor of a file that holds the bytes of `span`, if it was lent; good until the next await."""
        return self._lent.get(span)

    def _wake(self, span: int, number: int) -> None:
        demand = self._demands.pop(span, None)
        if demand is not None:
            demand.error = number
            demand.event.set()

    def touch(self, spans: range) -> None:
        """Tell the fetcher of spans used for the first time by this server; a lost message does no harm."""
        for span in spans:
            if not self._touched[span]:
                self._touched[span] = 1
                if self._socket is not None:
                    with suppress(OSError):
                        os.write(self._socket.fileno(), wire.encode(wire.Touch(span)))

    async def want(self, spans: range, ahead_end: int, file: Callable[[], str]) -> None:
        """Return when every span of `spans` was seen inflated or lent; the file goes on to span `ahead_end`.

        `file` tells its path, for the log. Raises OSError: EIO (or what the fetcher says) when a span cannot be had
        within the budget.
        """
        await self._wait(spans, file, partial(self._want, spans, ahead_end))

    async def doubt(self, spans: range, file: Callable[[], str]) -> None:
        """Return when the fetcher has looked at every span of `spans`, whose bytes are short or wrong.

        Raises OSError as `want` does.
        """
        await self._wait(spans, file, partial(self._doubt, spans))

    async def _wait(self, spans: range, file: Callable[[], str], ask: Callable[[], Awaitable[None]]) -> None:
        """Run `ask` within the budget of a read, and count the time."""
        self._counters.add("spans_awaited", len(spans))
        awaited = Awaited(spans, file, lambda: self._obstacle(spans))
        wait = self._waits.begin(awaited)
        if len(self._waits) == 1:
            signal.setitimer(signal.ITIMER_REAL, _UNBLOCK_S, _UNBLOCK_S)
        try:
            with trio.fail_after(self._budget):
                await ask()
        except trio.TooSlowError:
            _log.warning(
                "read gave up waiting",
                extra={"layer": self._layer, **awaited.fields(), "budget_s": self._budget},
            )
            raise OSError(errno.EIO, "span did not arrive in time") from None
        finally:
            self._waits.end(wait)
            if not len(self._waits):
                signal.setitimer(signal.ITIMER_REAL, 0)

    def _obstacle(self, spans: range) -> str:
        """Return what the first span that is not there waits for."""
        if not self._connected:
            return "a fetcher"
        for span in spans:
            match self._view.state(span):
                case SpanState.MISSING:
                    return f"span {span} from the registry"
                case SpanState.FETCHED:
                    return f"span {span} to be inflated"
        return "nothing any more"

    async def _want(self, spans: range, ahead_end: int) -> None:
        for span in spans:
            while not self._has(span):
                with self._demand(span) as demand:
                    if self._has(span):
                        break
                    await self._ask(wire.Want(span, spans.stop, max(spans.stop, ahead_end)))
                    await demand.answered(span)

    async def _doubt(self, spans: range) -> None:
        for span in spans:
            with self._demand(span) as demand:
                await self._ask(wire.Doubt(span))
                await demand.answered(span)

    def _has(self, span: int) -> bool:
        return self._view.state(span) is SpanState.INFLATED or span in self._lent

    async def _ask(self, want: wire.Want | wire.Doubt) -> None:
        """Send the demand. Without a fetcher nothing is lost: `run` asks again when there is one."""
        if self._socket is not None:
            with suppress(OSError, trio.ClosedResourceError):
                await self._send(self._socket, want)

    async def _send(self, sock: trio.socket.SocketType, want: wire.Want | wire.Doubt) -> None:
        """Send when there is room. One at a time: two tasks may not wait for room in one socket."""
        async with self._sending:
            await sock.send(wire.encode(want))

    @contextmanager
    def _demand(self, span: int) -> Iterator[_Demand]:
        demand = self._demands.setdefault(span, _Demand())
        demand.readers += 1
        try:
            yield demand
        finally:
            demand.readers -= 1
            if not demand.readers and self._demands.get(span) is demand:
                del self._demands[span]
