"""What every artifact store promises, as functions of a store: run on our directory and on containerd alike."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from snapshotter.errors import CorruptData, DigestMismatch, NotFound, SnapshotterError
from snapshotter.soci.content import CHUNK_SIZE, ArtifactStore, read_verified
from snapshotter.units import Digest, sha256_digest
from tests.soci.images import noise

ABSENT = sha256_digest(b"never written")


def content_comes_back_whole(store: ArtifactStore) -> None:
    data = noise(2 * CHUNK_SIZE + 17, seed=1)
    digest = store.write(data)
    assert digest == sha256_digest(data)
    assert store.size(digest) == len(data)
    assert read_verified(store, digest) == data


def content_comes_in_pieces(store: ArtifactStore) -> None:
    data = noise(2 * CHUNK_SIZE + 17, seed=1)
    digest = store.write(data)
    pieces = list(store.chunks(digest))
    assert b"".join(pieces) == data
    assert max(map(len, pieces)) <= 4 * CHUNK_SIZE
    # A stream that is left early must not hold anything up.
    stream = store.chunks(digest)
    assert data.startswith(next(stream))
    del stream
    assert store.size(digest) == len(data)


def ranges_are_half_open(store: ArtifactStore) -> None:
    data = noise(CHUNK_SIZE + 1000, seed=2)
    digest = store.write(data)
    for start, end in ((0, 1), (5, 500), (CHUNK_SIZE - 1, CHUNK_SIZE + 1), (7, 7), (0, 0), (0, len(data))):
        assert store.read_range(digest, start, end) == data[start:end]


def a_range_beyond_the_end_is_an_error(store: ArtifactStore) -> None:
    digest = store.write(b"four")
    with pytest.raises(SnapshotterError, match=str(digest)):
        store.read_range(digest, 2, 5)


def an_empty_blob_is_a_blob(store: ArtifactStore) -> None:
    digest = store.write(b"")
    assert store.size(digest) == 0
    assert list(store.chunks(digest)) == []
    assert read_verified(store, digest) == b""


def writing_twice_is_writing_once(store: ArtifactStore) -> None:
    assert store.write(b"data", labels={"a": "b"}) == store.write(b"data", labels={"a": "c"})
    assert read_verified(store, sha256_digest(b"data")) == b"data"


def absent_content_is_named_by_every_call(store: ArtifactStore) -> None:
    calls: tuple[Callable[[], object], ...] = (
        lambda: store.size(ABSENT),
        lambda: store.read_range(ABSENT, 0, 1),
        lambda: list(store.chunks(ABSENT)),
        lambda: store.remove(ABSENT),
        lambda: read_verified(store, ABSENT),
    )
    for call in calls:
        with pytest.raises(NotFound, match=str(ABSENT)):
            call()


def removed_content_is_gone_and_may_come_back(store: ArtifactStore) -> None:
    digest = store.write(b"data")
    store.remove(digest)
    with pytest.raises(NotFound):
        store.size(digest)
    assert store.write(b"data") == digest
    assert store.size(digest) == 4


def too_large_a_document_is_refused(store: ArtifactStore) -> None:
    digest = store.write(b"data")
    with pytest.raises(CorruptData, match=f"{digest}: 4 bytes, more than the 3 allowed"):
        read_verified(store, digest, limit=3)


def threads_may_write_at_once(store: ArtifactStore) -> None:
    blobs = [noise(100_000, seed=seed) for seed in (5, 6, 5, 6, 5, 6)]
    threads = [threading.Thread(target=store.write, args=(blob,)) for blob in blobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for blob in blobs:
        assert read_verified(store, sha256_digest(blob)) == blob


class Lying:
    """A source whose bytes are not what they are called."""

    def __init__(self, store: ArtifactStore, digest: Digest) -> None:
        self._store, self._digest = store, digest

    def size(self, digest: Digest) -> int:
        return self._store.size(self._digest)

    def read_range(self, digest: Digest, start: int, end: int) -> bytes:
        return self._store.read_range(self._digest, start, end)

    chunks = None  # not asked for


def other_bytes_than_the_digest_s_are_refused(store: ArtifactStore) -> None:
    lying = Lying(store, store.write(b"other"))
    with pytest.raises(DigestMismatch, match=str(ABSENT)):
        read_verified(lying, ABSENT)  # type: ignore[arg-type]


CHECKS: dict[str, Callable[[ArtifactStore], None]] = {
    check.__name__: check
    for check in (
        content_comes_back_whole,
        content_comes_in_pieces,
        ranges_are_half_open,
        a_range_beyond_the_end_is_an_error,
        an_empty_blob_is_a_blob,
        writing_twice_is_writing_once,
        absent_content_is_named_by_every_call,
        removed_content_is_gone_and_may_come_back,
        too_large_a_document_is_refused,
        threads_may_write_at_once,
        other_bytes_than_the_digest_s_are_refused,
    )
}
