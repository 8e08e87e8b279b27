"""Two places of content seen as one: what is new, over what it was made from; and one write that goes to two places.

Concurrency: as the two places themselves; nothing is owned here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from snapshotter.errors import NotFound
from snapshotter.soci.content import ArtifactStore, ContentSource
from snapshotter.units import Digest


class Overlay:
    """A content source: `upper` where it has the content, else `lower`."""

    def __init__(self, upper: ContentSource, lower: ContentSource) -> None:
        self._upper = upper
        self._lower = lower

    def size(self, digest: Digest) -> int:
        """Return the number of bytes. Raises NotFound, naming the lower place."""
        return self._place(digest).size(digest)

    def read_range(self, digest: Digest, start: int, end: int) -> bytes:
        """Return the bytes `[start, end)`. Raises NotFound, CorruptData."""
        return self._place(digest).read_range(digest, start, end)

    def chunks(self, digest: Digest) -> Iterator[bytes]:
        """Yield the whole content in pieces. Raises NotFound."""
        return self._place(digest).chunks(digest)

    def _place(self, digest: Digest) -> ContentSource:
        try:
            self._upper.size(digest)
        except NotFound:
            return self._lower
        return self._upper


class Tee:
    """An artifact store that keeps everything in two others and reads from the first."""

    def __init__(self, first: ArtifactStore, second: ArtifactStore) -> None:
        self._first = first
        self._second = second

    def size(self, digest: Digest) -> int:
        """Return the number of bytes. Raises NotFound unless both have it."""
        self._second.size(digest)
        return self._first.size(digest)

    def read_range(self, digest: Digest, start: int, end: int) -> bytes:
        """Return the bytes `[start, end)`. Raises NotFound, CorruptData."""
        return self._first.read_range(digest, start, end)

    def chunks(self, digest: Digest) -> Iterator[bytes]:
        """Yield the whole content in pieces. Raises NotFound."""
        return self._first.chunks(digest)

    def write(self, data: bytes, *, labels: Mapping[str, str] | None = None) -> Digest:
        """Store `data` in both, and return its digest."""
        self._second.write(data, labels=labels)
        return self._first.write(data, labels=labels)

    def remove(self, digest: Digest) -> None:
        """Remove the content from both. Raises NotFound."""
        self._second.remove(digest)
        self._first.remove(digest)
