"""Layers that are not those that images' configurations name, by chain IDs alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from snapshotter.daemon.diffids import misnamed
from snapshotter.snapshot.model import Kind, LazyMount, Owner
from snapshotter.snapshot.store import SnapshotStore
from snapshotter.units import sha256_digest

FIRST, SECOND, OTHER = (sha256_digest(text) for text in (b"first tar", b"second tar", b"other tar"))
LAYERS = sha256_digest(b"first blob"), sha256_digest(b"second blob")
CHAINS = FIRST, sha256_digest(f"{FIRST} {SECOND}".encode())


@pytest.fixture(params=["{}", "k8s.io/17/{}"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> SnapshotStore:
    """Two lazy layers, named as containerd names them; a snapshot that is not committed, and one that is named by hand."""
    store = SnapshotStore(tmp_path / "metadata.db")
    owner, parent = Owner(0, 0), ""
    for number, (chain, layer) in enumerate(zip(CHAINS, LAYERS, strict=True), start=1):
        name = request.param.format(chain)
        store.create(number, Kind.COMMITTED, name, parent=parent, labels={}, owner=owner, lazy=True)
        store.record_mount(LazyMount(number, layer, "", "registry/image:tag", "sha256:manifest", "k8s.io"))
        parent = name
    for number, (name, kind) in enumerate(
        (("extract-1 key", Kind.ACTIVE), ("by-hand", Kind.COMMITTED)), start=3
    ):
        store.create(number, kind, name, parent="", labels={}, owner=owner)
        store.record_mount(LazyMount(number, LAYERS[0], "", "registry/other", "sha256:manifest", "k8s.io"))
    return store


def test_layers_that_are_what_their_chains_say(store: SnapshotStore) -> None:
    assert list(misnamed(store, LAYERS[0], FIRST)) == []
    assert list(misnamed(store, LAYERS[1], SECOND)) == []


def test_layers_that_are_not(store: SnapshotStore) -> None:
    for number, layer in enumerate(LAYERS):
        ((name, image),) = misnamed(store, layer, OTHER)
        assert name.endswith(CHAINS[number])
        assert image == "registry/image:tag"
