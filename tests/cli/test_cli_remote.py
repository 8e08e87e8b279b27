"""Pulling through a remote snapshotter: the labels it is given, the blobs that are not fetched, and the fallback.

The snapshotter is the real one; its layers are directories bound into place, so no index and no FUSE is needed.
"""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

from snapshotter.cli.labels import IMAGE_LAYERS, LAYERS_SIZE, MAX_LABEL_SIZE, remote_labels
from snapshotter.cli.unpack import chain_ids
from snapshotter.containerd.client import Containerd
from snapshotter.oci.descriptor import Descriptor
from snapshotter.oci.media_types import OCI_LAYER_GZIP
from snapshotter.units import Digest, sha256_digest
from tests.cli.conftest import Liar, Soci
from tests.support.containerd import Containerd as Server
from tests.support.images import directory, tar, tar_layer
from tests.support.layer_providers import DirectoryLayers
from tests.support.registry import Image, Registry

REMOTE = "containerd.io/snapshot/remote"
CRI = "containerd.io/snapshot/cri"


def add_image(registry: Registry) -> tuple[Image, list[bytes]]:
    """Put an image of three layers into the registry; return it with the layers' tars."""
    tars = [
        tar({"a/": directory(), "a/low": os.urandom(100)}),
        tar({"b/": directory(), "b/middle": os.urandom(200)}),
        tar({"a/top": os.urandom(300)}),
    ]
    blobs = [tar_layer(one).content for one in tars]
    return registry.add_image([blob for blob in blobs if isinstance(blob, bytes)]), tars


def chain_of(tars: list[bytes]) -> list[Digest]:
    return chain_ids([sha256_digest(one) for one in tars])


def prepare(layers: DirectoryLayers, tars: list[bytes], positions: list[int], scratch: Path) -> None:
    """Let the snapshotter have the layers of `positions` by itself."""
    layers.requests.clear()
    layers.prepared.clear()
    for position in positions:
        target = scratch / f"layer-{position}"
        with tarfile.open(fileobj=io.BytesIO(tars[position])) as archive:
            archive.extractall(target, filter="tar")
        layers.prepared[chain_of(tars)[position]] = target


def blob_requests(registry: Registry, image: Image) -> list[int]:
    """Which layers were asked for, by position."""
    asked = {request.path.rpartition("/")[2] for request in registry.requests if "/blobs/" in request.path}
    return [position for position, layer in enumerate(image.layers) if layer.digest in asked]


def test_a_remote_layer_is_described_and_its_blob_never_fetched(
    soci: Soci,
    server: Server,
    containerd: Containerd,
    layers: DirectoryLayers,
    registry: Registry,
    workdir: Path,
) -> None:
    image, tars = add_image(registry)
    prepare(layers, tars, [0, 1, 2], workdir)
    out = soci("image", "rpull", image.name).out.splitlines()
    assert [line.split(": ")[1].split(" ")[0] for line in out[1:4]] == ["remote"] * 3
    assert out[4].endswith("done by soci: 0 present, 3 remote, 0 unpacked")
    assert blob_requests(registry, image) == []
    digests = [str(layer.digest) for layer in image.layers]
    sizes = [str(layer.size) for layer in image.layers]
    for position, request in enumerate(layers.requests):
        assert request.namespace == server.namespace
        assert {key: value for key, value in request.labels.items() if key != f"{REMOTE}/namespace"} == {
            "containerd.io/snapshot.ref": chain_of(tars)[position],
            f"{CRI}.image-ref": image.name,
            f"{CRI}.manifest-digest": image.digest,
            f"{CRI}.layer-digest": digests[position],
            f"{CRI}.image-layers": ",".join(digests[position:]),
            f"{REMOTE}/soci.size": sizes[position],
            f"{REMOTE}/image.layers.size": ",".join(sizes[position:]),
        }
    label = containerd.content.labels(image.config)["containerd.io/gc.ref.snapshot.soci"]
    assert label == chain_of(tars)[-1]


def test_a_container_runs_on_remote_layers(
    soci: Soci,
    server: Server,
    containerd: Containerd,
    layers: DirectoryLayers,
    registry: Registry,
    workdir: Path,
) -> None:
    image, tars = add_image(registry)
    prepare(layers, tars, [0, 1, 2], workdir)
    soci("image", "rpull", image.name)
    dump = server.dump_tree(image.name, snapshotter="soci")
    assert {'"path": "a/low"', '"path": "a/top"', '"path": "b/middle"'} <= {
        line[1:].split(",")[0] for line in dump
    }
    containerd.images.remove(image.name, collect=True)
    assert containerd.snapshots("soci").list() == []


def test_from_the_first_layer_that_is_not_remote_blobs_are_fetched(
    soci: Soci,
    server: Server,
    containerd: Containerd,
    layers: DirectoryLayers,
    registry: Registry,
    workdir: Path,
) -> None:
    image, tars = add_image(registry)
    prepare(layers, tars, [0], workdir)
    out = soci("image", "rpull", image.name).out.splitlines()
    assert [line.split(": ")[1].split(" ")[0] for line in out[1:4]] == ["remote", "unpacked", "unpacked"]
    assert blob_requests(registry, image) == [1, 2]
    assert [containerd.content.exists(layer.digest) for layer in image.layers] == [False, True, True]
    assert any("b/middle" in line for line in server.dump_tree(image.name, snapshotter="soci"))


def test_an_explicit_index_is_passed_on(
    soci: Soci, layers: DirectoryLayers, registry: Registry, workdir: Path
) -> None:
    image, tars = add_image(registry)
    prepare(layers, tars, [0, 1, 2], workdir)
    index = sha256_digest(b"index")
    soci("image", "rpull", "--soci-index-digest", index, image.name)
    assert [request.labels[f"{REMOTE}/soci.index.digest"] for request in layers.requests] == [index] * 3


def test_a_snapshotter_that_lies_fails_the_pull(soci: Soci, registry: Registry, liar: Liar) -> None:
    image, tars = add_image(registry)
    error = soci.fails("image", "rpull", "--snapshotter", "liar", image.name)
    assert f'of liar: target snapshot "{chain_of(tars)[0]}" in backend: not found' in error
    assert liar.prepared == 1


def test_lists_of_layers_are_cut_to_what_containerd_accepts() -> None:
    layers = [Descriptor(OCI_LAYER_GZIP, sha256_digest(b"%d" % i), 10**9 + i) for i in range(500)]
    labels = remote_labels("registry.example/app:1", layers[0].digest, layers, None)
    for key in (IMAGE_LAYERS, LAYERS_SIZE):
        assert len(key) + len(labels[key]) <= MAX_LABEL_SIZE
    listed = labels[IMAGE_LAYERS].split(",")
    assert listed == [layer.digest for layer in layers[: len(listed)]]
    assert len(listed) == 56
    assert labels[LAYERS_SIZE].split(",")[:2] == ["1000000000", "1000000001"]
