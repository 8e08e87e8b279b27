"""The daemon's handle on the fetcher: nothing that was said is lost, whatever becomes of the process."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import trio
import trio.testing

from snapshotter.daemon.fetching import FetcherProcess
from snapshotter.errors import ProcessFailed, RegistryRefused, RegistryUnavailable
from snapshotter.fetch import control
from snapshotter.layer import wire
from snapshotter.layer.spans import SpanState, SpanView
from snapshotter.layer.tree import Tree
from snapshotter.registry.source import BlobSource
from snapshotter.units import Digest
from tests.conftest import ExpectedLogs
from tests.support.background import background
from tests.support.lazylayer import LazyLayer, make_layer, make_tar
from tests.support.process import is_alive, wait_until
from tests.support.registry import Registry

OPTIONS = json.dumps({"read_budget_s": 10.0, "log_level": "fatal"})
TAR = make_tar({f"f{number}": os.urandom(50_000) for number in range(8)})


@dataclass
class Rig:
    """What a test has in hand."""

    registry: Registry
    fetcher: FetcherProcess = field(init=False)
    restarts: list[int] = field(default_factory=list)
    completed: list[tuple[Digest, bool]] = field(default_factory=list)
    questions: list[tuple[Digest, bool]] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)
    """What to answer to the next questions instead of the place."""

    async def note_complete(self, layer: Digest, verified: bool, _diff_id: str) -> None:
        self.completed.append((layer, verified))

    async def source_of(self, question: control.NeedSource) -> BlobSource:
        layer, renew = question.layer, question.renew
        self.questions.append((layer, renew))
        if self.failures:
            raise self.failures.pop(0)
        return self.place(layer)

    def place(self, layer: Digest) -> BlobSource:
        return BlobSource(f"{self.registry.url}/v2/app/blobs/{layer}", {}, self.registry.host)

    async def restarted(self, times: int) -> None:
        """Wait until so many fetchers were started."""
        with trio.fail_after(60):
            while len(self.restarts) < times:
                await trio.sleep(0.01)

    def kill(self) -> None:
        assert self.fetcher.pid is not None
        os.kill(self.fetcher.pid, signal.SIGKILL)


class Server:
    """A layer server's end of a socket to the fetcher."""

    def __init__(self, fd: int | None) -> None:
        assert fd is not None
        self._sock = trio.socket.from_stdlib_socket(socket.socket(fileno=fd))

    async def want(self, span: int) -> wire.Message:
        """Ask for a span and return the answer about it."""
        await self._sock.send(wire.encode(wire.Want(span, span + 1, span + 1)))
        with trio.fail_after(60):
            while True:
                answer = wire.decode(await self._sock.recv(wire.PACKET_SIZE))
                if isinstance(answer, wire.Failed) or (
                    isinstance(answer, wire.Ready) and answer.first <= span < answer.end
                ):
                    return answer

    def close(self) -> None:
        self._sock.close()


@pytest.fixture
def layer(workdir: Path, registry: Registry) -> LazyLayer:
    layer = make_layer(workdir, TAR, inflated=False)
    registry.add_blob(layer.blob)
    return layer


def with_fetcher(root: Path, registry: Registry, test: Callable[[Rig], Awaitable[None]]) -> Rig:
    rig = Rig(registry)

    async def main() -> None:
        rig.fetcher = FetcherProcess(
            root,
            options=OPTIONS,
            source_of=rig.source_of,
            on_restart=lambda: rig.restarts.append(1),
            on_complete=rig.note_complete,
        )
        async with background() as nursery:
            nursery.start_soon(rig.fetcher.run)
            with trio.fail_after(120):
                await test(rig)

    trio.run(main)
    return rig


def right(layer: LazyLayer) -> bool:
    """Say whether every span that is said to be inflated has the bytes of the tar."""
    with open(layer.paths.spans, "rb") as file:
        view = SpanView(file.fileno())
    with open(layer.paths.tree, "rb") as file:
        tree = Tree(file.fileno())
    data = layer.paths.data.read_bytes()
    spans = [tree.span(i) for i in range(tree.span_count) if view.state(i) is SpanState.INFLATED]
    view.close()
    tree.close()
    return bool(spans) and all(
        data[each.uncompressed_start : each.uncompressed_end]
        == layer.tar[each.uncompressed_start : each.uncompressed_end]
        for each in spans
    )


def unknown(number: int) -> Digest:
    """Return the digest of a layer that has no files."""
    return Digest(f"sha256:{number:064x}")


# --- the ordinary course


def test_a_server_gets_what_it_asks_for(workdir: Path, registry: Registry, layer: LazyLayer) -> None:
    async def test(rig: Rig) -> None:
        await rig.fetcher.open(layer.digest, background=False, image="")
        server = Server(rig.fetcher.connect(layer.digest))
        assert await server.want(2) == wire.Ready(2, 3)
        assert right(layer)
        assert rig.questions == [(layer.digest, False)]
        assert rig.fetcher.counters()["spans_inflated"] >= 1
        server.close()

    with_fetcher(workdir, registry, test)


