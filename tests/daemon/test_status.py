"""`status`: who does what, how every lazy layer is, in JSON and in words."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from snapshotter import reports
from snapshotter.daemon import status
from snapshotter.daemon.fetching import FetcherProcess
from snapshotter.daemon.selftest import SELFTEST_ID
from snapshotter.daemon.status import Status
from snapshotter.errors import ConfigError, UsageError
from snapshotter.fuse.mountpoint import State
from snapshotter.layer.spans import SpanFile
from tests.support.background import background
from tests.support.keeping import Kept, keeping, shell
from tests.support.lazylayer import BOOT_ID, LazyLayer, make_layer, make_tar
from tests.support.process import accepts_connections

TAR = make_tar({f"f{number}": os.urandom(50_000) for number in range(6)})
pytestmark = pytest.mark.usefixtures("fuse")


def with_status(
    root: Path, test: Callable[[Kept, Status], Awaitable[None]], *, not_lazy: str = "", idle: float = 60
) -> None:
    async def main() -> None:
        async with keeping(root, idle_timeout=idle) as kept:
            fetcher = FetcherProcess(
                root,
                options="{}",
                source_of=None,  # type: ignore[arg-type]  # it is not run
                on_restart=lambda: None,
                on_complete=None,  # type: ignore[arg-type]  # nor is it
            )
            await test(
                kept,
                Status(
                    holder=kept.holder,
                    forker=kept.forker,
                    fetcher=fetcher,
                    keeper=kept.keeper,
                    not_lazy=lambda: not_lazy,
                    resting=lambda: ["registry.example"],
                ),
            )

    trio.run(main)


@asynccontextmanager
async def answering(root: Path, status_: Status) -> AsyncIterator[None]:
    """Have the daemon answer on its socket."""
    async with background() as nursery:
        nursery.start_soon(status.serve, root / reports.STATUS, status_.collect)
        with trio.fail_after(60):
            while not await trio.to_thread.run_sync(accepts_connections, root / reports.STATUS):
                await trio.sleep(0.01)
        yield


async def asked(root: Path) -> dict[str, Any]:
    """Return what the command gets from the daemon's socket."""
    return await trio.to_thread.run_sync(reports.ask, root, reports.STATUS)


# --- what is collected


def partly_there(root: Path) -> LazyLayer:
    """Return a layer of which one span is inflated, one fetched, and the others missing."""
    layer = make_layer(root, TAR, inflated=False)
    with open(layer.paths.spans, "rb") as file:
        count = status.SpanView(file.fileno()).span_count
    spans = SpanFile.create_or_open(layer.paths.spans, count, boot_id=BOOT_ID, digest=layer.digest)
    spans.set_fetched(0)
    spans.set_inflated(0, 1)
    spans.set_fetched(1)
    spans.set_fetched_bytes(5000)
    spans.set_inflated_bytes(70_000)
    spans.close()
    return layer


def test_mounts_and_roles(workdir: Path) -> None:
    layer = partly_there(workdir)

    async def test(kept: Kept, status_: Status) -> None:
        target = workdir / "m"
        await kept.keeper.mount(layer.spec(7, target))
        await kept.keeper.mount(layer.spec(SELFTEST_ID, workdir / "selftest"))
        report = status_.collect()
        assert report["pids"] == {
            "daemon": os.getpid(), "holder": kept.holder.pid, "zygote": kept.forker.pid, "fetcher": None,
        }  # fmt: skip
        assert (report["lazy"], report["not_lazy_because"]) == (True, "")
        (mount,) = report["mounts"]
        assert report["circuits"] == {
            "blob_hosts_away": 0, "opened": 0, "registries": ["registry.example"],
        }  # fmt: skip
        assert report["cache_bytes"] == 0
        spans = mount.pop("spans")
        assert mount == {
            "snapshot": 7, "layer": layer.digest, "target": str(target),
            "state": "asleep", "hibernated": True, "pid": None, "verified": False,
            "offline_after_s": None, "fetched_bytes": 5000, "inflated_bytes": 70_000,
        }  # fmt: skip
        assert spans.pop("missing") > 0
        assert spans == {"fetched": 1, "inflated": 1, "suspect": 0}
        await shell(f"ls {target}")
        await kept.until(7, State.AWAKE)
        (mount,) = status_.collect()["mounts"]
        assert (mount["state"], mount["hibernated"]) == ("awake", False)
        assert Path(f"/proc/{mount['pid']}").exists()

    with_status(workdir, test)


def test_mounts_come_by_their_snapshot(workdir: Path) -> None:
    layer = make_layer(workdir, TAR)

    async def test(kept: Kept, status_: Status) -> None:
        for number in (11, 2, 30):
            await kept.keeper.mount(layer.spec(number, workdir / f"m{number}"))
        assert [mount["snapshot"] for mount in status_.collect()["mounts"]] == [2, 11, 30]

    with_status(workdir, test)


@pytest.mark.parametrize("damage", [b"", b"rubbish" * 1000])
def test_span_files_that_cannot_be_read_are_said_to_be_unknown(workdir: Path, damage: bytes) -> None:
    layer = make_layer(workdir, TAR)

    async def test(kept: Kept, status_: Status) -> None:
        await kept.keeper.mount(layer.spec(1, workdir / "m"))
        if damage:
            layer.paths.spans.write_bytes(damage)
        else:
            layer.paths.spans.unlink()
        report = status_.collect()
        assert report["mounts"][0]["spans"] is None
        assert " ? " in status.render(report)

    with_status(workdir, test)


