"""/metrics: what is said, that it can be read, and that it never goes backwards."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from snapshotter.daemon import web
from snapshotter.daemon.credentials import Family
from snapshotter.daemon.metrics import SERVER_GAUGES, Collector
from snapshotter.daemon.phases import BUCKETS_S, Phase, Phases, Timings
from snapshotter.daemon.reference_metrics import LayerNumbers, ReferenceCollector
from snapshotter.daemon.totals import Totals
from snapshotter.errors import ConfigError
from snapshotter.fetch.counters import NAMES as FETCH_NAMES
from snapshotter.fetch.counters import WAIT_NAMES
from snapshotter.fuse.counters import NAMES as SERVE_NAMES
from snapshotter.units import sha256_digest
from tests.support.process import free_port, wait_until


class Numbers:
    """Numbers that a test sets."""

    def __init__(self) -> None:
        self.states = {"asleep": 2, "awake": 1, "waking": 0}
        self.serving = dict.fromkeys(SERVE_NAMES, 0)
        self.fetching = dict.fromkeys(FETCH_NAMES, 0)
        self.reasons: dict[str, int] = {}
        self.steps = Phases()
        self.mounted: list[LayerNumbers] = []
        self.well: dict[str, Any] = {"ok": True, "missing": []}

    def mounts(self) -> Mapping[str, int]:
        return self.states

    def served(self) -> Mapping[str, int]:
        return self.serving

    def fetched(self) -> Mapping[str, int]:
        return self.fetching

    def fallbacks(self) -> Mapping[str, int]:
        return self.reasons

    def registry(self) -> Iterator[Family]:
        yield Family("soci_registry_requests", "Calls.", ("host", "outcome"), True, [(("r", "ok"), 3)])
        yield Family("soci_registry_host_resting", "Rest.", ("host",), False, [(("r",), True)])

    def phases(self) -> Mapping[Phase, Timings]:
        return self.steps.snapshot()

    def layers(self) -> list[LayerNumbers]:
        return self.mounted


def serve(numbers: Numbers, network: str, address: str) -> Callable[[], None]:
    collectors = (Collector(numbers), ReferenceCollector(numbers))
    return web.serve(collectors, lambda: numbers.well, network, address)


@pytest.fixture
def numbers() -> Numbers:
    return Numbers()


Scrape = Callable[[], str]


@pytest.fixture
def scrape(numbers: Numbers) -> Iterator[Scrape]:
    port = free_port()
    stop = serve(numbers, "tcp", f"127.0.0.1:{port}")
    yield lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60).read().decode()
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
        gauge = name in SERVER_GAUGES
        base = name.removesuffix("us") + "seconds" if name.endswith("_us") else name
        assert (sample or f"soci_serve_{base}{'' if gauge else '_total'}") in found, name
    for name in FETCH_NAMES:
        if not name.startswith(("wait_", "offline_")):
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


def test_times_until_layers_are_offline_are_a_histogram(numbers: Numbers, scrape: Scrape) -> None:
    numbers.fetching |= {"offline_le_5s": 2, "offline_longer": 1, "offline_milliseconds": 4_008_500}
    values = {
        (sample.name, sample.labels.get("le")): sample.value
        for sample in families(scrape())["soci_layer_offline_seconds"].samples
    }
    assert values["soci_layer_offline_seconds_bucket", "2.0"] == 0
    assert values["soci_layer_offline_seconds_bucket", "5.0"] == 2
    assert values["soci_layer_offline_seconds_bucket", "3600.0"] == 2
    assert values["soci_layer_offline_seconds_count", None] == 3
    assert values["soci_layer_offline_seconds_sum", None] == 4008.5
    assert not [name for name in families(scrape()) if name.startswith("soci_fetch_offline")]


def test_steps_are_a_histogram_with_failures(numbers: Numbers, scrape: Scrape) -> None:
    for seconds in (0.0005, 0.003, 0.003, 100.0):
        numbers.steps.observe(Phase.COMPILE, seconds)
    with pytest.raises(ConfigError), numbers.steps.timed(Phase.COMPILE, "sha256:layer"):
        raise ConfigError("broken")
    with pytest.raises(ConfigError), numbers.steps.timed(Phase.INDEX, "sha256:image", answers=(ConfigError,)):
        raise ConfigError("an answer")
    found = samples(scrape())
    assert found["soci_phase_seconds_bucket 0.001 compile"] == 1
    assert found["soci_phase_seconds_bucket 0.004 compile"] == 3
    assert found["soci_phase_seconds_bucket 16.384 compile"] == 3
    assert found["soci_phase_seconds_bucket +Inf compile"] == found["soci_phase_seconds_count compile"] == 4
    assert found["soci_phase_seconds_sum compile"] == pytest.approx(100.0065)
    assert found["soci_phase_failures_total compile"] == 1
    assert found["soci_phase_failures_total index"] == 0
    assert found["soci_phase_seconds_count index"] == 1
    assert len(BUCKETS_S) == 15


# --- under the reference's names


def test_the_reference_s_names_and_labels(numbers: Numbers, scrape: Scrape) -> None:
    numbers.serving |= {"requests_read": 7, "spans_awaited": 3, "read_bytes": 1000, "failures_lookup": 2}
    numbers.fetching["background_ranges"] = 4
    numbers.reasons["unpack-failed"] = 5
    numbers.steps.observe(Phase.PROVIDE, 0.3)
    found = samples(scrape())
    counts = "soci_fs_operation_count"
    assert found[f"{counts}  synchronous_read_count"] == 7
    assert found[f"{counts}  synchronous_read_remote_registry_fetch_count"] == 3
    assert found[f"{counts}  fuse_node_lookup_failure_count"] == 2
    assert found[f"{counts}  background_span_fetch_count"] == 4
    assert found[f"{counts}  local_mount_failure_count"] == 5
    assert found["soci_fs_bytes_served  synchronous_bytes_served"] == 1000
    durations = "soci_fs_operation_duration_milliseconds"
    assert found[f"{durations}_bucket  256.0 mount"] == 0
    assert found[f"{durations}_bucket  512.0 mount"] == 1
    assert found[f"{durations}_sum  mount"] == 300
    assert families(scrape())[durations].type == "histogram"


def test_layers_and_images_have_series_as_long_as_they_are_mounted(numbers: Numbers, scrape: Scrape) -> None:
    one, two = (sha256_digest(name) for name in (b"one", b"two"))
    counters = {"requests_lookup": 3, "requests_read": 1}
    numbers.mounted = [
        LayerNumbers(one, "sha256:image", "/m/1", 100, 60, counters),
        LayerNumbers(two, "sha256:image", "/m/2", 200, 200, counters),
    ]
    found = samples(scrape())
    assert found[f"soci_fs_layer_size_bytes {one} /m/1"] == 100
    assert found[f"soci_fs_layer_fetched_size_bytes {one} /m/1"] == 60
    assert found["soci_fs_image_operation_count_key sha256:image node.Lookup"] == 6
    assert found["soci_fs_image_operation_count_key sha256:image file.Read"] == 2
    numbers.mounted.pop()
    found = samples(scrape())
    assert found["soci_fs_image_operation_count_key sha256:image node.Lookup"] == 3
    assert not [name for name in found if "/m/2" in name]


def test_promtool_finds_nothing_but_the_reference_s_own_names(numbers: Numbers, scrape: Scrape) -> None:
    numbers.mounted = [LayerNumbers(sha256_digest(b"one"), "sha256:image", "/m/1", 100, 60, {})]
    result = subprocess.run(
        ["promtool", "check", "metrics"], input=scrape(), capture_output=True, text=True, check=False
    )
    said = [line.split()[0] for line in (result.stdout + result.stderr).splitlines() if line]
    assert set(said) == {"soci_fs_operation_duration_milliseconds"}, result.stderr


# --- well or not


def test_health(numbers: Numbers) -> None:
    port = free_port()
    stop = serve(numbers, "tcp", f"127.0.0.1:{port}")
    url = f"http://127.0.0.1:{port}/healthz"
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            assert json.loads(answer.read()) == {"ok": True, "missing": []}
        numbers.well = {"ok": False, "missing": ["fetcher"]}
        with pytest.raises(HTTPError) as unwell:
            urllib.request.urlopen(url, timeout=60)
        with unwell.value:
            assert unwell.value.code == 503
            assert json.loads(unwell.value.read()) == numbers.well
    finally:
        stop()


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

    def scraped(times: int) -> None:
        """Wait until a scraper has begun and ended so often more."""
        goal = len(seen) + times
        wait_until(lambda: len(seen) >= goal, timeout=60, what="the scrapers scrape")

    threads = [threading.Thread(target=scrape) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in list(mounts):
        ended = mounts.pop(number)
        if number % 20 == 0:
            scraped(4)
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
    stop = serve(numbers, "unix", str(path))
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
    serve(numbers, "unix", path)()


def test_anything_else_does_not(numbers: Numbers, workdir: Path) -> None:
    path = workdir / "precious"
    path.write_text("data")
    with pytest.raises(ConfigError, match=r"metrics_address.*not a socket"):
        serve(numbers, "unix", str(path))
    assert path.read_text() == "data"


def test_a_port_that_is_taken_is_an_error(numbers: Numbers) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        serve(numbers, "tcp", f"127.0.0.1:{taken.getsockname()[1]}")


def test_a_scraper_that_hangs_keeps_nobody_away(numbers: Numbers) -> None:
    port = free_port()
    stop = serve(numbers, "tcp", f"127.0.0.1:{port}")
    with socket.create_connection(("127.0.0.1", port)):
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60).read()
        assert b"soci_lazy_mounts" in text
        stop()


def test_a_scraper_that_goes_away_is_no_traceback(
    numbers: Numbers, workdir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = str(workdir / "metrics.sock")
    stop = serve(numbers, "unix", path)
    for _ in range(5):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            sock.send(b"GET /metrics HTTP/1.0\r\n\r\n")
    stop()
    assert capfd.readouterr().err == ""


def test_nothing_stays_open(numbers: Numbers) -> None:
    before = sockets()
    serve(numbers, "tcp", f"127.0.0.1:{free_port()}")()
    assert sockets() - before == set()  # of an earlier test's some may have been closed meanwhile


def sockets() -> set[str]:
    """Return the sockets of this process, by their numbers in the kernel."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing
            found.add(os.readlink(f"/proc/self/fd/{fd}"))
    return {name for name in found if name.startswith("socket:")}


def test_hosts_have_their_own_numbers(scrape: Scrape) -> None:
    text = scrape()
    assert 'soci_registry_requests_total{host="r",outcome="ok"} 3.0' in text
    assert 'soci_registry_host_resting{host="r"} 1.0' in text