def test_the_background_completes_a_layer(workdir: Path, registry: Registry, layer: LazyLayer) -> None:
    async def test(rig: Rig) -> None:
        await rig.fetcher.open(layer.digest, background=True, image="")
        while not rig.completed:
            await trio.sleep(0.01)
        assert rig.completed == [(layer.digest, True)]

    with_fetcher(workdir, registry, test)


def test_what_was_offered_is_not_asked_for(workdir: Path, registry: Registry, layer: LazyLayer) -> None:
    async def test(rig: Rig) -> None:
        await rig.fetcher.open(layer.digest, background=False, image="")
        rig.fetcher.offer(layer.digest, rig.place(layer.digest))
        server = Server(rig.fetcher.connect(layer.digest))
        await server.want(0)
        assert rig.questions == []
        server.close()

    with_fetcher(workdir, registry, test)


def test_a_source_that_cannot_be_found_is_asked_for_again_if_that_may_help(
    workdir: Path, registry: Registry, layer: LazyLayer
) -> None:
    async def test(rig: Rig) -> None:
        rig.failures += [RegistryUnavailable("later"), RegistryRefused("never")]
        await rig.fetcher.open(layer.digest, background=False, image="")
        server = Server(rig.fetcher.connect(layer.digest))
        assert isinstance(await server.want(0), wire.Failed)  # after the second, which is final
        assert len(rig.questions) == 2
        assert await server.want(0) == wire.Ready(0, 1)  # the next read tries afresh
        server.close()

    with_fetcher(workdir, registry, test)


def test_a_layer_that_is_not_open_has_no_socket(workdir: Path, registry: Registry, layer: LazyLayer) -> None:
    async def test(rig: Rig) -> None:
        assert rig.fetcher.connect(layer.digest) is None  # no fetcher either, yet
        await rig.restarted(1)
        assert rig.fetcher.connect(layer.digest) is None
        await rig.fetcher.open(layer.digest, background=False, image="")
        rig.fetcher.close(layer.digest)
        assert rig.fetcher.connect(layer.digest) is None

    with_fetcher(workdir, registry, test)


# --- files that cannot be used


def test_files_that_cannot_be_used_are_named_and_tried_again(
    workdir: Path, registry: Registry, layer: LazyLayer
) -> None:
    whole = layer.paths.tree.read_bytes()
    layer.paths.tree.write_bytes(b"damaged")

    async def test(rig: Rig) -> None:
        for _ in range(2):
            with pytest.raises(ProcessFailed, match=layer.digest):
                await rig.fetcher.open(layer.digest, background=False, image="")
        layer.paths.tree.write_bytes(whole)
        await rig.fetcher.open(layer.digest, background=False, image="")

    with_fetcher(workdir, registry, test)


