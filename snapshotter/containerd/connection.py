"""One gRPC connection to containerd: namespace, lease, deadline, and the translation of its errors.

Concurrency: any thread may call at any time; gRPC multiplexes. The connection is made by the first call and again
after a failure, so constructing one costs nothing and cannot fail.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypeVar

import grpc

from snapshotter.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    SnapshotterError,
    Unavailable,
    UsageError,
)

MAX_MESSAGE: Final = 16 << 20
"""Bytes; containerd's own limit in both directions."""

_ERRORS: Final[Mapping[grpc.StatusCode, Callable[[str], SnapshotterError]]] = {
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
}

Request = TypeVar("Request")
Response = TypeVar("Response")


class Connection:
    """Calls of one client in one namespace, by default until it is closed."""

    def __init__(
        self,
        address: str,
        namespace: str,
        *,
        timeout: float | None = None,
        lease: str = "",
        channel: grpc.Channel | None = None,
    ) -> None:
        """`address` is the path of containerd's socket, with or without `unix://`; `timeout` is for all calls together.

        What is written under a `lease` is safe from the garbage collector as long as the lease exists.
        """
        self.address = address.removeprefix("unix://")
        self.namespace = namespace
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self.metadata: tuple[tuple[str, str | bytes], ...] = (("containerd-namespace", namespace),)
        if lease:
            self.metadata += (("containerd-lease", lease),)
        self.channel = channel or grpc.insecure_channel(
            f"unix:{self.address}",
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE),
                ("grpc.max_send_message_length", MAX_MESSAGE),
                # Channels of one process share sockets otherwise, and closing one would not end its calls.
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )

    def under_lease(self, lease: str) -> Connection:
        """Return a connection over the same channel whose writes belong to `lease`."""
        other = Connection(self.address, self.namespace, lease=lease, channel=self.channel)
        other._deadline = self._deadline
        return other

    def in_namespace(self, namespace: str) -> Connection:
        """Return a connection over the same channel, with the same deadline, in another namespace."""
        other = Connection(self.address, namespace, channel=self.channel)
        other._deadline = self._deadline
        return other

    def close(self) -> None:
        """End the connection; calls that are under way fail."""
        self.channel.close()

    def timeout(self) -> float | None:
        """Return the seconds that are left, None for no limit."""
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)

    def call(
        self, method: grpc.UnaryUnaryMultiCallable[Request, Response], request: Request, what: str
    ) -> Response:
        """Return the answer to one request; `what` names its object in messages. Raises SnapshotterError."""
        try:
            return method(request, metadata=self.metadata, timeout=self.timeout())
        except grpc.RpcError as error:
            raise self.translated(error, what) from error

    def stream(
        self, method: grpc.UnaryStreamMultiCallable[Request, Response], request: Request, what: str
    ) -> Iterator[Response]:
        """Yield the answers to one request. Closing the generator ends the call. Raises SnapshotterError."""
        call = method(request, metadata=self.metadata, timeout=self.timeout())
        try:
            yield from call
        except grpc.RpcError as error:
            raise self.translated(error, what) from error
        finally:
            call.cancel()

    def translated(self, error: grpc.RpcError, what: str) -> SnapshotterError:
        """Return our error for a failed call about `what`."""
        # Every RpcError that a call raises is also a grpc.Call; the stubs do not say so.
        call: Any = error
        code, details = call.code(), call.details() or "no reason given"
        if code is grpc.StatusCode.UNAVAILABLE and "failed to connect" in details:
            return UsageError(
                f"cannot reach containerd at {self.address} ({_reason(details)}); "
                "is it running? --address or CONTAINERD_ADDRESS names its socket"
            )
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return SnapshotterError(f"{what}: containerd did not answer in time")
        if code is grpc.StatusCode.CANCELLED:
            return SnapshotterError(f"{what}: interrupted")
        return _ERRORS.get(code, SnapshotterError)(f"{what}: {details}")


def _reason(details: str) -> str:
    """Return the last, most particular part of gRPC's words about a failed connection."""
    for known in ("No such file or directory", "Connection refused", "Permission denied"):
        if known in details:
            return known
    return details
