"""The snapshot database: its tables, how a file comes to have them, and its transactions.

The schema's version is kept in `PRAGMA user_version`. History:
    1  snapshots, lazy_mounts

A newer file is refused, never guessed at: an older daemon that wrote to it could lose what the newer one
added. An older file would be brought up to date here, in one transaction with the new version number.

Concurrency: any thread. Writers share one connection and wait for each other; readers share a second one
and never wait for a writer's disk.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from snapshotter.errors import ConfigError, Unavailable

VERSION = 1

_TABLES = (
    """
    CREATE TABLE snapshots (
        -- Number of the directory. AUTOINCREMENT: never given twice, also after the row is gone.
        id         INTEGER PRIMARY KEY AUTOINCREMENT,
        -- The key while active or a view, the name once committed: one key space.
        name       TEXT NOT NULL UNIQUE CHECK (name != ''),
        -- The parent's id, NULL for none. The foreign key is what refuses to remove a parent.
        parent_id  INTEGER REFERENCES snapshots (id),
        -- 1 view, 2 active, 3 committed.
        kind       INTEGER NOT NULL CHECK (kind IN (1, 2, 3)),
        -- 1: `fs` is the mount of a lazy layer, so no process of ours may look at or below it.
        lazy       INTEGER NOT NULL DEFAULT 0 CHECK (lazy = 0 OR kind = 3),
        -- Seconds since the epoch, UTC. Commit starts both anew; Update moves `updated`.
        created    REAL NOT NULL,
        updated    REAL NOT NULL,
        -- JSON object of texts, without empty values.
        labels     TEXT NOT NULL,
        -- Allocated bytes and inodes at the commit; 0 before.
        size       INTEGER NOT NULL DEFAULT 0,
        inodes     INTEGER NOT NULL DEFAULT 0,
        -- Owner of `fs`, which children take over: kept here because a lazy `fs` cannot be asked.
        uid        INTEGER NOT NULL,
        gid        INTEGER NOT NULL
    ) STRICT
    """,
    "CREATE INDEX snapshots_by_parent ON snapshots (parent_id)",
    """
    CREATE TABLE lazy_mounts (
        -- Whose `fs` it is. Not a foreign key: a mount outlives its snapshot until Cleanup.
        snapshot_id      INTEGER PRIMARY KEY,
        -- Digest of the layer that is mounted.
        layer            TEXT NOT NULL,
        -- Which compiled form of the layer's tree is served; '' for the plain one.
        tree_variant     TEXT NOT NULL,
        -- The image, its manifest and the namespace that the layer was pulled for: where to ask for spans.
        image_ref        TEXT NOT NULL,
        manifest_digest  TEXT NOT NULL,
        namespace        TEXT NOT NULL
    ) STRICT
    """,
)


class Database:
    """An open database file. Raises ConfigError when it is of a newer version, or no database."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._writer = _Channel(_open(path))
        self._reader = _Channel(_open(path))

    def read(self) -> contextlib.AbstractContextManager[sqlite3.Connection]:
        """Return a block in which all reads see one state. Raises Unavailable after `close`."""
        return self._reader.transaction("BEGIN")

    def write(self) -> contextlib.AbstractContextManager[sqlite3.Connection]:
        """Return a block whose changes are all committed at its end, or undone when it raises.

        What is committed survives a power cut. Raises Unavailable after `close`.
        """
        return self._writer.transaction("BEGIN IMMEDIATE")

    def close(self) -> None:
        """Wait for the transactions that run now, and close the file. May be called again."""
        self._writer.close()
        self._reader.close()


class _Channel:
    """A connection and the lock that gives it to one thread at a time."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection: sqlite3.Connection | None = connection
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        with self._lock:
            if self._connection is None:
                raise Unavailable("the snapshotter is shutting down")
            connection = self._connection
            connection.execute(begin)
            try:
                yield connection
                connection.commit()
            except BaseException:
                connection.rollback()
                raise

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            self._connection = None


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10.0)
    try:
        # Commits must survive a power cut: containerd remembers what we acknowledged (0.2 ms on an SSD).
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        _bring_up_to_date(connection, path)
    except sqlite3.DatabaseError as error:
        connection.close()
        raise ConfigError(
            f"snapshot database {path} cannot be opened: {error}; when it is damaged, "
            "move the snapshotter's root away and pull again"
        ) from error
    except ConfigError:
        connection.close()
        raise
    return connection


def _bring_up_to_date(connection: sqlite3.Connection, path: Path) -> None:
    connection.execute("BEGIN IMMEDIATE")
    with connection:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > VERSION:
            raise ConfigError(
                f"snapshot database {path} is of version {version}, this program knows up to {VERSION}: "
                "it was written by a newer snapshotter; install that one again"
            )
        if version == 0:
            for statement in _TABLES:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {VERSION}")
