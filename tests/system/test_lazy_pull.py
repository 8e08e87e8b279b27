"""A real pull: what is lazy, what is fetched, what is left behind."""

from __future__ import annotations

import hashlib
import json
import random
import time
from pathlib import Path

import pytest

from tests.support.images import Image, ImageBuilder
from tests.support.lazysystem import LazySystem
from tests.support.process import wait_until

_RANDOM = random.Random(11)
BASE = {f"base/f{number}": _RANDOM.randbytes(500_000) for number in range(20)}
TOP = {f"top/f{number}": _RANDOM.randbytes(300_000) for number in range(20)}


@pytest.fixture(scope="module")
def image(module_workdir: Path) -> Image:
    return ImageBuilder(module_workdir / "image").layer(BASE, level=1).layer(TOP, level=1).build()


@pytest.fixture(scope="module")
def reference(system: LazySystem, image: Image) -> str:
    return system.publish(image, "test/lazy", "--min-layer-size", "0", "--span-size", "262144")


def test_a_lazy_pull_fetches_no_layer_and_a_run_reads_right(
    system: LazySystem, image: Image, reference: str
) -> None:
    mark = system.registry.mark()
    system.pull(reference)
    blobs = [r for r in system.registry.requests(mark) if r.kind == "blob" and not r.is_range]
    assert sum(request.size for request in blobs) < image.size / 4, "more than the zTOCs was fetched whole"
    assert {mount["layer"] for mount in system.mounts()} == {blob.digest for blob in image.layers}
    infos = system.containerd.ctr("snapshots", "--snapshotter", "soci", "ls")
    assert infos.count("Committed") == len(image.layers)
    content = system.containerd.ctr("content", "ls", "-q").split()
    assert not {blob.digest for blob in image.layers} & set(content)
    assert read_all(system, reference) == expected()
    markers = [r["remote-snapshot-prepared"] for r in system.records("image layer prepared")]
    assert markers[-2:] == ["true", "true"]


def test_the_background_completes_and_verifies_every_layer(system: LazySystem, reference: str) -> None:
    wait_until(lambda: all(m["verified"] for m in system.mounts()), timeout=60, what="layers are verified")
    mark = system.registry.mark()
    assert read_all(system, reference) == expected()
    assert [r for r in system.registry.requests(mark) if r.kind == "blob"] == []
    metrics = system.daemon.metrics()
    assert metrics["soci_fetch_layers_verified_total"] >= 2
    assert metrics['soci_fuse_requests_total{kind="read"}'] > 0


def test_layers_are_stored_and_fetched_once_for_all_images(
    system: LazySystem, image: Image, module_workdir: Path, reference: str
) -> None:
    """Another image of the same layers, upside down: other snapshots, same files."""
    turned = ImageBuilder(module_workdir / "turned").add(*reversed(image.layers)).build()
    other = system.publish(turned, "test/turned", "--min-layer-size", "0", "--span-size", "262144")
    mark = system.registry.mark()
    system.pull(other)
    assert len(system.mounts()) == 4
    assert read_all(system, other) == expected()
    assert [r for r in system.registry.requests(mark) if r.is_range and r.size > 2] == []
    system.containerd.ctr("images", "rm", "--sync", other)
    assert len(system.mounts()) == 2
    assert read_all(system, reference) == expected()


def test_usage_tells_what_a_lazy_layer_occupies(system: LazySystem, image: Image) -> None:
    usage = system.containerd.ctr("snapshots", "--snapshotter", "soci", "usage", "-b").splitlines()[1:]
    sizes = sorted(int(line.split()[-2]) for line in usage)
    assert sizes[-1] >= image.layers[0].size


def test_idle_layers_have_no_process_and_are_not_woken(system: LazySystem, reference: str) -> None:
    wait_until(lambda: all(m["state"] == "asleep" for m in system.mounts()), timeout=30, what="layers sleep")
    assert [mount["pid"] for mount in system.mounts()] == [None, None]
    Path("/proc/sys/vm/drop_caches").write_text("3\n", encoding="ascii")
    time.sleep(0.3)
    assert all(mount["state"] == "asleep" for mount in system.mounts())
    assert read_all(system, reference) == expected()


def test_a_removed_image_leaves_nothing(system: LazySystem, reference: str) -> None:
    layers = Path(system.daemon.root) / "layers/sha256"
    assert len(list(layers.iterdir())) == 2
    system.containerd.ctr("images", "rm", "--sync", reference)
    wait_until(lambda: not system.mounts(), timeout=60, what="the layers are unmounted")
    wait_until(lambda: not list(layers.iterdir()), timeout=60, what="the layers' files are removed")
    assert list((system.daemon.root / "snapshotter/snapshots").iterdir()) == []


def test_an_image_without_index_is_pulled_in_full(system: LazySystem, module_workdir: Path) -> None:
    image = ImageBuilder(module_workdir / "noindex").layer({"a": b"plain"}).build()
    reference = system.registry.push(image, "test/noindex")
    system.pull(reference)
    assert system.mounts() == []
    assert any('"a"' in line for line in system.containerd.dump_tree(reference, snapshotter="soci"))
    reasons = [r.get("reason") for r in system.records("layer is left to the client")]
    assert "no-index" in reasons
    system.containerd.ctr("images", "rm", "--sync", reference)


def read_all(system: LazySystem, reference: str) -> dict[str, str]:
    """Return path and hash of every regular file, as a container reads them."""
    entries = [json.loads(line) for line in system.containerd.dump_tree(reference, snapshotter="soci")]
    return {e["path"]: e["sha256"] for e in entries if e["path"].startswith(("base/", "top/"))}


def expected() -> dict[str, str]:
    return {path: hashlib.sha256(data).hexdigest() for path, data in {**BASE, **TOP}.items()}
