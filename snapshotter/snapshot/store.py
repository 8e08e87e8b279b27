"""What is durable about snapshots: one row each, in SQLite, and one for each lazy mount.

Every method is one short transaction that is all or nothing, also when the process or the machine dies
in it; none waits for anything but the disk. Directories are not the store's business: a row may be made
only for a directory that exists, and a directory without a row is a leftover.

Concurrency: any method from any thread.
"""

from __future__ import annotations

import dataclasses
import json
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snapshotter.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from snapshotter.snapshot.database import Database
from snapshotter.snapshot.model import LABEL_TARGET, NO_USAGE, Info, Kind, LazyMount, Owner, Usage
from snapshotter.units import Digest

_SELECT = """
    SELECT s.id, s.name, coalesce(p.name, ''), s.kind, s.lazy, s.created, s.updated, s.labels,
           s.size, s.inodes, s.uid, s.gid
    FROM snapshots s LEFT JOIN snapshots p ON p.id = s.parent_id
"""

_CHAIN = """
    WITH RECURSIVE chain (depth, id) AS (
        SELECT 0, id FROM snapshots WHERE name = ?
        UNION ALL
        SELECT depth + 1, s.parent_id FROM chain JOIN snapshots s USING (id) WHERE s.parent_id IS NOT NULL
    )
    SELECT s.id, s.kind, s.lazy, s.uid, s.gid FROM chain JOIN snapshots s USING (id) ORDER BY depth
"""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One row."""

    id: int
    info: Info
    usage: Usage
    """As recorded at the commit; none before."""
    owner: Owner
    """Owner of the top directory."""
    lazy: bool
    """The top directory is a lazy layer's mount: look neither at it nor below it."""


@dataclass(frozen=True, slots=True)
class Ancestor:
    """What a child needs to know of a committed snapshot below it."""

    id: int
    owner: Owner
    lazy: bool


