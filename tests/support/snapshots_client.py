"""A Snapshotter at the other end of a unix socket: the same methods, over the real service.

Statuses come back as the errors they were made of, so that one test can be told of either.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import TypeVar

import grpc

from snapshotter import errors
from snapshotter.api import snapshots_pb2 as api
from snapshotter.api import snapshots_pb2_grpc, types_pb2
from snapshotter.daemon.service import STATUS, SnapshotsService
from snapshotter.snapshot.model import Info, Kind, Mount, Usage
from snapshotter.snapshot.snapshotter import Snapshotter

NAMESPACE = "testsuite"
_ERRORS = {status: kind for kind, status in STATUS.items()}
_TIMEOUT = 60.0
Response = TypeVar("Response")


@contextlib.contextmanager
def served(snapshotter: Snapshotter, socket: Path) -> Iterator[RemoteSnapshotter]:
    """Serve `snapshotter` on `socket`, and give a client of it."""
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=8))
    snapshots_pb2_grpc.add_SnapshotsServicer_to_server(SnapshotsService(snapshotter), server)
    server.add_insecure_port(f"unix:{socket}")
    server.start()
    try:
        with grpc.insecure_channel(f"unix:{socket}") as channel:
            yield RemoteSnapshotter(channel)
    finally:
        server.stop(grace=None).wait()


class RemoteSnapshotter:
    """The client's side of the Snapshots service."""

    def __init__(self, channel: grpc.Channel, *, timeout: float = _TIMEOUT) -> None:
        self._channel = channel
        self._timeout = timeout
        self.stub = snapshots_pb2_grpc.SnapshotsStub(channel)

    def prepare(
        self, key: str, parent: str = "", labels: Mapping[str, str] | None = None, namespace: str = NAMESPACE
    ) -> tuple[Mount, ...]:
        """Call Prepare."""
        request = api.PrepareSnapshotRequest(key=key, parent=parent, labels=labels)
        metadata = (("containerd-namespace", namespace),)
        with _translated():
            return _mounts(self.stub.Prepare(request, metadata=metadata, timeout=self._timeout).mounts)

    def view(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> tuple[Mount, ...]:
        """Call View."""
        request = api.ViewSnapshotRequest(key=key, parent=parent, labels=labels)
        return _mounts(self._call(self.stub.View, request).mounts)

    def mounts(self, key: str) -> tuple[Mount, ...]:
        """Call Mounts."""
        return _mounts(self._call(self.stub.Mounts, api.MountsRequest(key=key)).mounts)

    def commit(self, name: str, key: str, labels: Mapping[str, str] | None = None, parent: str = "") -> None:
        """Call Commit."""
        request = api.CommitSnapshotRequest(name=name, key=key, labels=labels, parent=parent)
        self._call(self.stub.Commit, request)

    def remove(self, key: str) -> None:
        """Call Remove."""
        self._call(self.stub.Remove, api.RemoveSnapshotRequest(key=key))

    def stat(self, key: str) -> Info:
        """Call Stat."""
        return _info(self._call(self.stub.Stat, api.StatSnapshotRequest(key=key)).info)

    def update(self, key: str, labels: Mapping[str, str], paths: Sequence[str] = ()) -> Info:
        """Call Update."""
        request = api.UpdateSnapshotRequest(info=api.Info(name=key, labels=labels))
        request.update_mask.paths.extend(paths)
        return _info(self._call(self.stub.Update, request).info)

    def walk(self, filters: Iterable[str] = ()) -> Iterator[Info]:
        """Call List, and yield as messages come."""
        with _translated():
            for response in self.stub.List(api.ListSnapshotsRequest(filters=filters), timeout=_TIMEOUT):
                yield from map(_info, response.info)

    def usage(self, key: str) -> Usage:
        """Call Usage."""
        response = self._call(self.stub.Usage, api.UsageRequest(key=key))
        return Usage(response.size, response.inodes)

    def cleanup(self) -> None:
        """Call Cleanup."""
        self._call(self.stub.Cleanup, api.CleanupRequest())

    def close(self) -> None:
        """Close the channel: a client's Close does not end the service."""
        self._channel.close()

    @staticmethod
    def _call(method: Callable[..., Response], request: object) -> Response:
        with _translated():
            return method(request, timeout=_TIMEOUT)


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        kind = _ERRORS.get(error.code(), errors.SnapshotterError)
        raise kind(error.details()) from None


def _mounts(messages: Iterable[types_pb2.Mount]) -> tuple[Mount, ...]:
    return tuple(Mount(one.type, one.source, one.target, tuple(one.options)) for one in messages)


def _info(message: api.Info) -> Info:
    return Info(
        name=message.name,
        parent=message.parent,
        kind=Kind(message.kind),
        created=message.created_at.seconds + message.created_at.nanos / 1e9,
        updated=message.updated_at.seconds + message.updated_at.nanos / 1e9,
        labels=dict(message.labels),
    )
