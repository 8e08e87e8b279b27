"""The content store of this program itself, `<root>/content`: an OCI image layout that any OCI tool can read.

    content/oci-layout                      the layout's version
    content/index.json                      an empty list: artifacts are found by the database or by digest
    content/blobs/sha256/<hex>              the blobs
    content/ingest/<random>                 blobs being written; what a crash leaves here is only garbage

Owns that directory. Any number of threads and processes may use it at once: a blob appears by rename, complete and
flushed. Labels are accepted and dropped: nothing here is garbage collected.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from snapshotter.errors import CorruptData, NotFound, SnapshotterError
from snapshotter.soci.content import CHUNK_SIZE
from snapshotter.units import Digest, digest_hex, sha256_digest

_LAYOUT: Final = b'{"imageLayoutVersion":"1.0.0"}'
_EMPTY_INDEX: Final = (
    b'{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}'
)


class LayoutStore:
    """Blobs in a directory in OCI layout, which is made when it is first written to."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._blobs = directory / "blobs" / "sha256"

    def path(self, digest: Digest) -> Path:
        """Return where the blob is, or would be."""
        return self._blobs / digest_hex(digest)

    def size(self, digest: Digest) -> int:
        """Return the number of bytes. Raises NotFound."""
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError:
            raise self._not_found(digest) from None

    def digests(self) -> Iterator[Digest]:
        """Yield the digest of every blob."""
        try:
            names = sorted(os.listdir(self._blobs))
        except FileNotFoundError:
            return
        for name in names:
            yield Digest(f"sha256:{name}")

    def read_range(self, digest: Digest, start: int, end: int) -> bytes:
        """Return the bytes `[start, end)`. Raises NotFound, CorruptData."""
        try:
            with self.path(digest).open("rb") as blob:
                blob.seek(start)
                data = blob.read(end - start)
        except FileNotFoundError:
            raise self._not_found(digest) from None
        if len(data) != end - start:
            raise CorruptData(f"content {digest} in {self._directory}: shorter than {end} bytes")
        return data

    def chunks(self, digest: Digest) -> Iterator[bytes]:
        """Yield the whole blob in pieces. Raises NotFound."""
        try:
            blob = self.path(digest).open("rb", buffering=0)
        except FileNotFoundError:
            raise self._not_found(digest) from None
        with blob:
            while chunk := blob.read(CHUNK_SIZE):
                yield chunk

    def write(self, data: bytes, *, labels: Mapping[str, str] | None = None) -> Digest:  # noqa: ARG002
        """Store `data` unless it is there, and return its digest. Raises SnapshotterError when the disk refuses."""
        digest = sha256_digest(data)
        target = self.path(digest)
        try:
            # A blob of another size is what a broken disk or a foreign program left: replace it.
            if target.exists() and target.stat().st_size == len(data):
                return digest
            self._create()
            _write_file(target, data, self._directory / "ingest")
        except OSError as error:
            raise SnapshotterError(f"cannot write {target}: {error.strerror}") from error
        return digest

    def remove(self, digest: Digest) -> None:
        """Remove the blob. Raises NotFound."""
        try:
            self.path(digest).unlink()
        except FileNotFoundError:
            raise self._not_found(digest) from None

    def _create(self) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for part in (self._blobs, self._directory / "ingest"):
            part.mkdir(parents=True, exist_ok=True)
        for name, data in (("oci-layout", _LAYOUT), ("index.json", _EMPTY_INDEX)):
            path = self._directory / name
            if not path.exists():
                _write_file(path, data, self._directory / "ingest")

    def _not_found(self, digest: Digest) -> NotFound:
        return NotFound(f"content {digest}: not in {self._directory}")


def _write_file(target: Path, data: bytes, scratch: Path) -> None:
    """Make `target` hold `data`, whatever else happens at the same time; `scratch` is on the same file system."""
    descriptor, name = tempfile.mkstemp(dir=scratch)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise
    parent = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