class SnapshotStore:
    """The snapshot database. Raises Unavailable from every method once it is closed."""

    def __init__(self, path: Path) -> None:
        self._database = Database(path)

    def close(self) -> None:
        """Close the database after the transactions that run now. May be called again."""
        self._database.close()

    def get(self, name: str) -> Snapshot:
        """Return the snapshot with this key or name. Raises NotFound."""
        with self._database.read() as connection:
            return _find(connection, name)

    def has(self, name: str) -> bool:
        """Return whether the key or name is taken."""
        with self._database.read() as connection:
            return _exists(connection, name)

    def all(self) -> list[Snapshot]:
        """Return every snapshot, in the order of their names."""
        with self._database.read() as connection:
            return [_snapshot(row) for row in connection.execute(f"{_SELECT} ORDER BY s.name")]

    def ids(self) -> set[int]:
        """Return the id of every snapshot."""
        with self._database.read() as connection:
            return {row[0] for row in connection.execute("SELECT id FROM snapshots")}

    def last_id(self) -> int:
        """Return the greatest id that any snapshot or lazy mount has or had; 0 for none."""
        with self._database.read() as connection:
            (last,) = connection.execute(
                "SELECT max((SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'snapshots'),"
                "           (SELECT coalesce(max(snapshot_id), 0) FROM lazy_mounts))"
            ).fetchone()
            return int(last)

    def chain(self, parent: str) -> tuple[Ancestor, ...]:
        """Return the snapshot called `parent` and all below it, nearest first; nothing for the empty name.

        Raises NotFound, and InvalidArgument when it is not committed.
        """
        if not parent:
            return ()
        with self._database.read() as connection:
            rows = connection.execute(_CHAIN, (parent,)).fetchall()
        if not rows:
            raise NotFound(f"parent snapshot {parent!r} does not exist")
        if rows[0][1] != Kind.COMMITTED:
            raise InvalidArgument(f"parent snapshot {parent!r} is not committed")
        return tuple(
            Ancestor(snapshot_id, Owner(uid, gid), bool(lazy)) for snapshot_id, _, lazy, uid, gid in rows
        )

    def find_layer(self, target: str, parent: str) -> str | None:
        """Return the name of the layer that was committed for this target on this parent, if any.

        Only what is named after its target counts: what a client has unpacked and named itself is its own.
        """
        with self._database.read() as connection:
            rows = connection.execute(
                # The second half of the condition is "begins with the target and a slash", for the index.
                f"{_SELECT} WHERE s.name = :target OR (s.name > :target || '/' AND s.name < :target || '0')"
                " ORDER BY s.id",
                {"target": target},
            ).fetchall()
        for info in (_snapshot(row).info for row in rows):
            if (
                info.kind == Kind.COMMITTED
                and info.parent == parent
                and info.labels.get(LABEL_TARGET) == target
            ):
                return info.name
        return None

    def create(
        self,
        snapshot_id: int,
        kind: Kind,
        name: str,
        *,
        parent: str,
        labels: Mapping[str, str],
        owner: Owner,
        usage: Usage = NO_USAGE,
        lazy: bool = False,
    ) -> Snapshot:
        """Insert a snapshot whose directory exists already, and return it.

        Raises NotFound for the parent, InvalidArgument when it is not committed or the name is empty, and
        AlreadyExists when the name is taken.
        """
        if not name:
            raise InvalidArgument("a snapshot needs a name")
        with self._database.write() as connection:
            parent_id = _parent_id(connection, parent, InvalidArgument)
            if _exists(connection, name):
                raise AlreadyExists(f"snapshot {name!r} already exists")
            connection.execute(
                "INSERT INTO snapshots VALUES (:id, :name, :parent_id, :kind, :lazy, :now, :now, :labels,"
                " :size, :inodes, :uid, :gid)",
                {
                    "id": snapshot_id,
                    "lazy": lazy,
                    **_values(name, parent_id, kind, labels=labels, usage=usage, owner=owner),
                },
            )
            return _find(connection, name)

    def commit(
        self,
        name: str,
        key: str,
        *,
        labels: Mapping[str, str],
        usage: Usage,
        owner: Owner,
        parent: str = "",
    ) -> None:
        """Turn the active snapshot `key` into the committed snapshot `name`; labels and times start anew.

        A snapshot without a parent takes `parent` if that is given. Raises AlreadyExists for the name,
        NotFound for the key or the parent, FailedPrecondition when one is active that may not be or the
        other way round, and InvalidArgument for a parent other than the one it was prepared on.
        """
        if not name:
            raise InvalidArgument(f"snapshot {key!r} cannot be committed without a name")
        with self._database.write() as connection:
            if _exists(connection, name):
                raise AlreadyExists(f"committed snapshot {name!r} already exists")
            active = _find(connection, key)
            if active.info.kind != Kind.ACTIVE:
                raise FailedPrecondition(f"snapshot {key!r} is not active and cannot be committed")
            if active.info.parent and parent and active.info.parent != parent:
                raise InvalidArgument(
                    f"snapshot {key!r} was prepared on {active.info.parent!r} and cannot be committed on {parent!r}"
                )
            parent_id = _parent_id(connection, active.info.parent or parent, FailedPrecondition)
            connection.execute(
                "UPDATE snapshots SET name = :name, parent_id = :parent_id, kind = :kind, created = :now,"
                " updated = :now, labels = :labels, size = :size, inodes = :inodes, uid = :uid, gid = :gid"
                " WHERE id = :id",
                {
                    "id": active.id,
                    **_values(name, parent_id, Kind.COMMITTED, labels=labels, usage=usage, owner=owner),
                },
            )

    def update(self, name: str, labels: Mapping[str, str], paths: Sequence[str] = ()) -> Snapshot:
        """Change labels, and return the snapshot as it is then.

        A path `labels.<key>` takes over that label from `labels`, or removes it when it is not there;
        `labels`, and no path at all, takes over all. Raises NotFound, and InvalidArgument for other paths.
        """
        with self._database.write() as connection:
            found = _find(connection, name)
            changed = dict(found.info.labels)
            for path in paths or ("labels",):
                if path.startswith("labels."):
                    key = path.removeprefix("labels.")
                    changed[key] = labels.get(key, "")
                elif path == "labels":
                    changed = dict(labels)
                else:
                    raise InvalidArgument(
                        f"field {path!r} of snapshot {name!r} cannot be updated, labels can"
                    )
            connection.execute(
                "UPDATE snapshots SET labels = ?, updated = ? WHERE id = ?",
                (_encode(changed), time.time(), found.id),
            )
            return _find(connection, name)

    def remove(self, name: str) -> Snapshot:
        """Delete the row and return what it was. Raises NotFound, and FailedPrecondition for a parent."""
        with self._database.write() as connection:
            found = _find(connection, name)
            child = connection.execute(
                "SELECT name FROM snapshots WHERE parent_id = ? LIMIT 1", (found.id,)
            ).fetchone()
            if child is not None:
                raise FailedPrecondition(f"cannot remove snapshot {name!r}: it is the parent of {child[0]!r}")
            connection.execute("DELETE FROM snapshots WHERE id = ?", (found.id,))
            return found

    def record_mount(self, mount: LazyMount) -> None:
        """Remember a lazy mount, in place of what was recorded for its snapshot."""
        with self._database.write() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO lazy_mounts VALUES (?, ?, ?, ?, ?, ?)", dataclasses.astuple(mount)
            )

    def lazy_mounts(self) -> list[LazyMount]:
        """Return every recorded mount by snapshot id, also of snapshots that are gone."""
        with self._database.read() as connection:
            rows = connection.execute("SELECT * FROM lazy_mounts ORDER BY snapshot_id").fetchall()
        return [LazyMount(row[0], Digest(row[1]), *row[2:]) for row in rows]

    def forget_mount(self, snapshot_id: int) -> None:
        """Drop the record of a mount, if there is one."""
        with self._database.write() as connection:
            connection.execute("DELETE FROM lazy_mounts WHERE snapshot_id = ?", (snapshot_id,))


