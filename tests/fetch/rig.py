"""A fetcher between a daemon and layer servers played by a test, over real sockets, files and HTTP.

    with Registry() as registry, Rig(tmp_path, registry) as rig:
        layer = rig.add(make_layer())
        rig.open(layer)
        server = rig.connect(layer)
        assert server.read(3) == layer.content(3)

The fetcher runs in a thread of this process (a trio run of its own), or with `process=True` as the
program that the daemon starts. The played daemon answers every question for a source, as `Rig.source` says.

Concurrency: one test drives a rig; the daemon's side has a thread.
"""

from __future__ import annotations

import errno
import functools
import gzip
import json
import os
import random
import select
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import trio

from snapshotter import messages
from snapshotter.counters import CounterPage
from snapshotter.events import Event, EventRing
from snapshotter.fetch import control
from snapshotter.fetch.counters import NAMES
from snapshotter.fetch.options import Options
from snapshotter.fetch.service import Service
from snapshotter.layer import wire
from snapshotter.layer.compile import compile_tree
from snapshotter.layer.spans import SpanState, SpanView
from snapshotter.layer.store import LayerPaths, LayerStore
from snapshotter.registry.source import BlobSource
from snapshotter.units import Digest
from snapshotter.ztoc.build import build
from snapshotter.ztoc.model import Algorithm
from snapshotter.ztoc.spans import Span, spans_of
from tests.support.images import Entry, directory, tar
from tests.support.process import wait_until
from tests.support.registry import Registry

PATIENCE = 60.0
"""Seconds after which a test that waits for the fetcher fails."""

TRIES = 8
"""Times that a server asks for a span that is evicted in between."""

OPTIONS: Mapping[str, Any] = {
    "log_level": "debug",
    "read_budget_s": PATIENCE / 2,
    "read_timeout_s": PATIENCE / 3,
    "background_quiet_s": 0.1,
}


@dataclass(frozen=True)
class Layer:
    """A layer as it is in the registry and as it has to come out."""

    blob: bytes
    tar: bytes
    ztoc: bytes
    digest: Digest
    spans: tuple[Span, ...]
    tree: bytes

    def content(self, span: int) -> bytes:
        """Return the inflated bytes of `span`."""
        return self.tar[self.spans[span].uncompressed_start : self.spans[span].uncompressed_end]

    def compressed(self, span: int) -> bytes:
        """Return the bytes of `span` in the blob."""
        return self.blob[self.spans[span].compressed_start : self.spans[span].compressed_end]


