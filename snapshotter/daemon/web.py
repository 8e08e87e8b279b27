"""The HTTP side of being watched: /metrics for Prometheus, /healthz for whoever only wants yes or no.

Concurrency: one thread accepts, one per request answers; a scrape reads snapshots of plain numbers.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.registry import Collector

from snapshotter.daemon.sockets import make_way

_log = logging.getLogger(__name__)

Report = Callable[[], Mapping[str, Any]]
"""What /healthz tells (health.py); "ok" says whether this daemon does its work."""


def serve(collectors: Iterable[Collector], health: Report, network: str, address: str) -> Callable[[], None]:
    """Serve at `address` (host:port, or a socket's path with network "unix"); return what stops it.

    Raises OSError or ConfigError when the address cannot be had.
    """
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    where: Any = address
    if network == "unix":
        make_way(address, "metrics_address")
        server: _Server = _UnixServer(where, _Handler)
    else:
        host, _, port = address.rpartition(":")
        server = _Server((host.strip("[]"), int(port)), _Handler)
    server.set_app(_application(make_wsgi_app(registry), health))
    ending = threading.Event()

    def run() -> None:  # `serve_forever` looks twice a second whether it is to end
        while not ending.is_set():
            server.handle_request()

    thread = threading.Thread(target=run, name="metrics", daemon=True)
    thread.start()

    def stop() -> None:
        ending.set()
        server.socket.shutdown(socket.SHUT_RDWR)  # which `handle_request` sees
        thread.join()
        server.server_close()

    return stop


def _application(metrics: Any, health: Report) -> WSGIApplication:
    """Return what answers by path; everything but /healthz is a scrape, as in the reference."""

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/healthz":
            scrape: Iterable[bytes] = metrics(environ, start_response)
            return scrape
        report = health()
        start_response(
            "200 OK" if report["ok"] else "503 Service Unavailable", [("Content-Type", "application/json")]
        )
        return [json.dumps(report).encode() + b"\n"]

    return answer


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
