"""The artifact database, `<root>/artifacts.sqlite`: which SOCI index belongs to which image, which zTOC to which layer.

It only remembers; the artifacts themselves are in a content store, which may lose them (containerd collects garbage),
so whoever reads a row asks the store before relying on it. The reference keeps the same facts in a bbolt file of its
own; the two programs exchange artifacts through registries and content stores, not through this file.

Concurrency: one transaction per call, SQLite's own locks; threads and processes may share the file.

Schema 2 (`PRAGMA user_version`; schema 1 had no prefetches):
    indices   digest, image_digest, platform   together the key: one v2 index may serve several images
              size            bytes of the index
              manifest_digest the platform's image manifest
              version         1 or 2
              media_type      of the index itself
              created_at      seconds since the epoch
    ztocs     digest          the key
              size            bytes of the zTOC
              layer_digest, span_size, build_tool   what it was made from and with; another value makes another zTOC
              created_at      seconds since the epoch
    prefetches  digest, size, layer_digest, created_at   as of zTOCs
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from snapshotter.errors import NotFound, SnapshotterError
from snapshotter.units import Digest

SCHEMA_VERSION: Final = 2
_BUSY_SECONDS: Final = 30.0
"""How long to wait for another command's transaction; each takes milliseconds, so this is never reached in health."""

_SCHEMA_2: Final = """
CREATE TABLE prefetches (
    digest TEXT NOT NULL PRIMARY KEY, size INTEGER NOT NULL, layer_digest TEXT NOT NULL, created_at REAL NOT NULL
) WITHOUT ROWID;
"""
_SCHEMA_1: Final = """
CREATE TABLE indices (
    digest TEXT NOT NULL, image_digest TEXT NOT NULL, platform TEXT NOT NULL,
    size INTEGER NOT NULL, manifest_digest TEXT NOT NULL, version INTEGER NOT NULL,
    media_type TEXT NOT NULL, created_at REAL NOT NULL,
    PRIMARY KEY (digest, image_digest, platform)
) WITHOUT ROWID;
CREATE INDEX indices_by_manifest ON indices (manifest_digest);
CREATE TABLE ztocs (
    digest TEXT NOT NULL PRIMARY KEY, size INTEGER NOT NULL, layer_digest TEXT NOT NULL,
    span_size INTEGER NOT NULL, build_tool TEXT NOT NULL, created_at REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX ztocs_by_layer ON ztocs (layer_digest, span_size, build_tool);
"""


@dataclass(frozen=True, slots=True)
class IndexRow:
    """One SOCI index of one platform of one image."""

    digest: Digest
    image_digest: Digest
    """What the image's name points to: a manifest, or a list of them."""
    platform: str
    size: int
    manifest_digest: Digest
    version: int
    media_type: str
    created_at: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True)
class ZtocRow:
    """One zTOC of one layer."""

    digest: Digest
    size: int
    layer_digest: Digest
    span_size: int
    build_tool: str
    created_at: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True)
class PrefetchRow:
    """One prefetch artifact of one layer."""

    digest: Digest
    size: int
    layer_digest: Digest
    created_at: float = field(default_factory=time.time)


