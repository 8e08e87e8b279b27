"""Blobs in unnamed files: for layers that are unpacked and not kept.

Concurrency: any thread; a sink belongs to one at a time.
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Final

from snapshotter.download.downloads import Piece
from snapshotter.errors import FailedPrecondition
from snapshotter.units import Digest

_WRITE: Final = 1 << 20
"""Bytes per write: one of more than 2 MiB is several times slower on ext4."""


class FileStore:
    """Blobs of one pull, in files below `directory` that vanish when they are closed.

    `uses` are the blobs that will be taken, each as often as it will be: an image may have a layer twice.
    """

    def __init__(self, directory: Path, uses: Iterable[Digest] = ()) -> None:
        self._directory = directory
        self._files: dict[Digest, IO[bytes]] = {}
        self._left = Counter(uses)
        self._lock = threading.Lock()

    def ingest(self, digest: Digest, size: int) -> FileSink:
        """Return a sink for a blob. Raises OSError."""
        return FileSink(self._files, tempfile.TemporaryFile(dir=self._directory), digest, size)

    def take(self, digest: Digest) -> IO[bytes]:
        """Return the file of a blob that was committed; it is the caller's from now on."""
        with self._lock:
            self._left[digest] -= 1
            if self._left[digest] > 0:
                return open(f"/proc/self/fd/{self._files[digest].fileno()}", "rb")
            return self._files.pop(digest)

    def close(self) -> None:
        """Close the files that nobody took."""
        while self._files:
            self._files.popitem()[1].close()


class FileSink:
    """One blob on its way into a file."""

    def __init__(self, files: dict[Digest, IO[bytes]], file: IO[bytes], digest: Digest, size: int) -> None:
        self._files = files
        self._file = file
        self._digest = digest
        self._size = size
        self._hash = hashlib.sha256()
        self._kept = False

    @property
    def complete(self) -> bool:
        """Whether every byte is there."""
        return self._file.tell() == self._size

    def write(self, data: Piece) -> None:
        """Append `data`. Raises OSError."""
        self._hash.update(data)
        view = memoryview(data)
        for start in range(0, len(view), _WRITE):
            self._file.write(view[start : start + _WRITE])

    def commit(self, labels: Mapping[str, str] | None = None) -> None:  # noqa: ARG002 - a file has none
        """Keep the file. Raises FailedPrecondition when it is not the blob that was announced."""
        self._file.flush()
        if not self.complete or self._hash.hexdigest() != self._digest.removeprefix("sha256:"):
            raise FailedPrecondition(f"blob {self._digest}: other bytes than the digest is of")
        self._files[self._digest] = self._file
        self._kept = True

    def close(self) -> None:
        """Forget what was not committed."""
        if not self._kept:
            self._file.close()
