"""The OCI layout that artifacts are kept in, and the database that remembers them."""

from __future__ import annotations

import json
import resource
import sqlite3
import subprocess
import threading
from pathlib import Path

import pytest

from snapshotter.errors import CorruptData, DigestMismatch, NotFound, SnapshotterError
from snapshotter.soci.artifacts import ArtifactDatabase, IndexRow, ZtocRow
from snapshotter.soci.content import read_verified
from snapshotter.soci.store import LayoutStore
from snapshotter.units import Digest, sha256_digest
from tests.soci.content_contract import CHECKS
from tests.soci.images import noise
from tests.support.images import ImageBuilder


def a_digest(text: str) -> Digest:
    return sha256_digest(text.encode())


def index_row(name: str, *, image: str = "image", platform: str = "linux/amd64", at: float = 1.0) -> IndexRow:
    return IndexRow(
        a_digest(name), a_digest(image), platform, 10, a_digest(f"{image} {platform}"), 1, "type", at
    )


def ztoc_row(name: str, *, span_size: int = 4, build_tool: str = "tool", at: float = 1.0) -> ZtocRow:
    return ZtocRow(a_digest(name), 10, a_digest("layer"), span_size, build_tool, at)


@pytest.mark.parametrize("name", CHECKS)
def test_contract(tmp_path: Path, name: str) -> None:
    CHECKS[name](LayoutStore(tmp_path / "content"))


def test_writing_twice_writes_once(tmp_path: Path) -> None:
    store = LayoutStore(tmp_path)
    digest = store.write(b"data")
    before = store.path(digest).stat()
    assert store.write(b"data") == digest
    assert store.path(digest).stat() == before


def test_a_half_written_blob_is_replaced(tmp_path: Path) -> None:
    store = LayoutStore(tmp_path)
    digest = store.write(b"data")
    store.path(digest).write_bytes(b"da")
    store.write(b"data")
    assert read_verified(store, digest) == b"data"


def test_nothing_is_left_in_ingest(tmp_path: Path) -> None:
    LayoutStore(tmp_path).write(b"data")
    assert list((tmp_path / "ingest").iterdir()) == []


def test_reads_do_not_believe_the_disk(tmp_path: Path) -> None:
    store = LayoutStore(tmp_path)
    digest = store.write(b"data")
    store.path(digest).write_bytes(b"dato")
    with pytest.raises(DigestMismatch, match=str(digest)):
        read_verified(store, digest)
    with pytest.raises(CorruptData, match="shorter"):
        store.read_range(digest, 0, 5)
    with pytest.raises(CorruptData, match="more than the 3 allowed"):
        read_verified(store, digest, limit=3)


def test_a_store_that_cannot_be_written_says_where(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SnapshotterError, match=f"cannot write {tmp_path}/file/content"):
        LayoutStore(tmp_path / "file" / "content").write(b"data")


def test_a_full_disk_leaves_no_blob_and_no_remains(tmp_path: Path) -> None:
    store = LayoutStore(tmp_path)
    store.write(b"the directory exists")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(SnapshotterError, match=f"cannot write {tmp_path}/blobs"):
            store.write(bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(list((tmp_path / "blobs/sha256").iterdir())) == 1
    assert list((tmp_path / "ingest").iterdir()) == []


def test_many_writers_of_one_blob(tmp_path: Path) -> None:
    data = noise(300_000, seed=4)
    stores = [LayoutStore(tmp_path) for _ in range(8)]
    threads = [threading.Thread(target=store.write, args=(data,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read_verified(stores[0], sha256_digest(data)) == data
    assert list((tmp_path / "ingest").iterdir()) == []


def test_another_tool_accepts_the_directory_as_a_layout(tmp_path: Path) -> None:
    store = LayoutStore(tmp_path / "content")
    artifact = store.write(b"data")
    image = ImageBuilder(tmp_path / "source").layer({"file": b"content"}).build()
    copy = ["skopeo", "copy", "--quiet", "--insecure-policy", image.source]
    subprocess.run([*copy, f"oci:{tmp_path / 'content'}:copy"], check=True)
    assert (
        json.loads(read_verified(store, Digest(image.digest)))["layers"][0]["digest"]
        == image.layers[0].digest
    )
    assert read_verified(store, artifact) == b"data"


def test_database_without_a_file_is_empty_and_makes_none(tmp_path: Path) -> None:
    database = ArtifactDatabase(tmp_path / "root")
    assert database.indices() == []
    assert database.ztocs() == []
    assert not (tmp_path / "root").exists()


def test_indices_are_found_by_each_of_their_names_newest_first(tmp_path: Path) -> None:
    database = ArtifactDatabase(tmp_path)
    old, new = index_row("old", at=1.0), index_row("new", at=2.0)
    other = index_row("other", image="another", platform="linux/arm64", at=3.0)
    for row in (new, old, other):
        database.add_index(row)
    assert database.indices() == [other, new, old]
    assert database.indices(image_digest=a_digest("image")) == [new, old]
    assert database.indices(digest=a_digest("old")) == [old]
    assert database.indices(manifest_digest=a_digest("another linux/arm64")) == [other]
    assert database.indices(digest=a_digest("old"), image_digest=a_digest("another")) == []


def test_one_index_of_two_images_is_two_rows_and_removed_at_once(tmp_path: Path) -> None:
    database = ArtifactDatabase(tmp_path)
    database.add_index(index_row("index", image="one"))
    database.add_index(index_row("index", image="two"))
    database.add_index(index_row("index", image="two", at=5.0))
    assert [row.created_at for row in database.indices()] == [5.0, 1.0]
    database.remove_index(a_digest("index"))
    assert database.indices() == []
    with pytest.raises(NotFound, match=str(a_digest("index"))):
        database.remove_index(a_digest("index"))


def test_ztocs_are_found_by_what_they_were_made_with(tmp_path: Path) -> None:
    database = ArtifactDatabase(tmp_path)
    rows = [ztoc_row("a"), ztoc_row("b", span_size=8, at=2.0), ztoc_row("c", build_tool="other", at=3.0)]
    for row in rows:
        database.add_ztoc(row)
    layer = a_digest("layer")
    assert database.ztocs(layer_digest=layer) == rows[::-1]
    assert database.ztocs(layer_digest=layer, span_size=4, build_tool="tool") == [rows[0]]
    assert database.ztocs(digest=a_digest("b")) == [rows[1]]


def test_commands_may_write_at_the_same_time(tmp_path: Path) -> None:
    database = ArtifactDatabase(tmp_path)
    threads = [
        threading.Thread(target=lambda n=n: [database.add_ztoc(ztoc_row(f"{n} {i}")) for i in range(10)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(database.ztocs()) == 40


def test_a_root_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SnapshotterError, match=f"cannot create {tmp_path}/file/root"):
        ArtifactDatabase(tmp_path / "file" / "root").add_ztoc(ztoc_row("a"))


def test_a_later_schema_and_a_damaged_file_are_refused(tmp_path: Path) -> None:
    database = ArtifactDatabase(tmp_path)
    path = tmp_path / "artifacts.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 7")
    connection.close()
    with pytest.raises(SnapshotterError, match="later version"):
        database.indices()
    path.write_bytes(b"not a database at all, but long enough to be looked at" * 10)
    with pytest.raises(SnapshotterError, match=str(path)):
        database.ztocs()