class ArtifactDatabase:
    """The rows of `artifacts.sqlite`. A missing file is an empty database until something is added."""

    def __init__(self, root: Path) -> None:
        self._path = root / "artifacts.sqlite"

    def add_index(self, row: IndexRow) -> None:
        """Remember an index; one that is known gets the new time."""
        with self._write() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO indices VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    row.digest,
                    row.image_digest,
                    row.platform,
                    row.size,
                    row.manifest_digest,
                    row.version,
                    row.media_type,
                    row.created_at,
                ),
            )

    def add_ztoc(self, row: ZtocRow) -> None:
        """Remember a zTOC; one that is known gets the new time."""
        with self._write() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO ztocs VALUES (?, ?, ?, ?, ?, ?)",
                (row.digest, row.size, row.layer_digest, row.span_size, row.build_tool, row.created_at),
            )

    def add_prefetch(self, row: PrefetchRow) -> None:
        """Remember a prefetch artifact; one that is known gets the new time."""
        with self._write() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO prefetches VALUES (?, ?, ?, ?)",
                (row.digest, row.size, row.layer_digest, row.created_at),
            )

    def prefetches(self, *, digest: Digest | None = None) -> list[PrefetchRow]:
        """Return the prefetch artifacts that match, the newest first."""
        rows = self._select(
            "SELECT digest, size, layer_digest, created_at FROM prefetches", {"digest": digest}
        )
        return [PrefetchRow(*row) for row in rows]

    def indices(
        self,
        *,
        digest: Digest | None = None,
        image_digest: Digest | None = None,
        manifest_digest: Digest | None = None,
    ) -> list[IndexRow]:
        """Return the indices that match every condition given, the newest first."""
        wanted = {"digest": digest, "image_digest": image_digest, "manifest_digest": manifest_digest}
        rows = self._select(
            "SELECT digest, image_digest, platform, size, manifest_digest, version, media_type, created_at"
            " FROM indices",
            wanted,
        )
        return [IndexRow(*row) for row in rows]

    def ztocs(
        self,
        *,
        digest: Digest | None = None,
        layer_digest: Digest | None = None,
        span_size: int | None = None,
        build_tool: str | None = None,
    ) -> list[ZtocRow]:
        """Return the zTOCs that match every condition given, the newest first."""
        wanted = {
            "digest": digest,
            "layer_digest": layer_digest,
            "span_size": span_size,
            "build_tool": build_tool,
        }
        rows = self._select(
            "SELECT digest, size, layer_digest, span_size, build_tool, created_at FROM ztocs", wanted
        )
        return [ZtocRow(*row) for row in rows]

    def remove_index(self, digest: Digest) -> None:
        """Forget an index, for every image it was known for. Raises NotFound."""
        with self._write() as connection:
            if not connection.execute("DELETE FROM indices WHERE digest = ?", (digest,)).rowcount:
                raise NotFound(f"SOCI index {digest}: not in {self._path}")

    def forget(self, digest: Digest) -> None:
        """Forget an artifact of whatever kind, if it is known."""
        with self._write() as connection:
            for table in ("indices", "ztocs", "prefetches"):
                connection.execute(f"DELETE FROM {table} WHERE digest = ?", (digest,))  # noqa: S608

    def _select(self, query: str, wanted: Mapping[str, str | int | None]) -> list[Any]:
        conditions = {name: value for name, value in wanted.items() if value is not None}
        if conditions:
            query += " WHERE " + " AND ".join(f"{name} = :{name}" for name in conditions)
        if not self._path.exists():
            return []
        with self._connect() as connection:
            return connection.execute(query + " ORDER BY created_at DESC, digest", conditions).fetchall()

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise SnapshotterError(f"cannot create {self._path.parent}: {error.strerror}") from error
        with self._connect() as connection, connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        """Open the file, of the right schema, for the time of one call."""
        try:
            # No isolation level: transactions begin where this module says so.
            with closing(
                sqlite3.connect(self._path, timeout=_BUSY_SECONDS, isolation_level=None)
            ) as connection:
                _prepare(connection, self._path)
                yield connection
        except sqlite3.Error as error:
            raise SnapshotterError(f"artifact database {self._path}: {error}") from error


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Make the tables that a new or older file does not have. Raises SnapshotterError for a file of a later program."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == SCHEMA_VERSION:
        return
    if version > SCHEMA_VERSION:
        raise SnapshotterError(
            f"artifact database {path}: written by a later version of this program (schema {version})"
        )
    with connection:
        connection.execute("BEGIN EXCLUSIVE")
        # Another command may have made the tables while this one waited for the lock.
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        for statements in (_SCHEMA_1, _SCHEMA_2)[version:]:
            for statement in statements.split(";"):
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
