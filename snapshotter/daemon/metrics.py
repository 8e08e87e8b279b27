"""/metrics: what the counters of all processes say, at the moment of a scrape.

No process but the daemon knows Prometheus; they count into shared pages (snapshotter/counters.py), and this
collector reads the pages. Counters of a mount that is gone are folded into a sum, so that nothing ever
goes backwards.

Concurrency: a scrape runs in prometheus-client's server thread and reads snapshots of plain numbers.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, Protocol
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from snapshotter.daemon.sockets import make_way
from snapshotter.fetch.counters import GAUGES, WAIT_BUCKETS, WAIT_NAMES
from snapshotter.fuse.counters import NAMES, REQUEST_KINDS

_log = logging.getLogger(__name__)


class Numbers(Protocol):
    """Where the numbers come from."""

    def mounts(self) -> Mapping[str, int]:
        """Return how many lazy mounts there are, by state."""

    def served(self) -> Mapping[str, int]:
        """Return the layer servers' counters, summed over all mounts that are or were."""

    def fetched(self) -> Mapping[str, int]:
        """Return the fetcher's counters."""

    def fallbacks(self) -> Mapping[str, int]:
        """Return how often a layer was not lazy, by reason."""


class Collector:
    """Turns numbers into metric families."""

    def __init__(self, numbers: Numbers) -> None:
        self._numbers = numbers

    def collect(self) -> Iterator[Metric]:
        """Yield every family."""
        mounts = GaugeMetricFamily("soci_lazy_mounts", "Lazy mounts by what they do.", labels=["state"])
        for state, count in sorted(self._numbers.mounts().items()):
            mounts.add_metric([state], count)
        yield mounts
        served = {**dict.fromkeys(NAMES, 0), **self._numbers.served()}
        requests = CounterMetricFamily(
            "soci_fuse_requests", "FUSE requests that reached a server.", labels=["kind"]
        )
        failures = CounterMetricFamily("soci_fuse_failures", "FUSE requests that failed.", labels=["kind"])
        for kind in REQUEST_KINDS:
            requests.add_metric([kind], served.get(f"requests_{kind}", 0))
            failures.add_metric([kind], served.get(f"failures_{kind}", 0))
        yield requests
        yield failures
        for name, value in served.items():
            if not name.startswith(("requests_", "failures_")):
                yield _plain("soci_serve_", name, value, gauge=name in SERVER_GAUGES)
        fetched = self._numbers.fetched()
        for name, value in fetched.items():
            if not name.startswith("wait_"):
                yield _plain("soci_fetch_", name, value, gauge=name in GAUGES)
        yield _waits(fetched)
        fallbacks = CounterMetricFamily(
            "soci_not_lazy_layers", "Layers not served lazily.", labels=["reason"]
        )
        for reason, count in sorted(self._numbers.fallbacks().items()):
            fallbacks.add_metric([reason], count)
        yield fallbacks


SERVER_GAUGES = frozenset({"reads_waiting"})
"""Of the servers' counters, those that go down as well."""


def _plain(prefix: str, name: str, value: int, *, gauge: bool) -> Metric:
    family = GaugeMetricFamily if gauge else CounterMetricFamily
    return family(prefix + name, f"{name.replace('_', ' ').capitalize()}.", value=value)


def _waits(fetched: Mapping[str, int]) -> Metric:
    """Return the histogram of how long readers waited for spans, in seconds."""
    buckets, so_far = [], 0
    for bound, name in zip((*map(str, WAIT_BUCKETS), "+Inf"), WAIT_NAMES, strict=True):
        so_far += fetched.get(name, 0)
        buckets.append((bound, float(so_far)))
    family = HistogramMetricFamily(
        "soci_fetch_wait_seconds", "Waits of readers for a span that was not there."
    )
    family.add_metric([], buckets, fetched.get("wait_microseconds", 0) / 1e6)
    return family


class Totals:
    """Counters of mounts: those that are, plus those that were.

    Concurrency: `retire` and `sum` may be called from different threads. Between the end of a mount and its `retire`
    its counts are nowhere; what was told once is therefore never taken back.
    """

    def __init__(self, current: Callable[[], Iterator[Mapping[str, int]]]) -> None:
        self._current = current
        self._past: Counter[str] = Counter()
        self._told: dict[str, int] = {}
        self._lock = threading.Lock()

    def retire(self, counters: Mapping[str, int]) -> None:
        """Keep the counts of a mount that has ended."""
        with self._lock:
            self._past.update({name: n for name, n in counters.items() if name not in SERVER_GAUGES})

    def sum(self) -> dict[str, int]:
        """Return the sums by name."""
        with self._lock:
            total = Counter(self._past)
            for counters in self._current():
                total.update(counters)
            counted = {name: n for name, n in total.items() if name not in SERVER_GAUGES}
            self._told = {name: max(n, self._told.get(name, 0)) for name, n in counted.items()} | {
                name: n for name, n in self._told.items() if name not in counted
            }
            return dict(total) | self._told


def serve(numbers: Numbers, network: str, address: str) -> Callable[[], None]:
    """Serve /metrics at `address` (host:port, or a socket's path with network "unix"); return what stops it.

    Raises OSError or ConfigError when the address cannot be had.
    """
    registry = CollectorRegistry()
    registry.register(Collector(numbers))
    where: Any = address
    if network == "unix":
        make_way(address, "metrics_address")
        server: _Server = _UnixServer(where, _Handler)
    else:
        host, _, port = address.rpartition(":")
        server = _Server((host.strip("[]"), int(port)), _Handler)
    server.set_app(make_wsgi_app(registry))
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop


class _Server(ThreadingMixIn, WSGIServer):
    """One thread per scrape, so that a scraper that hangs keeps nobody else away."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - the base class calls it so
        """Note a scrape that broke off, where the base class would print a traceback."""
        _log.info("a scrape failed", exc_info=True)


class _UnixServer(_Server):
    """The same on a unix socket, which has no host name and no port."""

    address_family = socket.AF_UNIX

    def server_bind(self) -> None:
        """Bind without asking for a host name."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = "localhost", 0
        self.setup_environ()

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection; its peer has no address, and the handler wants one."""
        connection, _address = super().get_request()
        return connection, ("local", 0)


class _Handler(WSGIRequestHandler):
    """Answers without a line on stderr for each scrape."""

    def address_string(self) -> str:
        """Return a name for the peer; on a unix socket it has none."""
        return "local"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class calls it so
        """Say nothing."""
