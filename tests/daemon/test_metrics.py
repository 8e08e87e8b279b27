"""/metrics: what is said, that it can be read, and that it never goes backwards."""

from __future__ import annotations

import os
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from snapshotter.daemon import metrics
from snapshotter.daemon.metrics import Totals
from snapshotter.errors import ConfigError
from snapshotter.fetch.counters import NAMES as FETCH_NAMES
from snapshotter.fetch.counters import WAIT_NAMES
from snapshotter.fuse.counters import NAMES as SERVE_NAMES
from tests.support.process import free_port


class Numbers:
    """Numbers that a test sets."""

    def __init__(self) -> None:
        self.states = {"asleep": 2, "awake": 1, "waking": 0}
        self.serving = dict.fromkeys(SERVE_NAMES, 0)
        self.fetching = dict.fromkeys(FETCH_NAMES, 0)
        self.reasons: dict[str, int] = {}

    def mounts(self) -> Mapping[str, int]:
        return self.states

    def served(self) -> Mapping[str, int]:
        return self.serving

    def fetched(self) -> Mapping[str, int]:
        return self.fetching

    def fallbacks(self) -> Mapping[str, int]:
        return self.reasons


@pytest.fixture
def numbers() -> Numbers:
    return Numbers()


Scrape = Callable[[], str]


@pytest.fixture
def scrape(numbers: Numbers) -> Iterator[Scrape]:
    port = free_port()
    stop = metrics.serve(numbers, "tcp", f"127.0.0.1:{port}")
    yield lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    stop()


def families(text: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def samples(text: str) -> dict[str, float]:
    """Return every sample under its name and the values of its labels."""
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for family in families(text).values()
        for sample in family.samples
    }


# --- what is said


def test_every_counter_is_there_before_anything_happened(scrape: Scrape) -> None:
    found = samples(scrape())
    assert found["soci_lazy_mounts asleep"] == 2
    for name in SERVE_NAMES:
        kind = name.partition("_")[2]
        sample = {
            "requests": f"soci_fuse_requests_total {kind}",
            "failures": f"soci_fuse_failures_total {kind}",
        }.get(name.partition("_")[0])
        gauge = name in metrics.SERVER_GAUGES
        assert (sample or f"soci_serve_{name}{'' if gauge else '_total'}") in found, name
    for name in FETCH_NAMES:
        if not name.startswith("wait_"):
            assert f"soci_fetch_{name}" in found or f"soci_fetch_{name}_total" in found, name


def test_without_any_mount_the_counters_are_zero_not_absent(numbers: Numbers, scrape: Scrape) -> None:
    numbers.serving = {}
    found = samples(scrape())
    assert found["soci_serve_read_bytes_total"] == found["soci_fuse_requests_total lookup"] == 0


def test_numbers_are_those_of_the_moment(numbers: Numbers, scrape: Scrape) -> None:
    for value in (5, 7):
        numbers.serving["requests_read"] = numbers.serving["failures_read"] = value
        numbers.serving["adoptions"] = numbers.fetching["ondemand_bytes"] = value
        numbers.reasons["no-index"] = value
        found = samples(scrape())
        assert found["soci_fuse_requests_total read"] == value
        assert found["soci_fuse_failures_total read"] == value
        assert found["soci_serve_adoptions_total"] == value
        assert found["soci_fetch_ondemand_bytes_total"] == value
        assert found["soci_not_lazy_layers_total no-index"] == value


def test_types_and_help(scrape: Scrape) -> None:
    found = families(scrape())
    assert found["soci_fuse_requests"].type == "counter"
    assert found["soci_serve_reads_waiting"].type == "gauge"
    assert found["soci_lazy_mounts"].type == "gauge"
    assert found["soci_fetch_wait_seconds"].type == "histogram"
    assert all(family.documentation for family in found.values())


def test_on_demand_and_background_are_told_apart(numbers: Numbers, scrape: Scrape) -> None:
    numbers.fetching |= {"ondemand_ranges": 3, "background_ranges": 4}
    found = samples(scrape())
    assert found["soci_fetch_ondemand_ranges_total"] == 3
    assert found["soci_fetch_background_ranges_total"] == 4


