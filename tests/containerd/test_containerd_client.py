"""The client against a real containerd: every service, and every way that it says no."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from snapshotter.containerd.client import Containerd
from snapshotter.containerd.content import MESSAGE_SIZE
from snapshotter.errors import (
    AlreadyExists,
    FailedPrecondition,
    NotFound,
    SnapshotterError,
    UsageError,
)
from snapshotter.oci.descriptor import Descriptor
from snapshotter.oci.media_types import OCI_LAYER_GZIP, OCI_MANIFEST
from snapshotter.soci.content import read_verified
from snapshotter.units import Digest, sha256_digest
from tests.soci.content_contract import CHECKS
from tests.support import images
from tests.support.containerd import Containerd as Server

ABSENT = sha256_digest(b"never written")


@pytest.mark.parametrize("name", CHECKS)
def test_content_contract(containerd: Containerd, name: str) -> None:
    CHECKS[name](containerd.content)


def test_absent_content_has_no_labels(containerd: Containerd) -> None:
    for call in (
        lambda: containerd.content.labels(ABSENT),
        lambda: containerd.content.label(ABSENT, {"a": "b"}),
    ):
        with pytest.raises(NotFound, match=str(ABSENT)):
            call()
    assert not containerd.content.exists(ABSENT)


def test_writing_again_only_sets_labels(containerd: Containerd) -> None:
    digest = containerd.content.write(b"data", labels={"a": "1", "b": "1"})
    assert containerd.content.write(b"data", labels={"b": "2", "dotted.name/x": "3"}) == digest
    assert containerd.content.labels(digest) == {"a": "1", "b": "2", "dotted.name/x": "3"}


def test_content_of_another_namespace_is_taken_over(server: Server, containerd: Containerd) -> None:
    data = os.urandom(3 * MESSAGE_SIZE)
    with Containerd.connect(str(server.address), "elsewhere") as other, other.lease() as elsewhere:
        digest = elsewhere.content.write(data)
        assert not containerd.content.exists(digest)
        assert containerd.content.write(data, labels={"mine": "yes"}) == digest
    assert containerd.content.labels(digest) == {"mine": "yes"}
    assert read_verified(containerd.content, digest) == data


@pytest.mark.parametrize("size", [4, 9])
def test_content_that_is_not_what_was_announced_is_refused(containerd: Containerd, size: int) -> None:
    with containerd.content.ingest(ABSENT, size) as ingest:
        ingest.write(b"data")
        with pytest.raises(FailedPrecondition, match=str(ABSENT)):
            ingest.commit()
    assert not containerd.content.exists(ABSENT)
    assert containerd.content.ingests() == []


def test_an_abandoned_write_leaves_nothing(containerd: Containerd) -> None:
    with containerd.content.ingest(ABSENT, 100) as ingest:
        ingest.write(b"half")
        assert len(containerd.content.ingests()) == 1
    assert containerd.content.ingests() == []


def test_two_writers_of_one_blob_do_not_wait_for_each_other(containerd: Containerd) -> None:
    data = b"the same twice"
    digest = sha256_digest(data)
    with (
        containerd.content.ingest(digest, len(data)) as one,
        containerd.content.ingest(digest, len(data)) as two,
    ):
        one.write(data)
        two.write(data)
        one.commit()
        with pytest.raises(AlreadyExists):
            two.commit()
    assert read_verified(containerd.content, digest) == data


def test_image_records(containerd: Containerd) -> None:
    one = Descriptor(OCI_MANIFEST, containerd.content.write(b"one"), 3)
    two = Descriptor(OCI_MANIFEST, containerd.content.write(b"two"), 3)
    containerd.images.put("registry.example/b:1", one)
    containerd.images.put("registry.example/a:1", two)
    containerd.images.label("registry.example/b:1", {"containerd.io/gc.ref.content.x": "y"})
    containerd.images.put("registry.example/b:1", two)
    image = containerd.images.get("registry.example/b:1")
    assert image.target == two
    assert image.labels == {"containerd.io/gc.ref.content.x": "y"}
    assert [found.name for found in containerd.images.list()] == [
        "registry.example/a:1",
        "registry.example/b:1",
    ]
    assert containerd.images.list(target=one.digest) == []
    containerd.images.remove("registry.example/b:1")
    with pytest.raises(NotFound, match=r"image registry\.example/b:1"):
        containerd.images.get("registry.example/b:1")


def collect_garbage(client: Containerd) -> Digest:
    """Make containerd collect now; return the digest of something that was garbage."""
    anchor = Descriptor(OCI_MANIFEST, client.content.write(b"anchor"), 6)
    client.images.put("registry.example/anchor:1", anchor)
    client.images.remove("registry.example/anchor:1", collect=True)
    return anchor.digest


def test_a_lease_protects_content_exactly_as_long_as_it_lives(unleased: Containerd) -> None:
    with unleased.lease() as leased:
        digest = leased.content.write(b"leased")
        assert not unleased.content.exists(collect_garbage(unleased))
        assert unleased.content.exists(digest)
    collect_garbage(unleased)
    assert not unleased.content.exists(digest)


def write_late(client: Containerd) -> None:
    with client.lease() as leased:
        for each in (client, leased):
            each._connection._deadline = time.monotonic()
        leased.content.write(b"late")


def test_a_lease_ends_although_the_time_is_over(server: Server, unleased: Containerd) -> None:
    hurried = Containerd.connect(str(server.address), unleased.namespace, timeout=600)
    with hurried, pytest.raises(SnapshotterError, match="did not answer in time"):
        write_late(hurried)
    assert server.ctr("--namespace", unleased.namespace, "leases", "ls", "--quiet") == ""


def layer(containerd: Containerd) -> tuple[Descriptor, Digest]:
    made = images.layer({"file": b"content"})
    assert isinstance(made.content, bytes)
    return Descriptor(OCI_LAYER_GZIP, containerd.content.write(made.content), made.size), Digest(made.diff_id)


def test_a_layer_becomes_a_snapshot(containerd: Containerd) -> None:
    snapshots = containerd.snapshots("overlayfs")
    with containerd.lease() as leased:
        blob, diff_id = layer(leased)
        mounts = leased.snapshots("overlayfs").prepare("key", "", {"containerd.io/snapshot.ref": "name"})
        assert leased.apply(blob, mounts).result() == diff_id
        snapshots.commit("name", "key", {"containerd.io/snapshot.ref": "name"})
        info = snapshots.stat("name")
        assert (info.name, info.parent, info.committed) == ("name", "", True)
        assert info.labels == {"containerd.io/snapshot.ref": "name"}
        assert [found.name for found in snapshots.list()] == ["name"]
        with pytest.raises(AlreadyExists):
            snapshots.prepare("name", "", {})
        snapshots.remove("name")
    assert not snapshots.exists("name")


def test_unpacking_a_broken_layer_names_it(containerd: Containerd) -> None:
    with containerd.lease() as leased:
        digest = leased.content.write(b"not gzip")
        mounts = leased.snapshots("overlayfs").prepare("key", "", {})
        with pytest.raises(SnapshotterError, match=f"unpacking layer {digest}"):
            leased.apply(Descriptor(OCI_LAYER_GZIP, digest, 8), mounts).result()


def test_unpacking_can_be_cancelled(server: Server, containerd: Containerd) -> None:
    with containerd.lease() as leased:
        blob, _ = layer(leased)
        mounts = leased.snapshots("overlayfs").prepare("key", "", {})
        os.kill(server.pid, signal.SIGSTOP)  # or it could be done before it is told
        try:
            work = leased.apply(blob, mounts)
            work.cancel()
            with pytest.raises(UsageError, match="interrupted"):
                work.result()
        finally:
            os.kill(server.pid, signal.SIGCONT)


def test_an_unknown_snapshotter_is_explained(containerd: Containerd) -> None:
    with pytest.raises(UsageError, match=r"\[proxy_plugins.nosuch\]"):
        containerd.snapshots("nosuch").exists("name")


def test_a_blob_is_read_from_containerds_own_file(
    containerd: Containerd, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(2 * MESSAGE_SIZE + 1)
    digest = containerd.content.write(data)
    monkeypatch.setattr(containerd.content._stub, "Read", None)
    assert b"".join(containerd.content.chunks(digest)) == data


@pytest.mark.parametrize("damage", ["absent", "of another size"])
def test_a_blob_whose_file_cannot_be_had_comes_over_the_socket(
    containerd: Containerd, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: str
) -> None:
    data = os.urandom(MESSAGE_SIZE + 1)
    digest = containerd.content.write(data)
    if damage == "of another size":
        file = tmp_path / "blobs" / digest.replace(":", "/")
        file.parent.mkdir(parents=True)
        file.write_bytes(data[1:])
    monkeypatch.setattr(containerd.content, "_root", lambda: tmp_path)
    assert b"".join(containerd.content.chunks(digest)) == data


def test_a_containerd_that_does_not_say_where_its_content_is(
    containerd: Containerd, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = containerd.content.write(b"data")

    def refused(*_: object) -> None:
        raise SnapshotterError("no such service")

    with monkeypatch.context() as patch:
        patch.setattr(containerd.content._connection, "call", refused)
        root = containerd.content._root()
    monkeypatch.setattr(containerd.content, "_root", lambda: root)
    assert b"".join(containerd.content.chunks(digest)) == b"data"


def test_a_missing_containerd_is_explained(tmp_path: Path) -> None:
    nobody = Containerd.connect(f"unix://{tmp_path}/c.sock", "default")
    with (
        nobody,
        pytest.raises(UsageError, match=rf"cannot reach containerd at {tmp_path}/c.sock .*--address"),
    ):
        nobody.images.list()