def _find(connection: sqlite3.Connection, name: str) -> Snapshot:
    row = connection.execute(f"{_SELECT} WHERE s.name = ?", (name,)).fetchone()
    if row is None:
        raise NotFound(f"snapshot {name!r} does not exist")
    return _snapshot(row)


def _exists(connection: sqlite3.Connection, name: str) -> bool:
    return connection.execute("SELECT 1 FROM snapshots WHERE name = ?", (name,)).fetchone() is not None


def _parent_id(
    connection: sqlite3.Connection,
    parent: str,
    not_committed: type[InvalidArgument | FailedPrecondition],
) -> int | None:
    if not parent:
        return None
    row = connection.execute("SELECT id, kind FROM snapshots WHERE name = ?", (parent,)).fetchone()
    if row is None:
        raise NotFound(f"parent snapshot {parent!r} does not exist")
    if row[1] != Kind.COMMITTED:
        raise not_committed(f"parent snapshot {parent!r} is not committed")
    return int(row[0])


def _values(
    name: str, parent_id: int | None, kind: Kind, *, labels: Mapping[str, str], usage: Usage, owner: Owner
) -> dict[str, Any]:
    return {
        "name": name,
        "parent_id": parent_id,
        "kind": kind,
        "now": time.time(),
        "labels": _encode(labels),
        "size": usage.size,
        "inodes": usage.inodes,
        "uid": owner.uid,
        "gid": owner.gid,
    }


def _encode(labels: Mapping[str, str]) -> str:
    # containerd's own store cannot hold empty values, and clients set one in order to remove a label.
    kept = {key: value for key, value in labels.items() if value}
    return json.dumps(kept, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _snapshot(row: Any) -> Snapshot:
    snapshot_id, name, parent, kind, lazy, created, updated, labels, size, inodes, uid, gid = row
    info = Info(name, parent, Kind(kind), created, updated, json.loads(labels))
    return Snapshot(snapshot_id, info, Usage(size, inodes), Owner(uid, gid), bool(lazy))
