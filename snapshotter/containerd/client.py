"""containerd as the commands see it: its services in one namespace, and leases around what is being written."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator
from typing import Final, Self

from snapshotter.api import leases_pb2, namespaces_pb2
from snapshotter.api.leases_pb2_grpc import LeasesStub
from snapshotter.api.namespaces_pb2_grpc import NamespacesStub
from snapshotter.containerd import DEFAULT_ADDRESS, DEFAULT_NAMESPACE
from snapshotter.containerd.connection import Connection
from snapshotter.containerd.content import ContentStore
from snapshotter.containerd.images import Images
from snapshotter.containerd.snapshots import Apply, Mounts, Snapshots
from snapshotter.errors import SnapshotterError
from snapshotter.oci.descriptor import Descriptor

_LEASE_SECONDS: Final = 24 * 3600
"""As containerd's own clients: the longest a killed command keeps its remains from being collected."""
_CLEANUP_SECONDS: Final = 10.0
"""How long removing the lease may take after the command's own time is over."""


class Containerd:
    """The services of one containerd in one namespace. Any thread may call; close it at the end."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.content = ContentStore(connection)
        self.images = Images(connection)

    @classmethod
    def connect(
        cls,
        address: str = DEFAULT_ADDRESS,
        namespace: str = DEFAULT_NAMESPACE,
        *,
        timeout: float | None = None,
    ) -> Self:
        """Return a client; nothing is sent yet. `timeout` in seconds is for all calls together."""
        return cls(Connection(address, namespace, timeout=timeout))

    @property
    def address(self) -> str:
        """The path of the socket."""
        return self._connection.address

    @property
    def namespace(self) -> str:
        """The namespace of every call."""
        return self._connection.namespace

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._connection.close()

    def in_namespace(self, name: str) -> Containerd:
        """Return a client of another namespace over the same connection, which ends with this one."""
        return Containerd(self._connection.in_namespace(name))

    def namespaces(self) -> list[str]:
        """Return the name of every namespace."""
        stub = NamespacesStub(self._connection.channel)
        answer = self._connection.call(stub.List, namespaces_pb2.ListNamespacesRequest(), "namespaces")
        return [namespace.name for namespace in answer.namespaces]

    def snapshots(self, snapshotter: str) -> Snapshots:
        """Return the snapshots of one snapshotter."""
        return Snapshots(self._connection, snapshotter)

    def apply(self, layer: Descriptor, mounts: Mounts) -> Apply:
        """Start unpacking `layer`, which is in the content store, onto `mounts`."""
        return Apply(self._connection, layer, mounts)

    @contextlib.contextmanager
    def lease(self) -> Iterator[Containerd]:
        """Return, for a `with` block, a client whose writes no garbage collection touches until the block ends."""
        stub = LeasesStub(self._connection.channel)
        name = f"soci-{uuid.uuid4().hex}"
        expire = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + _LEASE_SECONDS))
        request = leases_pb2.CreateRequest(id=name, labels={"containerd.io/gc.expire": expire})
        self._connection.call(stub.Create, request, "lease")
        try:
            yield Containerd(self._connection.under_lease(name))
        finally:
            # Without its deadline: what the command leaves behind must go also when its time is over.
            cleanup = Connection(self.address, self.namespace, timeout=_CLEANUP_SECONDS)
            with contextlib.suppress(SnapshotterError), contextlib.closing(cleanup):
                delete = leases_pb2.DeleteRequest(id=name)
                cleanup.call(LeasesStub(cleanup.channel).Delete, delete, "lease")
