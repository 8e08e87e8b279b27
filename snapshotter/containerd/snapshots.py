"""containerd's snapshots service, for one snapshotter, and the service that unpacks layers onto its mounts.

Mounts are passed from one to the other unread. Any thread may call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import grpc

from snapshotter.api import diff_pb2, types_pb2
from snapshotter.api import snapshots_pb2 as pb
from snapshotter.api.diff_pb2_grpc import DiffStub
from snapshotter.api.snapshots_pb2_grpc import SnapshotsStub
from snapshotter.containerd.connection import Connection
from snapshotter.containerd.images import descriptor_message
from snapshotter.errors import InvalidArgument, NotFound, UsageError
from snapshotter.oci.descriptor import Descriptor
from snapshotter.units import Digest

Mounts: TypeAlias = tuple[types_pb2.Mount, ...]
"""What `prepare` answers and `apply` takes."""


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """A snapshot as containerd lists it."""

    name: str
    parent: str
    committed: bool
    labels: Mapping[str, str]


class Snapshots:
    """The snapshots of one snapshotter in one namespace."""

    def __init__(self, connection: Connection, snapshotter: str) -> None:
        self.snapshotter = snapshotter
        self._connection = connection
        self._stub = SnapshotsStub(connection.channel)

    def stat(self, name: str) -> SnapshotInfo:
        """Return a snapshot. Raises NotFound; UsageError when containerd has no such snapshotter."""
        try:
            answer = self._connection.call(
                self._stub.Stat,
                pb.StatSnapshotRequest(snapshotter=self.snapshotter, key=name),
                self._what(name),
            )
        except InvalidArgument as error:
            if "snapshotter not loaded" not in str(error):
                raise
            raise UsageError(
                f"snapshotter {self.snapshotter}: containerd at {self._connection.address} does not have it; "
                f"add [proxy_plugins.{self.snapshotter}] to its configuration and restart it"
            ) from error
        info = answer.info
        return SnapshotInfo(info.name, info.parent, info.kind == pb.COMMITTED, dict(info.labels))

    def exists(self, name: str) -> bool:
        """Say whether there is such a snapshot. Raises as `stat` does otherwise."""
        try:
            self.stat(name)
        except NotFound:
            return False
        return True

    def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> Mounts:
        """Make an active snapshot on `parent` (empty: on nothing). Raises AlreadyExists, also for "done remotely"."""
        request = pb.PrepareSnapshotRequest(
            snapshotter=self.snapshotter, key=key, parent=parent, labels=labels
        )
        return tuple(self._connection.call(self._stub.Prepare, request, self._what(key)).mounts)

    def commit(self, name: str, key: str, labels: Mapping[str, str]) -> None:
        """Turn the active snapshot `key` into the committed `name`. Raises AlreadyExists."""
        request = pb.CommitSnapshotRequest(snapshotter=self.snapshotter, name=name, key=key, labels=labels)
        self._connection.call(self._stub.Commit, request, self._what(name))

    def remove(self, name: str) -> None:
        """Remove a snapshot. Raises NotFound, FailedPrecondition when others stand on it."""
        request = pb.RemoveSnapshotRequest(snapshotter=self.snapshotter, key=name)
        self._connection.call(self._stub.Remove, request, self._what(name))

    def list(self) -> list[SnapshotInfo]:
        """Return all snapshots."""
        request = pb.ListSnapshotsRequest(snapshotter=self.snapshotter)
        return [
            SnapshotInfo(info.name, info.parent, info.kind == pb.COMMITTED, dict(info.labels))
            for answer in self._connection.stream(
                self._stub.List, request, f"snapshots of {self.snapshotter}"
            )
            for info in answer.info
        ]

    def _what(self, name: str) -> str:
        return f"snapshot {name} of {self.snapshotter}"


class Apply:
    """One layer being unpacked by containerd, from its content store onto mounts. Starts at once."""

    def __init__(self, connection: Connection, layer: Descriptor, mounts: Mounts) -> None:
        self._connection = connection
        self._layer = layer
        self._call = DiffStub(connection.channel).Apply.future(
            diff_pb2.ApplyRequest(diff=descriptor_message(layer), mounts=mounts),
            metadata=connection.metadata,
            timeout=connection.timeout(),
        )

    def result(self) -> Digest:
        """Wait for the end and return the diffID: the digest of the uncompressed layer. Raises SnapshotterError."""
        try:
            return Digest(self._call.result().applied.digest)
        except grpc.FutureCancelledError as error:
            raise UsageError(f"layer {self._layer.digest}: unpacking was interrupted") from error
        except grpc.RpcError as error:
            raise self._connection.translated(error, f"unpacking layer {self._layer.digest}") from error

    def cancel(self) -> None:
        """Make containerd stop; `result` raises then."""
        self._call.cancel()
