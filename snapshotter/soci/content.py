"""What the other modules ask of a place that keeps content by digest.

Kept small: each method is here because somebody calls it. Implementations: a directory in OCI layout (`store`), an
OCI layout or archive that somebody made (`layout`), containerd's content store (package `containerd`).

Concurrency: every implementation may be called from several threads at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, Protocol

from snapshotter.errors import CorruptData, DigestMismatch
from snapshotter.units import Digest, sha256_digest

CHUNK_SIZE: Final = 1 << 20
"""Bytes per piece of a stream: large enough that per-piece costs vanish, small enough for a CPU cache's neighbour."""
MAX_DOCUMENT_SIZE: Final = 8 << 20
"""The largest manifest, index or config that is read whole."""


class ContentSource(Protocol):
    """Content to read, by digest. All raise NotFound, naming digest and place, for what is not there."""

    def size(self, digest: Digest) -> int:
        """Return the number of bytes."""

    def read_range(self, digest: Digest, start: int, end: int) -> bytes:
        """Return the bytes `[start, end)`, not verified. Raises CorruptData when there are fewer."""

    def chunks(self, digest: Digest) -> Iterator[bytes]:
        """Yield the whole content in pieces of about `CHUNK_SIZE`, not verified."""


class ArtifactStore(ContentSource, Protocol):
    """A content source that SOCI artifacts are also written to."""

    def write(self, data: bytes, *, labels: Mapping[str, str] | None = None) -> Digest:
        """Store `data` unless it is there already, set the labels in any case, and return its digest.

        After a crash the content is there in full or not at all.
        """

    def remove(self, digest: Digest) -> None:
        """Remove the content. Raises NotFound."""


def read_verified(source: ContentSource, digest: Digest, *, limit: int = MAX_DOCUMENT_SIZE) -> bytes:
    """Return a whole blob of at most `limit` bytes.

    Raises NotFound, CorruptData when it is larger, DigestMismatch when the bytes are not the digest's.
    """
    size = source.size(digest)
    if size > limit:
        raise CorruptData(f"content {digest}: {size} bytes, more than the {limit} allowed here")
    data = source.read_range(digest, 0, size)
    found = sha256_digest(data)
    if found != digest:
        raise DigestMismatch(f"content {digest}: the stored bytes have digest {found}")
    return data