def test_waits_are_a_histogram(numbers: Numbers, scrape: Scrape) -> None:
    for name in WAIT_NAMES:
        numbers.fetching[name] = 2
    numbers.fetching["wait_microseconds"] = 2_500_000
    family = families(scrape())["soci_fetch_wait_seconds"]
    buckets = [sample.value for sample in family.samples if sample.name.endswith("_bucket")]
    assert buckets == [2 * (position + 1) for position in range(len(WAIT_NAMES))]
    values = {sample.name: sample.value for sample in family.samples}
    assert values["soci_fetch_wait_seconds_sum"] == 2.5
    assert values["soci_fetch_wait_seconds_count"] == buckets[-1]


# --- never backwards


def test_a_mount_that_ends_takes_nothing_along() -> None:
    mounts: dict[str, dict[str, int]] = {
        "a": {"requests_read": 5, "reads_waiting": 1},
        "b": {"requests_read": 7, "reads_waiting": 2},
    }
    totals = Totals(lambda: iter(list(mounts.values())))
    assert totals.sum() == {"requests_read": 12, "reads_waiting": 3}
    ended = mounts.pop("a")
    assert totals.sum()["requests_read"] == 12  # on its way out: it is in no list at all
    totals.retire(ended)
    assert totals.sum() == {"requests_read": 12, "reads_waiting": 2}
    mounts["b"]["requests_read"] += 1
    assert totals.sum()["requests_read"] == 13
    totals.retire(mounts.pop("b"))
    assert totals.sum()["requests_read"] == 13


def test_scrapes_beside_ending_mounts_never_go_backwards() -> None:
    mounts = {number: {"requests_read": 10} for number in range(60)}
    totals = Totals(lambda: iter([dict(each) for each in list(mounts.values())]))
    seen: list[int] = []
    done = threading.Event()

    def scrape() -> None:
        while not done.is_set():
            seen.append(totals.sum()["requests_read"])

    threads = [threading.Thread(target=scrape) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in list(mounts):
        ended = mounts.pop(number)
        time.sleep(0)
        totals.retire(ended)
    done.set()
    for thread in threads:
        thread.join()
    assert set(seen) == {600}
    assert totals.sum()["requests_read"] == 600


# --- where


def test_on_a_unix_socket(numbers: Numbers, workdir: Path) -> None:
    path = workdir / "metrics.sock"
    stop = metrics.serve(numbers, "unix", str(path))
    try:
        with closing(HTTPConnection("localhost")) as connection:
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.connect(str(path))
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
    finally:
        stop()
    assert "soci_lazy_mounts" in families(text)


def test_a_socket_that_was_left_behind_makes_way(numbers: Numbers, workdir: Path) -> None:
    path = str(workdir / "metrics.sock")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(path)
    metrics.serve(numbers, "unix", path)()


def test_anything_else_does_not(numbers: Numbers, workdir: Path) -> None:
    path = workdir / "precious"
    path.write_text("data")
    with pytest.raises(ConfigError, match=r"metrics_address.*not a socket"):
        metrics.serve(numbers, "unix", str(path))
    assert path.read_text() == "data"


def test_a_port_that_is_taken_is_an_error(numbers: Numbers) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        metrics.serve(numbers, "tcp", f"127.0.0.1:{taken.getsockname()[1]}")


def test_a_scraper_that_hangs_keeps_nobody_away(numbers: Numbers) -> None:
    port = free_port()
    stop = metrics.serve(numbers, "tcp", f"127.0.0.1:{port}")
    with socket.create_connection(("127.0.0.1", port)):
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read()
        assert b"soci_lazy_mounts" in text
        stop()


def test_a_scraper_that_goes_away_is_no_traceback(
    numbers: Numbers, workdir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = str(workdir / "metrics.sock")
    stop = metrics.serve(numbers, "unix", path)
    for _ in range(5):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            sock.send(b"GET /metrics HTTP/1.0\r\n\r\n")
    stop()
    assert capfd.readouterr().err == ""


def test_nothing_stays_open(numbers: Numbers) -> None:
    before = len(os.listdir("/proc/self/fd"))
    metrics.serve(numbers, "tcp", f"127.0.0.1:{free_port()}")()
    assert len(os.listdir("/proc/self/fd")) == before
