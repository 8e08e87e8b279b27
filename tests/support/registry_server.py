"""The HTTP/1.1 server below the test registry: threads, keep-alive, TLS, ranges, faults, and a record of it all.

An application is a function from Request to Reply; everything that happens on the wire is here.

Concurrency: one thread per connection. `HttpServer.lock` guards the records and the faults; applications take
it for their own state.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import ssl
import struct
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from tests.support.registry_faults import (
    Drop,
    Fault,
    FlipByte,
    IgnoreRange,
    LoseReply,
    Redirect,
    Slow,
    Stall,
    Status,
    Truncate,
    WrongRange,
)
from tests.support.tls import Certificate

_PIECE = 4 << 20
_MAX_BODY = 2 << 30


@dataclass(slots=True)
class Request:
    """One request as the server saw it; `status` and `sent` are filled in while it is answered."""

    server: str
    """"registry", "storage" or "token"."""
    method: str
    path: str
    """Without the query."""
    query: Mapping[str, str]
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes = field(repr=False)
    connection: int
    """Which TCP connection it came by, numbered from 1."""
    status: int = 0
    """0 while unanswered, and for ever if the connection was dropped."""
    sent: int = 0
    """Bytes of body sent."""

    @property
    def range(self) -> tuple[int, int] | None:
        """The range asked for, half open, if it is a single closed one."""
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        return None if match is None else (int(match[1]), int(match[2]) + 1)


@dataclass(slots=True)
class Reply:
    """What an application answers. With `ranged`, a Range header of the request is honoured."""

    status: int
    body: bytes | memoryview = b""
    headers: dict[str, str] = field(default_factory=dict)
    ranged: bool = False


Application = Callable[[Request, Fault | None], Reply]


class HttpServer(ThreadingHTTPServer):
    """A server on `address` and a port of its own. `close()` ends every connection and every thread."""

    daemon_threads = False
    block_on_close = True
    request_queue_size = 128

    def __init__(
        self,
        name: str,
        application: Application,
        certificate: Certificate | None = None,
        address: str = "127.0.0.1",
    ) -> None:
        super().__init__((address, 0), _Handler)
        self.address = address
        self.name = name
        self.application = application
        self.lock = threading.RLock()
        self.closing = threading.Event()
        self.records: list[Request] = []
        self.faults: list[Fault] = []
        self.errors: list[BaseException] = []
        self.connections = 0
        self._open: dict[socket.socket, int] = {}
        self._reset: set[socket.socket] = set()
        self._context: ssl.SSLContext | None = None
        if certificate is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(certificate.certificate, certificate.key)
        self._thread = threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self._thread.start()

    @property
    def host(self) -> str:
        """Address and port."""
        return f"{self.address}:{self.server_port}"

    @property
    def url(self) -> str:
        """Scheme and host."""
        return f"{'http' if self._context is None else 'https'}://{self.host}"

    def share(self, other: HttpServer) -> None:
        """Keep one record and one list of faults with `other`."""
        self.lock, self.records, self.faults, self.errors = (
            other.lock,
            other.records,
            other.faults,
            other.errors,
        )

    def begin(self, request: Request) -> Fault | None:
        """Record `request` and return the fault that hits it, if any."""
        with self.lock:
            self.records.append(request)
            size = len(request.body)
            return next((one for one in self.faults if one.take(request.method, request.path, size)), None)

    def close(self) -> None:
        """Stop at once, in the middle of whatever is being sent."""
        self.closing.set()
        self.shutdown()
        self._thread.join()
        with self.lock:
            connections = list(self._open)
        for connection in connections:
            # Below TLS, whose state belongs to the connection's own thread. It may have ended by itself.
            with contextlib.suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
        self.server_close()

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection; the TLS handshake is left to its thread."""
        connection, address = super().get_request()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._context is not None:
            connection = self._context.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=True
            )
        with self.lock:
            self.connections += 1
            self._open[connection] = self.connections
        return connection, address

    def number(self, connection: socket.socket) -> int:
        """Return the number of an open connection."""
        return self._open[connection]

    def reset(self, connection: socket.socket) -> None:
        """Have `connection` end with RST instead of FIN, as a crashed peer's does."""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._reset.add(connection)

    def shutdown_request(self, request: Any) -> None:
        """Forget and close a connection."""
        with self.lock:
            self._open.pop(request, None)
        if request in self._reset:
            self._reset.discard(request)
            self.close_request(request)
        else:
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep what is not the network's doing, for the registry to raise when it closes."""
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, OSError):
            self.errors.append(error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HttpServer

    def setup(self) -> None:
        super().setup()
        self.number = self.server.number(self.connection)

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        length = int(self.headers.get("Content-Length", 0))
        if length > _MAX_BODY:
            raise ValueError(f"request body of {length} bytes")
        request = Request(
            server=self.server.name,
            method=self.command,
            path=parts.path,
            query={key: " ".join(values) for key, values in parse_qs(parts.query, True).items()},
            headers={key.lower(): value for key, value in self.headers.items()},
            body=self.rfile.read(length) if length else b"",
            connection=self.number,
        )
        fault = self.server.begin(request)
        if isinstance(fault, Drop):
            if not fault.politely:
                self.server.reset(self.connection)
            self.close_connection = True
            return
        if isinstance(fault, LoseReply):
            taken = request
            if fault.after is not None:
                taken = replace(request, method="PATCH", body=request.body[: fault.after])
            self.server.application(taken, None)
            self.server.reset(self.connection)
            self.close_connection = True
            return
        if isinstance(fault, Stall) and fault.after is None:
            fault.wait(self.server.closing)
        reply = scripted(request, fault) or self.server.application(request, fault)
        self._send(request, reply, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _answer  # noqa: N815 - http.server's names

    def _send(self, request: Request, reply: Reply, fault: Fault | None) -> None:
        body = memoryview(reply.body)
        if reply.ranged:
            body = _apply_range(request, reply, body, fault)
        if isinstance(fault, FlipByte) and fault.at < len(body):
            flipped = bytearray(body)
            flipped[fault.at] ^= 0xFF
            body = memoryview(flipped)
        request.status = reply.status
        if "Transfer-Encoding" not in reply.headers:
            reply.headers.setdefault("Content-Length", str(len(body)))
        self.send_response_only(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self._send_body(request, body, fault)

    def _send_body(self, request: Request, body: memoryview, fault: Fault | None) -> None:
        piece = max(1, int(fault.rate / 10)) if isinstance(fault, Slow) else _PIECE
        stop = fault.after if isinstance(fault, Truncate | Stall) and fault.after is not None else len(body)
        position = 0
        while position < len(body):
            if position == stop:
                if isinstance(fault, Truncate):
                    self.close_connection = True
                    return
                assert isinstance(fault, Stall)
                fault.wait(self.server.closing)
                stop = len(body)
            end = min(position + piece, len(body), stop)
            # Counted before it is sent: a client that has the bytes may look at the record at once.
            request.sent = end
            self.connection.sendall(body[position:end])
            position = end
            if isinstance(fault, Slow):
                self.server.closing.wait(0.1)
            if self.server.closing.is_set():
                self.close_connection = True
                return

    def log_message(self, *_: object) -> None:
        """Say nothing: the records hold it all."""


def scripted(request: Request, fault: Fault | None) -> Reply | None:
    """Return the reply of a fault that needs no application."""
    if isinstance(fault, Status):
        error = json.dumps({"errors": [{"code": fault.code, "message": "injected"}]}).encode()
        return Reply(fault.status, error if fault.body is None else fault.body, dict(fault.headers))
    if isinstance(fault, Redirect):
        query = "?" + urlencode(request.query) if request.query else ""
        return Reply(fault.status, b"", {"Location": fault.to or request.path + query})
    return None


def _apply_range(request: Request, reply: Reply, body: memoryview, fault: Fault | None) -> memoryview:
    """Return the part of `body` that the request asks for, and make `reply` a 206 (or 416)."""
    size = len(body)
    reply.headers["Accept-Ranges"] = "bytes"
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if match is None or reply.status != 200 or isinstance(fault, IgnoreRange):
        return body
    start, end = int(match[1]), min(size, int(match[2]) + 1) if match[2] else size
    if start >= size:
        reply.status = 416
        reply.headers["Content-Range"] = f"bytes */{size}"
        return body[:0]
    reply.status = 206
    header = None
    if isinstance(fault, WrongRange):
        start, end, header = start + fault.shift, end + fault.shift + fault.extra, fault.header
    if header != "":
        reply.headers["Content-Range"] = header or f"bytes {start}-{end - 1}/{size}"
    return body[start:end]
