"""A layer server: a pure function of a mount's descriptor, a tree file and a data file.

It is forked from the zygote for one awake layer, adopts the mount, answers requests, and ends when nothing
was asked for a while; the daemon then watches the descriptor and starts another one on the next request.
It owns nothing that anybody would miss: no network, no credentials, no privileges, no writable path.

Its sockets: `control` to the daemon's keeper (end of file: the daemon is gone, so are we; a message brings a
new socket to the fetcher, and asks for one), and `fetcher` (see snapshotter/fuse/spanlink.py).

Concurrency: one trio loop; it leaves only by os._exit, from a point where no request is half answered.
"""

from __future__ import annotations

import functools
import logging
import os
import select
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NoReturn

import pyfuse3
import trio

from snapshotter import counters, messages
from snapshotter.fuse import adoption, kernel
from snapshotter.fuse.arguments import ServeArguments
from snapshotter.fuse.contents import Contents
from snapshotter.fuse.counters import NAMES
from snapshotter.fuse.journal import Journal
from snapshotter.fuse.operations import LayerOperations
from snapshotter.fuse.relay import Relay
from snapshotter.fuse.spanlink import SpanLink
from snapshotter.layer.spans import SpanView
from snapshotter.layer.tree import Tree

_log = logging.getLogger(__name__)

DESCRIPTORS = ("fuse", "journal", "tree", "data", "spans", "counters", "control", "fetcher")
"""What a server is given; `fetcher` is missing while there is none, `journal` where the kernel needs none."""


def preload() -> None:
    """Do once, in the zygote, what every server would do first: import what trio and pyfuse3 import late."""
    trio.run(_touch_lazy_imports)


async def _touch_lazy_imports() -> None:
    await trio.to_thread.run_sync(os.getpid)
    near, far = socket.socketpair()
    wrapped = trio.socket.from_stdlib_socket(near)
    far.send(b"x")
    await wrapped.recv(1)
    wrapped.close()
    far.close()


def serve(arguments: Mapping[str, Any], fds: Mapping[str, int]) -> None:
    """Serve one layer until idle, unmounted, or told to end. Runs in a child of the zygote."""
    told = ServeArguments(**arguments)
    logging.getLogger("pyfuse3").setLevel(logging.CRITICAL)  # it reports every reader that gave up
    page = counters.CounterPage(fds["counters"], NAMES, writable=True)
    page.set("reads_waiting", 0)
    tree = Tree(fds["tree"])
    view = SpanView(fds["spans"])
    page.add("adoptions")  # the keeper has the files of a server that does not come this far looked at
    control = socket.socket(fileno=fds["control"])
    control.setblocking(False)
    link = SpanLink(
        view,
        page,
        layer=told.layer,
        budget=told.read_budget,
        on_lost=functools.partial(_ask_for_fetcher, control),
    )
    relay = Relay(Journal(fds["journal"]), page) if "journal" in fds else None
    operations = LayerOperations(
        tree,
        Contents(tree, fds["data"], view, link, page),
        page,
        relay,
        getxattr_unsupported=told.getxattr_unsupported,
    )
    fuse = os.dup(fds["fuse"])
    adoption.adopt(operations, fds["fuse"], kernel.Init.from_text(told.init), relay)
    trio.run(functools.partial(_main, told, operations, link, page, control, fuse, fds))


async def _main(
    told: ServeArguments,
    operations: LayerOperations,
    link: SpanLink,
    page: counters.CounterPage,
    control: socket.socket,
    fuse: int,
    fds: Mapping[str, int],
) -> NoReturn:
    if "fetcher" in fds:
        link.connect(fds["fetcher"])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        nursery.start_soon(_follow_control, control, link, operations.relay, fds["spans"])
        nursery.start_soon(_sleep_when_idle, operations, page, fuse, told.idle_timeout)
        await pyfuse3.main()
        os._exit(0)  # unmounted
    raise AssertionError("unreachable")


def _ask_for_fetcher(control: socket.socket) -> None:
    with suppress(OSError):  # it has not read the last one yet; or it is gone, and so are we
        messages.send(control, {"op": "fetcher"})


async def _follow_control(control: socket.socket, link: SpanLink, relay: Relay | None, spans: int) -> None:
    """Take new fetcher sockets from the keeper; end with it.

    End, too, when the span file has lost its name: the fetcher writes to another one, which a successor opens.
    """
    while True:
        await trio.lowlevel.wait_readable(control)
        received = messages.receive(control)
        if received is None:
            os._exit(0)
        message, fds = received
        if os.fstat(spans).st_nlink == 0:
            if relay is not None:
                relay.settle()
            os._exit(0)
        if message.get("op") == "fetcher" and len(fds) == 1:
            link.connect(fds[0])


async def _sleep_when_idle(
    operations: LayerOperations, page: counters.CounterPage, fuse: int, idle_timeout: float
) -> None:
    """End the process when a whole period passed without a request, nothing is in flight and nothing waits.

    A request that arrives after the last look stays in the kernel's queue, and the keeper sees it there.
    """
    poll = select.poll()
    poll.register(fuse, select.POLLIN)
    indexes = tuple(operations.request_index.values())
    words = page.words
    last = -1
    while True:
        now = sum(words[index] for index in indexes)
        if now == last and not operations.in_flight and not poll.poll(0):
            if operations.relay is not None:
                operations.relay.settle()
            os._exit(0)
        last = now
        await trio.sleep(idle_timeout)
