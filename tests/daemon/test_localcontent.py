"""Artifacts that are on the host: which are used, and what happens when the store is of no help."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from snapshotter.daemon.discovery import Modes, find_index
from snapshotter.daemon.localcontent import ContainerdArtifacts, LayoutArtifacts, LocalFirst, LocalStore
from snapshotter.errors import NoIndex, NotFound
from snapshotter.oci.descriptor import Descriptor
from snapshotter.oci.media_types import OCI_MANIFEST, SOCI_INDEX_V1
from snapshotter.soci.artifacts import ArtifactDatabase, IndexRow
from snapshotter.soci.index import SociIndex
from snapshotter.soci.store import LayoutStore
from tests.conftest import ExpectedLogs
from tests.support.indexed import IndexedImage, make_index, octets, publish
from tests.support.lazylayer import make_tar
from tests.support.registry import Registry
from tests.support.registry_clients import run

BOTH = Modes(v1=True, v2=True)
T = TypeVar("T")


@pytest.fixture
def image(registry: Registry) -> IndexedImage:
    """An image that has no index in the registry."""
    return publish(registry, [make_tar({"a": b"A" * 1000})], version=None)


def made(image: IndexedImage, tool: str = "here") -> SociIndex:
    subject = Descriptor(OCI_MANIFEST, image.image.digest, len(image.image.manifest))
    return make_index(image.layers, subject=subject, tool=tool)


def keep(root: Path, image: IndexedImage, *indices: SociIndex) -> LayoutArtifacts:
    """Put indices into the store below `root`, as `soci` does, the newest last."""
    store, database = LayoutStore(root / "content"), ArtifactDatabase(root)
    for number, index in enumerate(indices):
        store.write(index.data)
        digest = image.image.digest
        database.add_index(
            IndexRow(index.digest, digest, "linux/amd64", len(index.data), digest, 1, SOCI_INDEX_V1, number)
        )
    return LayoutArtifacts(root)


def asking(registry: Registry, local: LocalStore, work: Callable[[LocalFirst], Awaitable[T]]) -> T:
    return run(registry, lambda client: work(LocalFirst(local, client)))


def find(image: IndexedImage, local: LocalStore) -> str:
    reference = image.reference
    found = asking(image.registry, local, lambda it: find_index(it, reference, explicit=None, modes=BOTH))
    return found.index.digest


def test_an_index_of_this_host_is_found(image: IndexedImage, tmp_path: Path) -> None:
    index = made(image)
    assert find(image, keep(tmp_path, image, index)) == index.digest
    assert not [request for request in image.registry.requests if "referrers" in request.path]


def test_of_several_the_newest_is_used(image: IndexedImage, tmp_path: Path) -> None:
    one, two, three = (made(image, tool) for tool in ("one", "two", "three"))
    assert find(image, keep(tmp_path, image, one, three, two)) == two.digest


def test_the_registry_is_asked_for_what_is_not_here(image: IndexedImage, tmp_path: Path) -> None:
    empty = LayoutArtifacts(tmp_path)
    with pytest.raises(NoIndex):
        find(image, empty)
    index = image.add_v1()
    assert find(image, empty) == index.digest


def test_an_index_of_another_image_does_not_count(
    registry: Registry, image: IndexedImage, tmp_path: Path
) -> None:
    other = publish(registry, [make_tar({"b": b"B"})], repository="other", version=None)
    with pytest.raises(NoIndex):
        find(image, keep(tmp_path, image, made(other)))


def test_an_index_that_is_not_in_the_store_any_more_does_not_count(
    image: IndexedImage, tmp_path: Path
) -> None:
    index = made(image)
    local = keep(tmp_path, image, index)
    LayoutStore(tmp_path / "content").remove(index.digest)
    with pytest.raises(NoIndex):
        find(image, local)


def test_manifest_and_ztoc_come_from_here(image: IndexedImage, tmp_path: Path) -> None:
    (layer,) = image.layers
    store = LayoutStore(tmp_path / "content")
    for data in (layer.ztoc, image.image.manifest):
        store.write(data)
    local, reference = LayoutArtifacts(tmp_path), image.reference
    found = asking(image.registry, local, lambda it: it.blob(reference, layer.descriptor(), max_size=1 << 20))
    assert found == layer.ztoc
    assert asking(image.registry, local, lambda it: it.manifest(reference))[1] == image.image.manifest
    assert image.registry.requests == []


def test_damaged_content_is_taken_from_the_registry(
    image: IndexedImage, tmp_path: Path, expected_logs: ExpectedLogs
) -> None:
    (layer,) = image.layers
    image.registry.add_blob(layer.ztoc, repository="app")
    store = LayoutStore(tmp_path / "content")
    store.path(store.write(layer.ztoc)).write_bytes(b"x" * len(layer.ztoc))
    expected_logs.allow("no help from the local content store")
    local, reference = LayoutArtifacts(tmp_path), image.reference
    found = asking(image.registry, local, lambda it: it.blob(reference, layer.descriptor(), max_size=1 << 20))
    assert found == layer.ztoc


def test_a_manifest_that_is_none_is_left_to_the_registry(image: IndexedImage, tmp_path: Path) -> None:
    digest = LayoutStore(tmp_path / "content").write(b"no manifest")
    reference = image.reference.with_digest(digest)
    with pytest.raises(Exception, match="404"):
        asking(image.registry, LayoutArtifacts(tmp_path), lambda it: it.manifest(reference))


def test_a_containerd_that_is_not_there_is_no_obstacle(
    image: IndexedImage, tmp_path: Path, expected_logs: ExpectedLogs
) -> None:
    index = image.add_v1()
    expected_logs.allow("no help from the local content store")
    assert find(image, ContainerdArtifacts(str(tmp_path / "none.sock"))) == index.digest


def test_what_is_nowhere_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        LayoutArtifacts(tmp_path).read(octets(b"absent").digest)