def test_who_waits_for_a_layer_that_is_closed_is_told(
    workdir: Path, registry: Registry, layer: LazyLayer
) -> None:
    async def test(rig: Rig) -> None:
        await rig.restarted(1)
        assert rig.fetcher.pid is not None
        os.kill(rig.fetcher.pid, signal.SIGSTOP)
        failures = []

        async def wait() -> None:
            with pytest.raises(ProcessFailed, match="closed"):
                await rig.fetcher.open(layer.digest, background=False, image="")
            failures.append(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            rig.fetcher.close(layer.digest)
        assert failures == [1]

    with_fetcher(workdir, registry, test)


# --- a fetcher that dies, or is slow


def test_another_fetcher_is_told_everything_anew(
    workdir: Path, registry: Registry, layer: LazyLayer, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("fetcher ended")

    async def test(rig: Rig) -> None:
        await rig.fetcher.open(layer.digest, background=False, image="")
        first = Server(rig.fetcher.connect(layer.digest))
        await first.want(0)
        counted = rig.fetcher.counters()["spans_inflated"]
        rig.kill()
        await rig.restarted(2)
        second = Server(rig.fetcher.connect(layer.digest))
        assert await second.want(3) == wire.Ready(3, 4)
        assert right(layer)
        assert rig.fetcher.counters()["spans_inflated"] > counted
        first.close()
        second.close()

    with_fetcher(workdir, registry, test)


def test_a_death_while_a_layer_is_opened_is_not_noticed(
    workdir: Path, registry: Registry, layer: LazyLayer, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("fetcher ended")

    async def test(rig: Rig) -> None:
        await rig.restarted(1)
        assert rig.fetcher.pid is not None
        os.kill(rig.fetcher.pid, signal.SIGSTOP)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: rig.fetcher.open(layer.digest, background=False, image=""))
            await trio.testing.wait_all_tasks_blocked()
            rig.kill()

    with_fetcher(workdir, registry, test)


def test_nothing_is_lost_when_the_socket_is_full(workdir: Path, registry: Registry, layer: LazyLayer) -> None:
    """A host that starts opens hundreds of layers and wakes hundreds of servers before the fetcher looks."""

    async def test(rig: Rig) -> None:
        await rig.fetcher.open(layer.digest, background=False, image="")
        before = len(os.listdir("/proc/self/fd"))
        assert rig.fetcher.pid is not None
        os.kill(rig.fetcher.pid, signal.SIGSTOP)
        refused: list[int] = []

        async def open_unknown(number: int) -> None:
            with pytest.raises(ProcessFailed):
                await rig.fetcher.open(unknown(number), background=False, image="")
            refused.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(500):
                nursery.start_soon(open_unknown, number)
            await trio.testing.wait_all_tasks_blocked()
            servers = [Server(rig.fetcher.connect(layer.digest)) for _ in range(100)]
            rig.fetcher.offer(layer.digest, rig.place(layer.digest))
            os.kill(rig.fetcher.pid, signal.SIGCONT)
        await open_unknown(500)  # whose answer comes after the offer has
        assert len(refused) == 501
        for server in servers:
            assert await server.want(1) == wire.Ready(1, 2)
            server.close()
        assert rig.questions == []  # the offer has come, too
        assert len(os.listdir("/proc/self/fd")) < before + 10  # of the registry, which is in this process

    with_fetcher(workdir, registry, test)


def test_what_was_kept_for_a_dead_fetcher_is_dropped(
    workdir: Path, registry: Registry, layer: LazyLayer, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("fetcher ended")

    async def test(rig: Rig) -> None:
        await rig.fetcher.open(layer.digest, background=False, image="")
        before = len(os.listdir("/proc/self/fd"))
        assert rig.fetcher.pid is not None
        os.kill(rig.fetcher.pid, signal.SIGSTOP)
        servers = [Server(rig.fetcher.connect(layer.digest)) for _ in range(600)]
        rig.kill()
        await rig.restarted(2)
        for server in servers:
            server.close()
        await rig.fetcher.open(layer.digest, background=False, image="")
        assert len(os.listdir("/proc/self/fd")) <= before  # some of an earlier test's may have been collected

    with_fetcher(workdir, registry, test)


def test_a_fetcher_that_talks_nonsense_is_replaced(
    workdir: Path,
    registry: Registry,
    layer: LazyLayer,
    monkeypatch: pytest.MonkeyPatch,
    expected_logs: ExpectedLogs,
) -> None:
    expected_logs.allow("fetcher ended")
    program = workdir / "nonsense"
    program.write_text(
        f"#!{sys.executable}\n"
        "import socket, sys, time\n"
        "socket.socket(fileno=int(sys.argv[sys.argv.index('--control') + 1])).send(b'nonsense')\n"
        "time.sleep(60)\n"
    )
    program.chmod(0o700)
    monkeypatch.setattr("snapshotter.daemon.fetching.sys.executable", str(program))

    async def test(rig: Rig) -> None:
        await rig.restarted(2)
        monkeypatch.undo()
        await rig.fetcher.open(layer.digest, background=False, image="")

    with_fetcher(workdir, registry, test)


def test_a_fetcher_that_cannot_live_is_started_with_pauses(
    workdir: Path,
    registry: Registry,
    layer: LazyLayer,
    monkeypatch: pytest.MonkeyPatch,
    expected_logs: ExpectedLogs,
) -> None:
    expected_logs.allow("fetcher ended")
    monkeypatch.setattr("snapshotter.daemon.fetching.sys.executable", "/nonexistent")
    starts: list[float] = []
    original = FetcherProcess._start

    def start(self: FetcherProcess) -> socket.socket:
        starts.append(trio.current_time())
        return original(self)

    monkeypatch.setattr(FetcherProcess, "_start", start)

    async def test(rig: Rig) -> None:
        async with trio.open_nursery() as nursery:
            # What is asked for is known to the first that lives.
            nursery.start_soon(partial(rig.fetcher.open, layer.digest, background=False, image=""))
            while len(starts) < 5:
                await trio.sleep(0.01)
            pauses = [later - earlier for earlier, later in pairwise(starts)]
            least = (0.05, 0.1, 0.2, 0.4)
            assert all(pause > 0.99 * bound for pause, bound in zip(pauses, least, strict=False)), pauses
            monkeypatch.undo()

    with_fetcher(workdir, registry, test)


def test_it_has_no_secret_of_the_daemon_and_ends_with_it(
    workdir: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-of-the-daemon")
    pids: list[int] = []

    async def test(rig: Rig) -> None:
        await rig.restarted(1)
        assert rig.fetcher.pid is not None
        pids.append(rig.fetcher.pid)
        with suppress(FileNotFoundError):
            environ = Path(f"/proc/{rig.fetcher.pid}/environ").read_bytes()
            assert b"a-secret-of-the-daemon" not in environ

    rig = with_fetcher(workdir, registry, test)
    assert rig.fetcher.pid is None
    wait_until(lambda: not is_alive(pids[0]), timeout=60, what="the fetcher has ended")