# --- over the socket


def test_the_command_gets_what_the_daemon_says(workdir: Path) -> None:
    layer = make_layer(workdir, TAR)

    async def test(kept: Kept, status_: Status) -> None:
        await kept.keeper.mount(layer.spec(1, workdir / "m"))
        for _ in range(2):  # the socket that is left makes way
            async with answering(workdir, status_):
                assert await asked(workdir) == status_.collect()
                assert (workdir / reports.STATUS).stat().st_mode & 0o777 == 0o600

    with_status(workdir, test)


def test_an_answer_waits_for_what_is_not_known_yet_but_not_for_ever(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(kept: Kept, status_: Status) -> None:
        known, answers = trio.Event(), []

        async def ask() -> None:
            answers.append(await asked(workdir))

        async with background() as nursery:
            nursery.start_soon(status.serve, workdir / reports.STATUS, status_.collect, known)
            with trio.fail_after(30):
                while not await trio.to_thread.run_sync(accepts_connections, workdir / reports.STATUS):
                    await trio.sleep(0.01)
                monkeypatch.setattr(status, "_KNOWN_S", 0.01)
                await ask()
                monkeypatch.setattr(status, "_KNOWN_S", 600.0)
                async with trio.open_nursery() as asking:
                    asking.start_soon(ask)
                    await trio.sleep(0.2)
                    assert len(answers) == 1
                    known.set()
                assert len(answers) == 2

    with_status(workdir, test)


def test_who_asks_and_goes_away_harms_nobody(workdir: Path) -> None:
    async def test(kept: Kept, status_: Status) -> None:
        async with answering(workdir, status_):
            for _ in range(20):
                assert await trio.to_thread.run_sync(accepts_connections, workdir / reports.STATUS)
            assert (await asked(workdir))["pids"]["daemon"] == os.getpid()

    with_status(workdir, test)


def test_a_path_that_is_taken_by_something_else_is_named(workdir: Path) -> None:
    (workdir / reports.STATUS).write_text("not a socket")

    async def test(kept: Kept, status_: Status) -> None:
        with pytest.raises(ConfigError, match="not a socket"):
            await status.serve(workdir / reports.STATUS, status_.collect)

    with_status(workdir, test)


def test_nobody_answers(workdir: Path) -> None:
    with pytest.raises(UsageError, match="is it running, with this --root"):
        reports.ask(workdir, reports.STATUS)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(workdir / reports.STATUS))
        with pytest.raises(UsageError, match="is it running"):
            reports.ask(workdir, reports.STATUS)


def test_an_answer_that_breaks_off_is_an_error(workdir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(workdir / reports.STATUS))
        listener.listen()

        async def main() -> None:
            async def half() -> None:
                peer, _address = await trio.to_thread.run_sync(listener.accept)
                peer.send(b'{"pids": ')
                peer.close()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(half)
                with pytest.raises(UsageError):
                    await trio.to_thread.run_sync(reports.ask, workdir, reports.STATUS)

        trio.run(main)


# --- in words

REPORT: dict[str, Any] = {
    "pids": {"daemon": 1, "holder": 2, "zygote": 3, "fetcher": None},
    "lazy": True,
    "not_lazy_because": "",
    "circuits": {"blob_hosts_away": 0, "opened": 0, "registries": []},
    "cache_bytes": 12_300_000,
    "mounts": [
        {
            "snapshot": 12,
            "layer": "sha256:" + "ab" * 32,
            "target": "/x",
            "state": "awake",
            "hibernated": False,
            "pid": 99,
            "spans": {"missing": 5, "fetched": 2, "inflated": 3, "suspect": 0},
            "verified": True,
            "offline_after_s": 71.23,
            "fetched_bytes": 2_000_000,
            "inflated_bytes": 3_100_000,
        }
    ],
}


def test_a_report_in_words() -> None:
    roles, cache, heading, mount = status.render(REPORT).splitlines()
    assert cache == "cache 12.3 MB"
    assert roles == "daemon 1  holder 2  zygote 3  fetcher -"
    assert heading.split() == ["SNAPSHOT", "LAYER", "STATE", "PID", "SPANS", "MB", "VERIFIED", "AFTER"]
    assert mount.split() == [
        "12", "sha256:abababababab", "awake", "99", "3+2", "of", "10", "5.1", "71.2", "s",
    ]  # fmt: skip
    assert len(heading) <= 100


def test_hosts_that_are_left_alone_are_said() -> None:
    circuits = {"blob_hosts_away": 2, "opened": 5, "registries": ["a.example", "b.example"]}
    line = status.render(REPORT | {"circuits": circuits}).splitlines()[1]
    assert line == "not asked at the moment: 2 hosts of blobs; registries: a.example, b.example"


def test_why_nothing_is_lazy_is_said_first() -> None:
    lines = status.render(REPORT | {"lazy": False, "not_lazy_because": "no /dev/fuse"}).splitlines()
    assert lines[1] == "NOT LAZY: no /dev/fuse"


def test_a_report_without_mounts() -> None:
    assert len(status.render(REPORT | {"mounts": []}).splitlines()) == 3


def test_a_host_that_cannot_be_lazy_says_why(workdir: Path) -> None:
    async def test(kept: Kept, status_: Status) -> None:
        report = json.loads(json.dumps(status_.collect()))
        assert (report["lazy"], report["not_lazy_because"]) == (False, "because")

    with_status(workdir, test, not_lazy="because")
