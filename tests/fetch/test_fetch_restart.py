"""The process: killed at any moment, started again, ended politely; and disks that lose bytes meanwhile."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from snapshotter.layer.spans import SpanState
from tests.conftest import ExpectedLogs
from tests.fetch.rig import Layer, Rig, Server, make_layer, settle
from tests.support.process import is_alive
from tests.support.registry import Registry, Slow


def read_everything(server: Server, layer: Layer) -> None:
    for span in range(len(layer.spans)):
        assert server.read(span) == layer.content(span)


def damage(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0xFF]))


def test_killed_under_load_and_started_again_every_byte_is_right(tmp_path: Path, registry: Registry) -> None:
    layer = make_layer(size=8 << 20)
    registry.fault(Slow(path="/blobs/", count=-1, rate=2e7))
    chance = random.Random(7)
    with Rig(tmp_path, registry, process=True, options={"background_connections": 2}) as rig:
        rig.add(layer)
        for _ in range(4):
            rig.open(layer, background=True)
            server = rig.connect(layer)
            for span in chance.sample(range(len(layer.spans)), 20):
                server.want(span)
            time.sleep(chance.uniform(0.05, 0.4))
            rig.kill()
            rig.start()
        registry.clear_faults()
        rig.open(layer, background=True)
        readers = [
            threading.Thread(target=read_everything, args=(rig.connect(layer), layer)) for _ in range(2)
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(60)
            assert not reader.is_alive()
        assert set(rig.states(layer)) == {SpanState.INFLATED}
        rig.wait_verified(layer)
        assert rig.store.paths(layer.digest).blob.read_bytes() == layer.blob


def test_after_a_kill_what_is_stored_is_checked_and_not_fetched(tmp_path: Path, registry: Registry) -> None:
    layer = make_layer()
    with Rig(tmp_path, registry, process=True) as rig:
        rig.add(layer)
        read_everything(rig.connect(layer), layer)
        rig.kill()
        registry.clear_requests()
        rig.start()
        rig.open(layer)
        assert set(rig.states(layer)) == {SpanState.SUSPECT}
        read_everything(rig.connect(layer), layer)
        assert rig.ranges() == []
        assert rig.count("spans_checked") == len(layer.spans)
        assert rig.count("spans_damaged") == 0


def test_after_hanging_up_what_is_stored_is_believed(tmp_path: Path, registry: Registry) -> None:
    layer = make_layer()
    with Rig(tmp_path, registry, process=True) as rig:
        rig.add(layer)
        read_everything(rig.connect(layer), layer)
        rig.stop()
        rig.start()
        rig.open(layer)
        assert set(rig.states(layer)) == {SpanState.INFLATED}
        read_everything(rig.connect(layer), layer)
        assert rig.count("spans_checked") == 0


def test_sigterm_is_as_polite_as_hanging_up(tmp_path: Path, registry: Registry) -> None:
    layer = make_layer()
    with Rig(tmp_path, registry, process=True) as rig:
        rig.add(layer)
        rig.connect(layer).read(3)
        os.kill(rig.pid, signal.SIGTERM)
        rig.wait_for(lambda: not is_alive(rig.pid), "the end of the process")
        rig.stop()
        rig.start()
        rig.open(layer)
        assert rig.states(layer)[3] is SpanState.INFLATED


def test_hanging_up_ends_the_process_at_once_in_the_middle_of_everything(
    tmp_path: Path, registry: Registry
) -> None:
    layer = make_layer(size=8 << 20)
    registry.fault(Slow(path="/blobs/", count=-1, rate=1e5))
    with Rig(tmp_path, registry, process=True) as rig:
        rig.add(layer)
        rig.open(layer, background=True)
        rig.connect(layer).want(0, 20)
        rig.wait_for(lambda: len(rig.ranges()) >= 2, "transfers")
        began = time.monotonic()
        rig.stop()
        assert time.monotonic() - began < 30, "the transfers would take 80 s"


@pytest.fixture
def complete(tmp_path: Path, registry: Registry) -> Layer:
    """A layer that was read and verified before the host went down."""
    layer = make_layer()
    with Rig(tmp_path, registry, options={"boot_id": "before"}) as rig:
        rig.add(layer)
        read_everything(rig.connect(layer), layer)
        rig.wait_verified(layer)
    registry.clear_requests()
    return layer


def test_after_a_reboot_a_damaged_blob_is_noticed_and_fetched_again(
    tmp_path: Path, registry: Registry, complete: Layer
) -> None:
    with Rig(tmp_path, registry, options={"boot_id": "after"}) as rig:
        rig.add(complete)
        damage(rig.store.paths(complete.digest).blob, complete.spans[5].compressed_start + 7)
        rig.open(complete)
        assert set(rig.states(complete)) == {SpanState.SUSPECT}
        read_everything(rig.connect(complete), complete)
        assert rig.times_fetched(complete) == {5: 1}
        assert rig.count("spans_damaged") == 1
        rig.wait_verified(complete)
        assert rig.store.paths(complete.digest).blob.read_bytes() == complete.blob


def test_after_a_reboot_damaged_data_is_noticed_and_inflated_again(
    tmp_path: Path, registry: Registry, complete: Layer
) -> None:
    with Rig(tmp_path, registry, options={"boot_id": "after"}) as rig:
        rig.add(complete)
        damage(rig.store.paths(complete.digest).data, complete.spans[5].uncompressed_start + 7)
        rig.open(complete)
        read_everything(rig.connect(complete), complete)
        assert rig.ranges() == []
        assert rig.count("spans_damaged") == 1


def test_after_a_reboot_the_background_checks_everything_without_the_network(
    tmp_path: Path, registry: Registry, complete: Layer
) -> None:
    with Rig(tmp_path, registry, options={"boot_id": "after"}) as rig:
        rig.add(complete)
        rig.open(complete, background=True)
        rig.wait_verified(complete)
        assert rig.ranges() == []
        assert set(rig.states(complete)) == {SpanState.INFLATED}


@pytest.mark.parametrize("what", ["span", "header", "truncated"])
def test_after_a_reboot_the_background_mends_what_is_damaged(
    tmp_path: Path, registry: Registry, complete: Layer, what: str
) -> None:
    with Rig(tmp_path, registry, options={"boot_id": "after"}) as rig:
        rig.add(complete)
        blob = rig.store.paths(complete.digest).blob
        border = complete.spans[10].compressed_start
        if what == "truncated":
            os.truncate(blob, border)
        else:
            damage(blob, 1 if what == "header" else complete.spans[5].compressed_start + 7)
        rig.open(complete, background=True)
        rig.wait_verified(complete)
        assert blob.read_bytes() == complete.blob
        assert rig.count("layers_mismatched") == 0
        fetched = rig.times_fetched(complete)
        assert max(fetched.values()) == 1
        cut_off = {span.id for span in complete.spans if span.compressed_end > border}
        assert set(fetched) == {"span": {5}, "header": {0}, "truncated": cut_off}[what]


def test_a_second_fetcher_does_not_get_a_layer_that_is_in_use(
    tmp_path: Path, registry: Registry, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("layer cannot be opened")
    layer = make_layer()
    with Rig(tmp_path, registry) as first, Rig(tmp_path, registry) as second:
        first.add(layer)
        second.add(layer)
        first.open(layer)
        assert "another fetcher" in second.open_error(layer.digest)


def test_an_idle_fetcher_does_nothing(tmp_path: Path, registry: Registry) -> None:
    layer = make_layer()
    with Rig(tmp_path, registry, process=True) as rig:
        rig.add(layer)
        rig.open(layer, background=True)
        rig.wait_verified(layer)
        assert any(_switches_in_a_second(rig.pid) <= 2 for _ in range(20)), "it comes to rest, and rests"


def _switches_in_a_second(pid: int) -> int:
    before = _switches(pid)
    settle(1.0)
    return _switches(pid) - before


def _switches(pid: int) -> int:
    """Return how often the threads of `pid` have gone to sleep."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        for line in (task / "status").read_text().splitlines():
            if line.startswith("voluntary_ctxt_switches"):
                total += int(line.split()[1])
    return total


def test_wrong_options_end_the_process_with_a_reason() -> None:
    command = [
        sys.executable,
        "-m",
        "snapshotter.fetch",
        "--control",
        "0",
        "--counters",
        "0",
        "--events",
        "0",
        "--root",
        "/",
    ]
    ended = subprocess.run([*command, "--options", '{"nonsense": 1}'], capture_output=True, check=False)
    assert ended.returncode == 78
    assert b"nonsense" in ended.stderr
