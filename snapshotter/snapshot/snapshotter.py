"""The snapshotter: containerd's contract, above the store, the directories and the layer provider.

A Prepare that names a target (label `containerd.io/snapshot.ref`) is for an image layer. Its directory is
given to the provider before there is any row, so that a client which dies, a provider that hangs or a
machine that loses power leaves nothing but a directory without a row, for Cleanup. A layer that comes
back lazy or unpacked becomes a committed snapshot in one transaction, and the client is told
AlreadyExists: the contract's word for "you need not unpack this". One that is deferred gets another,
untouched directory and becomes an ordinary active snapshot: laziness failing never fails a pull.

Nothing here looks at or below the `fs` of a lazy snapshot. Which are lazy is in the store, not in labels,
which clients may change.

Concurrency: any method from any thread. Nothing is locked while the network, a provider or a large
directory is waited for, except that one Cleanup waits for another; what two calls may disagree about is
settled by the store's transactions.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from snapshotter.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from snapshotter.snapshot.directories import Directories
from snapshotter.snapshot.filters import compile_filters
from snapshotter.snapshot.layers import Deferred, LayerProvider, LayerRequest, Lazy, Local, Provided
from snapshotter.snapshot.model import (
    LABEL_HAS_INDEX,
    LABEL_NAMESPACE,
    LABEL_REMOTE,
    LABEL_REMOTE_VALUE,
    LABEL_TARGET,
    NO_USAGE,
    Info,
    Kind,
    Mount,
    Owner,
    Usage,
)
from snapshotter.snapshot.mounts import mounts_of
from snapshotter.snapshot.owner import mapped_root
from snapshotter.snapshot.store import Ancestor, SnapshotStore
from snapshotter.snapshot.usage import disk_usage

_log = logging.getLogger(__name__)

INTERNAL_ERROR = "internal-error"
"""Reason of a deferral that no provider decided: it raised."""

_ROOT = Owner(0, 0)
_NO_LABELS: Mapping[str, str] = {}


class Snapshotter:
    """Snapshots below one root. Takes over `store` and `layers`: `close` closes them."""

    def __init__(
        self,
        root: Path,
        store: SnapshotStore,
        layers: LayerProvider,
        *,
        overlay_options: tuple[str, ...] = (),
    ) -> None:
        self._store = store
        self._layers = layers
        self._overlay_options = overlay_options
        self._directories = Directories(root, store.last_id())
        self._cleanup = threading.Lock()
        self._close = threading.Lock()
        self._closed = False

    def prepare(
        self, key: str, parent: str = "", labels: Mapping[str, str] = _NO_LABELS, namespace: str = ""
    ) -> tuple[Mount, ...]:
        """Make an active snapshot on `parent` and return its mounts; or, for an image layer, see above.

        Raises NotFound for the parent, InvalidArgument when it is not committed, AlreadyExists for the key
        or for a layer that is there (now), and Unavailable when a lazy layer below cannot be read.
        """
        if not key:
            raise InvalidArgument("a snapshot needs a key")
        if labels.get(LABEL_TARGET):
            return self._prepare_layer(key, parent, labels, namespace)
        return self._prepare_ordinary(Kind.ACTIVE, key, parent, labels)

    def view(self, key: str, parent: str = "", labels: Mapping[str, str] = _NO_LABELS) -> tuple[Mount, ...]:
        """Make a read-only view of `parent` and return its mounts. Raises as `prepare` does."""
        return self._prepare_ordinary(Kind.VIEW, key, parent, labels)

    def mounts(self, key: str) -> tuple[Mount, ...]:
        """Return the mounts of an active snapshot or a view.

        Raises NotFound, FailedPrecondition when it is committed, and Unavailable as `prepare` does.
        """
        found = self._store.get(key)
        if found.info.kind == Kind.COMMITTED:
            raise FailedPrecondition(f"snapshot {key!r} is committed and has no mounts")
        return self._mounts(found.info.kind, found.id, self._store.chain(found.info.parent))

    def commit(self, name: str, key: str, labels: Mapping[str, str] = _NO_LABELS, parent: str = "") -> None:
        """Turn the active snapshot `key` into the committed snapshot `name`, with these labels alone.

        `parent` is for a snapshot that was prepared without one. Raises NotFound, AlreadyExists,
        FailedPrecondition (not active, or the parent not committed) and InvalidArgument (another parent).
        """
        found = self._store.get(key)
        usage, owner = NO_USAGE, found.owner
        if found.info.kind == Kind.ACTIVE:  # otherwise the store says what is wrong first
            usage, owner = self._inspect(found.id, key)
        self._store.commit(name, key, labels=labels, usage=usage, owner=owner, parent=parent)

    def remove(self, key: str) -> None:
        """Forget a snapshot; Cleanup frees its disk space. Raises NotFound, FailedPrecondition (parent)."""
        self._store.remove(key)

    def stat(self, key: str) -> Info:
        """Return what is known of a snapshot. Raises NotFound."""
        return self._store.get(key).info

    def update(self, key: str, labels: Mapping[str, str], paths: Sequence[str] = ()) -> Info:
        """Take over the labels at the paths `labels.<key>`, or all of them; return the new state.

        Raises NotFound, and InvalidArgument for any other path.
        """
        return self._store.update(key, labels, paths).info

    def walk(self, filters: Iterable[str] = ()) -> Iterator[Info]:
        """Return the snapshots that match one of the filters, as they are at this moment, by name.

        Raises InvalidArgument for a filter that cannot be read.
        """
        matches = compile_filters(filters)
        return (snapshot.info for snapshot in self._store.all() if matches(snapshot.info))

    def usage(self, key: str) -> Usage:
        """Return what a snapshot occupies without its parents. Raises NotFound.

        An active one is measured, a lazy one is asked of its provider, else it is what the commit recorded.
        """
        found = self._store.get(key)
        if found.info.kind == Kind.ACTIVE:
            return self._inspect(found.id, key)[0]
        if found.lazy:
            return self._layers.usage(found.id) or found.usage
        return found.usage

    def cleanup(self) -> None:
        """Delete what removed snapshots and interrupted calls have left on disk.

        What cannot be deleted is logged, and tried again the next time.
        """
        with self._cleanup:
            for snapshot_id in self._directories.leftovers(self._store.ids):
                self._discard(snapshot_id)

    def close(self) -> None:
        """Close the provider and the store; mounts and containers go on. May be called again."""
        with self._close:
            if not self._closed:
                self._closed = True
                self._layers.close()
                self._store.close()

    def _prepare_ordinary(
        self, kind: Kind, key: str, parent: str, labels: Mapping[str, str]
    ) -> tuple[Mount, ...]:
        chain = self._store.chain(parent)
        owner = mapped_root(labels) or _inherited_owner(chain)
        with self._new_directory(kind, owner) as directory:
            mounts = self._mounts(kind, directory.id, chain)
            self._store.create(directory.id, kind, key, parent=parent, labels=labels, owner=owner)
            directory.keep = True
        return mounts

    def _prepare_layer(
        self, key: str, parent: str, labels: Mapping[str, str], namespace: str
    ) -> tuple[Mount, ...]:
        target = labels[LABEL_TARGET]
        namespace = namespace or _namespace_in(key)
        if self._store.find_layer(target, parent) is not None:
            raise _target_exists(target)
        if self._store.has(key):
            raise AlreadyExists(f"snapshot {key!r} already exists")
        chain = self._store.chain(parent)
        labels = {**labels, LABEL_NAMESPACE: namespace}
        with self._new_directory(Kind.COMMITTED, _inherited_owner(chain)) as directory:
            request = LayerRequest(
                directory.id,
                self._directories.upper(directory.id),
                tuple(ancestor.id for ancestor in chain),
                labels,
                namespace,
            )
            provided = self._provide(request)
            if not isinstance(provided, Deferred):
                self._commit_layer(directory.id, parent, labels, provided, _inherited_owner(chain))
                directory.keep = True
        _log_prepared(key, target, provided)
        if isinstance(provided, Deferred):
            return self._prepare_ordinary(Kind.ACTIVE, key, parent, labels)
        raise _target_exists(target)

    def _provide(self, request: LayerRequest) -> Provided:
        try:
            return self._layers.provide(request)
        except Unavailable:  # the daemon is ending: the client may ask again, and need not pull in full
            raise
        except Exception:  # noqa: BLE001 a pull goes on without us, whatever went wrong here
            _log.exception("layer provider failed", extra={"target": request.labels[LABEL_TARGET]})
            return Deferred(INTERNAL_ERROR)

    def _commit_layer(
        self,
        snapshot_id: int,
        parent: str,
        labels: Mapping[str, str],
        provided: Lazy | Local,
        inherited: Owner,
    ) -> None:
        """Make a provided layer a committed snapshot; raise AlreadyExists when another call was faster."""
        labels = {**labels, LABEL_HAS_INDEX: "true"}
        if isinstance(provided, Lazy):
            labels[LABEL_REMOTE] = LABEL_REMOTE_VALUE
            owner = provided.owner or inherited
        else:
            owner = self._directories.owner(snapshot_id)
        target = labels[LABEL_TARGET]
        create = functools.partial(
            self._store.create,
            snapshot_id,
            Kind.COMMITTED,
            parent=parent,
            labels=labels,
            owner=owner,
            usage=provided.usage,
            lazy=isinstance(provided, Lazy),
        )
        try:
            create(target)
        except AlreadyExists:
            if self._store.find_layer(target, parent) is not None:
                raise _target_exists(target) from None
            # The name belongs to a twin on another parent: on one that a client had to unpack, and has named,
            # itself. The client finds a layer by its target and parent, and takes whatever name it has.
            create(f"{target}/{snapshot_id}")

    def _mounts(self, kind: Kind, snapshot_id: int, chain: Sequence[Ancestor]) -> tuple[Mount, ...]:
        lazy = tuple(ancestor.id for ancestor in chain if ancestor.lazy)
        if lazy:
            self._layers.check(lazy)
            try:
                self._layers.wake(lazy)
            except Exception:  # noqa: BLE001 only a head start: a sleeping layer wakes when it is read
                _log.exception("lazy layers could not be woken", extra={"snapshot_ids": lazy})
        parent_ids = tuple(ancestor.id for ancestor in chain)
        return mounts_of(self._directories.path, kind, snapshot_id, parent_ids, self._overlay_options)

    def _inspect(self, snapshot_id: int, key: str) -> tuple[Usage, Owner]:
        """Measure the directory of an active snapshot, which is always an ordinary one."""
        try:
            return disk_usage(self._directories.upper(snapshot_id)), self._directories.owner(snapshot_id)
        except FileNotFoundError:
            raise NotFound(f"snapshot {key!r} was removed in the meantime") from None

    @contextlib.contextmanager
    def _new_directory(self, kind: Kind, owner: Owner) -> Iterator[_NewDirectory]:
        """Give a directory with a new id; it is discarded after the block unless that says `keep`."""
        with self._directories.claim() as snapshot_id:
            directory = _NewDirectory(snapshot_id)
            try:
                self._directories.make(snapshot_id, kind, owner)
                yield directory
            finally:
                if not directory.keep:
                    self._discard(snapshot_id)

    def _discard(self, snapshot_id: int) -> None:
        try:
            self._layers.release(snapshot_id, self._directories.upper(snapshot_id))
            self._directories.delete(snapshot_id)
        except Exception:  # noqa: BLE001 Cleanup calls again; the caller's work must not suffer
            _log.warning(
                "snapshot directory could not be deleted yet",
                exc_info=True,
                extra={"snapshot_id": snapshot_id},
            )


@dataclass(slots=True)
class _NewDirectory:
    id: int
    keep: bool = False


def _inherited_owner(chain: Sequence[Ancestor]) -> Owner:
    return chain[0].owner if chain else _ROOT


def _target_exists(target: str) -> AlreadyExists:
    return AlreadyExists(f'target snapshot "{target}": already exists')


def _log_prepared(key: str, target: str, provided: Provided) -> None:
    fields = {
        "key": key,
        "target": target,
        "remote-snapshot-prepared": str(isinstance(provided, Lazy)).lower(),
    }
    if not isinstance(provided, Lazy):
        fields["local-snapshot-prepared"] = str(isinstance(provided, Local)).lower()
    if isinstance(provided, Deferred):
        fields |= {"defer-snapshot-runtime": "true", "reason": provided.reason}
    _log.info("image layer prepared", extra=fields)


def _namespace_in(key: str) -> str:
    """Return the namespace at the head of a key `<namespace>/<number>/<name>`, which is how containerd makes them.

    Before 1.7 containerd does not pass the namespace on to proxy plugins in any other way.
    """
    namespace, _, rest = key.partition("/")
    return namespace if "/" in rest else ""
