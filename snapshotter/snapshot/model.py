"""The values of the snapshots contract, and the names of the labels that carry meaning for us.

Pure data; nothing here knows SQLite, gRPC or the file system.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from snapshotter.units import Digest

LABEL_TARGET = "containerd.io/snapshot.ref"
"""On a Prepare: "this is an image layer", and the chain ID that it is to be committed as."""

LABEL_REMOTE = "containerd.io/snapshot/remote"
LABEL_REMOTE_VALUE = "remote snapshot"
"""On a committed snapshot: its files are lazy. For clients to read; what we act on is in the store."""

LABEL_NAMESPACE = "containerd.io/snapshot/remote/namespace"
"""On a committed layer: the containerd namespace that asked for it."""

LABEL_HAS_INDEX = "containerd.io/snapshot/remote/has.soci.index.digest"
"""On a committed layer: `true` when we made it, lazily or by unpacking it, because a SOCI index led to it."""

LABEL_UID_MAPPING = "containerd.io/snapshot/uidmapping"
LABEL_GID_MAPPING = "containerd.io/snapshot/gidmapping"
"""On a container's Prepare: the user namespace that it will run in, `container:host:size[,…]`."""


class Kind(IntEnum):
    """What a snapshot is for; the numbers are containerd's."""

    VIEW = 1
    """Read-only look at a parent; never committed."""
    ACTIVE = 2
    """Writable on top of a parent; may be committed."""
    COMMITTED = 3
    """Immutable; the only kind that can be a parent."""


@dataclass(frozen=True, slots=True)
class Info:
    """What the contract tells of one snapshot. Times are seconds since the epoch, UTC."""

    name: str
    parent: str
    """Name of the parent; empty for none."""
    kind: Kind
    created: float
    updated: float
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Usage:
    """Disk space of one snapshot without its parents: allocated bytes, and inodes."""

    size: int
    inodes: int


NO_USAGE = Usage(0, 0)


@dataclass(frozen=True, slots=True)
class Mount:
    """containerd's mount message: what its client hands to mount(2)."""

    type: str
    source: str
    target: str
    """Path below the mount's root; we leave it empty."""
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Owner:
    """Numeric owner of a directory on the host."""

    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class LazyMount:
    """Which layer is mounted for which snapshot: enough to mount it again without the network."""

    snapshot_id: int
    layer: Digest
    tree_variant: str
    """Which compiled form of the layer's tree the mount serves; empty for the plain one."""
    image_ref: str
    manifest_digest: str
    namespace: str
