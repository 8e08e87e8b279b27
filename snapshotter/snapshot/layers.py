"""What the snapshotter asks of whoever makes layers appear: a protocol, and the values it speaks in.

The snapshotter decides what a snapshot is called and when it exists; a provider decides whether a layer
can be lazy, mounts it, and knows afterwards how it is. Neither knows the other's files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from snapshotter.snapshot.model import Owner, Usage
from snapshotter.units import Digest


@dataclass(frozen=True, slots=True)
class LayerRequest:
    """An image layer that a client wants prepared."""

    snapshot_id: int
    directory: Path
    """An empty directory of this snapshot's own, for the files or the mount."""
    parent_ids: tuple[int, ...]
    """The layers below it, nearest first."""
    labels: Mapping[str, str]
    """What the client says of image and layer."""
    namespace: str
    """containerd's namespace."""


@dataclass(frozen=True, slots=True)
class Lazy:
    """The layer is mounted at the directory."""

    layer: Digest
    usage: Usage
    owner: Owner | None = None
    """Owner of the layer's top directory; None when the layer has no entry for it: then the parent's."""


@dataclass(frozen=True, slots=True)
class Local:
    """The layer's files are in the directory, complete and ordinary."""

    usage: Usage


@dataclass(frozen=True, slots=True)
class Deferred:
    """Neither: the client is to download and unpack the layer. Whatever is in the directory is discarded."""

    reason: str
    """One of a small set of words, for the log and a metric."""


Provided = Lazy | Local | Deferred


class LayerProvider(Protocol):
    """Makes image layers appear. Called from many threads at once, and never inside a transaction."""

    def provide(self, request: LayerRequest) -> Provided:
        """Mount or unpack the layer, or say why not; takes as long as the network does.

        An exception counts as Deferred.
        """

    def check(self, ids: Sequence[int]) -> None:
        """Raise Unavailable, naming the layer, when one of these lazy snapshots cannot be read."""

    def wake(self, ids: Sequence[int]) -> None:
        """Start what serves these lazy snapshots, without waiting: they are about to be used."""

    def usage(self, snapshot_id: int) -> Usage | None:
        """Return what a lazy snapshot occupies on disk now; None when that is not known."""

    def release(self, snapshot_id: int, directory: Path) -> bool:
        """Unmount and forget whatever lazy layer is at `directory`, of a snapshot that is no more.

        Return whether there was one. An exception means that it may still be mounted; the call comes again.
        """

    def close(self) -> None:
        """Let go of what can be let go without disturbing readers. Called once."""