@functools.cache
def make_layer(
    *, size: int = 1 << 20, span_size: int = 1 << 15, seed: int = 1, compression: str = "gzip"
) -> Layer:
    """Return a layer of about `size` bytes of tar; half of it does not compress."""
    source = random.Random(seed)
    files: dict[str, Entry | bytes] = {"etc/": directory()}
    for number in range(8):
        pieces = (
            source.randbytes(512) + bytes([source.randrange(256)]) * 512 for _ in range(size // (8 * 1024))
        )
        files[f"etc/file{number}"] = b"".join(pieces)
    content = tar(files)
    blob = gzip.compress(content, 6, mtime=0) if compression == "gzip" else content
    algorithm = Algorithm.GZIP if compression == "gzip" else Algorithm.UNCOMPRESSED
    built = build([blob], algorithm=algorithm, span_size=span_size)
    tree = compile_tree(built.ztoc, ztoc_digest=built.digest)
    return Layer(blob, content, built.data, built.layer_digest, spans_of(built.ztoc), tree)


def put(store: LayerStore, layer: Layer) -> None:
    """Store what the daemon stores of a layer: its zTOC and tree."""

    def write(fd: int) -> None:
        assert os.write(fd, layer.tree) == len(layer.tree)

    store.write_ztoc(layer.digest, layer.ztoc)
    store.write_tree(layer.digest, write)


def misnamed(layer: Layer) -> Layer:
    """Return `layer` under a digest that its blob does not have: every span is right, the whole is not."""
    return replace(layer, digest=Digest("sha256:" + "5a" * 32))


@dataclass
class Rig:
    """One fetcher with its daemon. The module's docstring is its manual."""

    root: Path
    registry: Registry
    process: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    source: Callable[[control.NeedSource], control.FromDaemon | None] | None = None
    """How the daemon answers; by default with the blob's place in the registry. None: not at all."""

    def __post_init__(self) -> None:
        self.store = LayerStore(self.root)
        self.questions: list[control.NeedSource] = []
        self.completions: list[control.Complete] = []
        self.servers: list[Server] = []
        self._opened: dict[Digest, str] = {}
        self._blobs: dict[Digest, Digest] = {}
        """What the registry calls the blob of each layer."""
        self._page = CounterPage.create("fetcher", NAMES)
        self._counters = CounterPage(self._page, NAMES, writable=False)
        self._ring = EventRing.create("events")
        self._child: subprocess.Popen[bytes] | None = None
        self._hearing = threading.Event()
        self._hearing.set()
        self._threads: list[threading.Thread] = []
        self.failure: BaseException | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._counters.close()
        os.close(self._page)
        os.close(self._ring)
        if self.failure is not None:
            raise self.failure

    # ---- the fetcher's life ----

    def start(self) -> None:
        """Start a fetcher."""
        self._control, theirs = messages.pair()
        if self.process:
            self._start_process(theirs)
        else:
            self._start_thread(theirs)
        listener = threading.Thread(target=self._listen, args=(self._control,))
        listener.start()
        self._threads.append(listener)

    def _start_thread(self, theirs: socket.socket) -> None:
        options = Options(**{**OPTIONS, **self.options})
        page = CounterPage(self._page, NAMES, writable=True)
        service = Service(theirs, self.store, page, EventRing(self._ring, writable=True), options)

        def run() -> None:
            try:
                trio.run(service.run)
            except BaseException as error:  # noqa: BLE001  raised again where the rig is left
                self.failure = error
            finally:
                theirs.close()

        self._service = threading.Thread(target=run)
        self._service.start()
        self._threads.append(self._service)

    def _start_process(self, theirs: socket.socket) -> None:
        options = json.dumps({**OPTIONS, **self.options, "log_level": "warning"})
        command = [sys.executable, "-m", "snapshotter.fetch", "--root", str(self.root)]
        command += [
            "--control",
            str(theirs.fileno()),
            "--counters",
            str(self._page),
            "--events",
            str(self._ring),
        ]
        command += ["--options", options]
        self._child = subprocess.Popen(command, pass_fds=(theirs.fileno(), self._page, self._ring))
        theirs.close()

    def kill(self) -> None:
        """Kill the fetcher's process, as `kill -9` does."""
        assert self._child is not None
        self._child.kill()
        self._end()

    def stop(self) -> None:
        """Hang up on the fetcher and wait until it has gone; nothing happens when it has been stopped."""
        if self._control.fileno() < 0:
            return
        self._control.shutdown(socket.SHUT_RDWR)
        self._end()

    def _end(self) -> None:
        for server in self.servers:
            server.close()
        self.servers.clear()
        if self._child is not None:
            self._child.wait(PATIENCE)
            self._child = None
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        self._threads.clear()
        self._control.close()

    @property
    def pid(self) -> int:
        """Process id of a fetcher that is a process."""
        assert self._child is not None
        return self._child.pid

    # ---- the daemon's side ----

    def add(self, layer: Layer) -> Layer:
        """Put the blob into the registry and the zTOC and tree into the store."""
        self._blobs[layer.digest] = self.registry.add_blob(layer.blob)
        put(self.store, layer)
        return layer

    def substitute(self, layer: Layer, blob: bytes) -> None:
        """Let the daemon point at `blob` for `layer`."""
        self._blobs[layer.digest] = self.registry.add_blob(blob)

    def send(self, message: control.Message, *fds: int) -> None:
        """Say `message` to the fetcher."""
        control.send(self._control, message, fds)

    def open(self, layer: Layer, *, background: bool = False, image: str = "") -> None:
        """Open `layer` of `image` and wait until its files are there."""
        self._opened.pop(layer.digest, None)
        self.send(control.Open(layer.digest, background, image))
        wait_until(lambda: layer.digest in self._opened, timeout=PATIENCE, what="layer opened")
        assert self._opened[layer.digest] == ""

    def say_raw(self, packet: bytes) -> None:
        """Send any bytes to the fetcher."""
        self._control.send(packet)

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """Let the daemon read nothing for a while."""
        self._hearing.clear()
        try:
            yield
        finally:
            self._hearing.set()

    def slam(self) -> None:
        """Close the daemon's end without reading what has come."""
        self._control.close()

    def answered(self) -> set[Digest]:
        """Return the layers of which the fetcher has said whether they could be opened."""
        return set(self._opened)

    def send_close(self, layer: Layer) -> None:
        """Say that `layer` is not mounted any more."""
        self.send(control.Close(layer.digest))

    def send_source(self, layer: Layer) -> None:
        """Tell the fetcher where the blob of `layer` is."""
        self.send(control.Source(layer.digest, self.place(layer.digest)))

    def open_error(self, digest: Digest) -> str:
        """Open a layer and return what the fetcher has against that."""
        self.send(control.Open(digest, background=False))
        wait_until(lambda: digest in self._opened, timeout=PATIENCE, what="an answer to open")
        return self._opened[digest]

    def connect(self, layer: Layer) -> Server:
        """Return a server of `layer` that is attached to the fetcher."""
        mine, theirs = messages.pair()
        with theirs:
            self.send(control.Attach(layer.digest), theirs.fileno())
        server = Server(mine, layer, self.store.paths(layer.digest))
        self.servers.append(server)
        return server

    def place(self, layer: Digest) -> BlobSource:
        """Return where the blob of `layer` is."""
        url = f"{self.registry.url}/v2/app/blobs/{self._blobs[layer]}"
        return BlobSource(url, {}, self.registry.host, f"blob {layer}")

    def _listen(self, control_socket: socket.socket) -> None:
        while True:
            # Not recv at once: a deaf daemon must leave what comes in the socket.
            try:
                select.select([control_socket], [], [])
                self._hearing.wait()
                received = control.receive(control_socket)
            except (OSError, ValueError):
                return
            if received is None:
                return
            match received[0]:
                case control.NeedSource() as question:
                    self.questions.append(question)
                    default = control.Source(question.layer, self.place(question.layer))
                    answer = self.source(question) if self.source else default
                    if answer is not None:
                        with suppress(OSError):  # the fetcher may have ended meanwhile
                            self.send(answer)
                case control.Opened(digest, error):
                    self._opened[digest] = error
                case control.Complete() as completion:
                    self.completions.append(completion)

    # ---- what can be seen ----

    def count(self, name: str) -> int:
        """Return a counter of the fetcher."""
        return self._counters.snapshot()[name]

    def events(self) -> list[Event]:
        """Return what the fetchers have told of."""
        ring = EventRing(self._ring, writable=False)
        try:
            return ring.snapshot()
        finally:
            ring.close()

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        """Wait until `condition` holds."""
        wait_until(condition, timeout=PATIENCE, what=what)

    def wait_verified(self, layer: Layer) -> None:
        """Wait until the fetcher says that all of `layer` is there and right."""
        done = control.Complete(layer.digest, verified=True)
        self.wait_for(lambda: done in self.completions, "layer verified")

    def states(self, layer: Layer) -> list[SpanState]:
        """Return the states of all spans as a server sees them."""
        with self.store.paths(layer.digest).spans.open("rb") as file:
            view = SpanView(file.fileno())
        try:
            return [SpanState(state) for state in view.states()]
        finally:
            view.close()

    def ranges(self) -> list[tuple[int, int]]:
        """Return the byte ranges that the registry was asked for, oldest first, end exclusive."""
        found = []
        for request in self.registry.matching(path="/blobs/|/storage/", method="GET"):
            first, _, last = request.headers["range"].removeprefix("bytes=").partition("-")
            found.append((int(first), int(last) + 1))
        return found

    def times_fetched(self, layer: Layer) -> Counter[int]:
        """Return how often each span was asked for as a whole."""
        counts: Counter[int] = Counter()
        for start, end in self.ranges():
            counts.update(
                s.id for s in layer.spans if start <= s.compressed_start and s.compressed_end <= end
            )
        return counts


class Evicted(AssertionError):
    """A span that was said to be usable is not."""


class ReadFailed(AssertionError):
    """A span was said to have failed."""


class Server:
    """One layer server as a test plays it: it asks, it is told, and it reads `data`."""

    def __init__(self, sock: socket.socket, layer: Layer, paths: LayerPaths) -> None:
        self._sock = sock
        self._layer = layer
        self._paths = paths
        self.lent: dict[int, bytes] = {}
        """Spans that came with a message instead of in `data`."""
        sock.settimeout(PATIENCE)

    def want(self, first: int, end: int | None = None, ahead_end: int | None = None) -> None:
        """Say that a reader is blocked."""
        end = first + 1 if end is None else end
        self.say(wire.Want(first, end, max(end, ahead_end or 0)))

    def say(self, message: wire.Message) -> None:
        """Send any message."""
        self._sock.send(wire.encode(message))

    def say_raw(self, packet: bytes) -> None:
        """Send any bytes."""
        self._sock.send(packet)

    def hear(self) -> wire.Message | None:
        """Return the next message, None when the fetcher has hung up."""
        packet, fds, _, _ = socket.recv_fds(self._sock, 100, 1)
        if not packet:
            return None
        message = wire.decode(packet)
        if isinstance(message, wire.Lent):
            with open(fds[0], "rb") as file:
                self.lent[message.span] = file.read()
        return message

    def wait(self, *spans: int) -> None:
        """Wait until all of `spans` are said to be usable, or lent; fails when one is not."""
        missing = set(spans)
        while missing:
            message = self.hear()
            if isinstance(message, wire.Lent):
                missing.discard(message.span)
                continue
            if isinstance(message, wire.Failed):
                raise ReadFailed(message)
            assert isinstance(message, wire.Ready), f"{message} instead of Ready"
            missing -= set(range(message.first, message.end))

    def wait_failed(self, span: int) -> int:
        """Wait until `span` is said to have failed; return the errno."""
        message = self.hear()
        assert isinstance(message, wire.Failed), f"{message} instead of Failed"
        assert message.span == span
        return message.errno

    def read(self, span: int) -> bytes:
        """Ask for `span`, wait for it, and return its bytes; again if it was evicted meanwhile."""
        self.lent.pop(span, None)
        for _ in range(TRIES):
            self.want(span)
            self.wait(span)
            if span in self.lent:
                return self.lent[span]
            with suppress(Evicted):
                return self.data(span)
        raise Evicted(span)

    def read_at_last(self, span: int) -> bytes:
        """Return the bytes of `span`, asked for as often as the time of a read is too short for a busy machine."""
        until = time.monotonic() + PATIENCE
        while True:
            self.want(span)
            message = self.hear()
            if isinstance(message, wire.Ready):
                assert message == wire.Ready(span, span + 1)
                return self.data(span)
            assert message == wire.Failed(span, errno.EIO)
            assert time.monotonic() < until, f"span {span} does not come"

    def data(self, span: int) -> bytes:
        """Return what `data` holds of `span`; fails unless its state says that it may be read."""
        with self._paths.spans.open("rb") as file:
            view = SpanView(file.fileno())
        try:
            word = view.word(span)
            if view.state(span) is not SpanState.INFLATED:
                raise Evicted(span)
            where = self._layer.spans[span]
            with self._paths.data.open("rb") as file:
                file.seek(where.uncompressed_start)
                data = file.read(where.uncompressed_end - where.uncompressed_start)
            if view.word(span) != word:  # as a layer server looks again
                raise Evicted(span)
        finally:
            view.close()
        return data

    def close(self) -> None:
        """Go away."""
        self._sock.close()


def settle(seconds: float = 0.15) -> None:
    """Give something that must not happen the time to happen."""
    time.sleep(seconds)
