"""The gRPC edge: containerd's Snapshots service, translated to and from the snapshotter.

Nothing is decided here. Requests become calls, values become messages, and errors become status codes in
one place, `_answering`: a ContractError by the table, its text as it is; anything else as INTERNAL with a
text that tells nothing, and a traceback in the log.

Concurrency: gRPC calls the methods from its worker threads, several at a time.
"""

# ruff: noqa: N802 the methods are named by the service

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterable, Iterator

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp

from snapshotter import errors
from snapshotter.api import snapshots_pb2 as api
from snapshotter.api import snapshots_pb2_grpc, types_pb2
from snapshotter.snapshot.model import Info, Mount
from snapshotter.snapshot.snapshotter import Snapshotter

_log = logging.getLogger(__name__)

STATUS: dict[type[errors.ContractError], grpc.StatusCode] = {
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
}
"""Every leaf of ContractError, and the status that containerd's client turns back into it."""

_NAMESPACE_KEY = "containerd-namespace"
_INFOS_PER_MESSAGE = 100
"""containerd's own number; a message of 100 infos with long labels stays well below gRPC's 4 MiB."""


class SnapshotsService(snapshots_pb2_grpc.SnapshotsServicer):
    """The service over one snapshotter. Which snapshotter a request names is containerd's affair."""

    def __init__(self, snapshotter: Snapshotter) -> None:
        self._snapshotter = snapshotter

    def Prepare(
        self, request: api.PrepareSnapshotRequest, context: grpc.ServicerContext
    ) -> api.PrepareSnapshotResponse:
        """Make an active snapshot, or a layer."""
        with _answering(context, "Prepare"):
            mounts = self._snapshotter.prepare(
                request.key, request.parent, dict(request.labels), _namespace(context)
            )
            return api.PrepareSnapshotResponse(mounts=_mounts(mounts))

    def View(
        self, request: api.ViewSnapshotRequest, context: grpc.ServicerContext
    ) -> api.ViewSnapshotResponse:
        """Make a view."""
        with _answering(context, "View"):
            mounts = self._snapshotter.view(request.key, request.parent, dict(request.labels))
            return api.ViewSnapshotResponse(mounts=_mounts(mounts))

    def Mounts(self, request: api.MountsRequest, context: grpc.ServicerContext) -> api.MountsResponse:
        """Return the mounts of an active snapshot or a view."""
        with _answering(context, "Mounts"):
            return api.MountsResponse(mounts=_mounts(self._snapshotter.mounts(request.key)))

    def Commit(self, request: api.CommitSnapshotRequest, context: grpc.ServicerContext) -> Empty:
        """Turn an active snapshot into a committed one."""
        with _answering(context, "Commit"):
            self._snapshotter.commit(request.name, request.key, dict(request.labels), request.parent)
            return Empty()

    def Remove(self, request: api.RemoveSnapshotRequest, context: grpc.ServicerContext) -> Empty:
        """Forget a snapshot."""
        with _answering(context, "Remove"):
            self._snapshotter.remove(request.key)
            return Empty()

    def Stat(
        self, request: api.StatSnapshotRequest, context: grpc.ServicerContext
    ) -> api.StatSnapshotResponse:
        """Return what is known of a snapshot."""
        with _answering(context, "Stat"):
            return api.StatSnapshotResponse(info=info_message(self._snapshotter.stat(request.key)))

    def Update(
        self, request: api.UpdateSnapshotRequest, context: grpc.ServicerContext
    ) -> api.UpdateSnapshotResponse:
        """Change labels."""
        with _answering(context, "Update"):
            info = request.info
            updated = self._snapshotter.update(info.name, dict(info.labels), list(request.update_mask.paths))
            return api.UpdateSnapshotResponse(info=info_message(updated))

    def List(
        self, request: api.ListSnapshotsRequest, context: grpc.ServicerContext
    ) -> Iterator[api.ListSnapshotsResponse]:
        """Stream the snapshots that match the filters."""
        with _answering(context, "List"):
            infos = iter(self._snapshotter.walk(list(request.filters)))
            while block := [info_message(info) for info in itertools.islice(infos, _INFOS_PER_MESSAGE)]:
                yield api.ListSnapshotsResponse(info=block)

    def Usage(self, request: api.UsageRequest, context: grpc.ServicerContext) -> api.UsageResponse:
        """Return what a snapshot occupies on disk."""
        with _answering(context, "Usage"):
            usage = self._snapshotter.usage(request.key)
            return api.UsageResponse(size=usage.size, inodes=usage.inodes)

    def Cleanup(self, request: api.CleanupRequest, context: grpc.ServicerContext) -> Empty:  # noqa: ARG002
        """Free what removed snapshots occupy."""
        with _answering(context, "Cleanup"):
            self._snapshotter.cleanup()
            return Empty()


def status_of(error: errors.ContractError) -> grpc.StatusCode:
    """Return the status of an error; INTERNAL for one that the table does not know."""
    return STATUS.get(type(error), grpc.StatusCode.INTERNAL)


def info_message(info: Info) -> api.Info:
    """Return the message for a snapshot's info."""
    return api.Info(
        name=info.name,
        parent=info.parent,
        kind=api.Kind.ValueType(info.kind),
        created_at=_timestamp(info.created),
        updated_at=_timestamp(info.updated),
        labels=info.labels,
    )


@contextlib.contextmanager
def _answering(context: grpc.ServicerContext, method: str) -> Iterator[None]:
    try:
        yield
    except errors.ContractError as error:
        _log.debug("request refused", extra={"method": method, "error": str(error)})
        context.abort(status_of(error), str(error))
    except Exception:  # noqa: BLE001 the edge: every error becomes a status
        _log.exception("request failed", extra={"method": method})
        context.abort(
            grpc.StatusCode.INTERNAL, f"internal error in {method}; the snapshotter's log says more"
        )


def _namespace(context: grpc.ServicerContext) -> str:
    for key, value in context.invocation_metadata():
        if key == _NAMESPACE_KEY and isinstance(value, str):
            return value
    return ""


def _mounts(mounts: Iterable[Mount]) -> list[types_pb2.Mount]:
    return [
        types_pb2.Mount(type=mount.type, source=mount.source, target=mount.target, options=mount.options)
        for mount in mounts
    ]


def _timestamp(seconds: float) -> Timestamp:
    # Microseconds: a float of today's seconds holds no more.
    return Timestamp(seconds=round(seconds * 1e6) // 10**6, nanos=round(seconds * 1e6) % 10**6 * 1000)
