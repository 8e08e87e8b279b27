"""Images that are not lazy, pulled in full by the daemon: the same containers as by overlayfs, and containerd's content as ever."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.images import Entry, Image, ImageBuilder, directory, hardlink, symlink
from tests.support.lazysystem import LazySystem, lazy_system
from tests.support.registry import FlipByte, Registry

BIG = random.Random(1).randbytes(3 << 20)


def system_with(place: Path, **parallel: object) -> Any:
    where = {"containerd_address": str(place / "c" / "c.sock")}
    hosts = {"config_path": str(place / "hosts")}
    return lazy_system(
        place,
        {"content_store": where, "resolver": hosts, "pull_modes": {"parallel_pull_unpack": parallel}},
    )


@pytest.fixture(scope="module")
def system(module_workdir: Path) -> Iterator[LazySystem]:
    with system_with(
        module_workdir,
        experimental_parallel_pull_as_fallback=True,
        concurrent_download_chunk_size="1mb",
        max_concurrent_unpacks_per_image=2,
    ) as running:
        yield running


def nasty(place: Path) -> Image:
    """Layers that hide, replace and imply what is below, one of them twice, in every compression."""
    again = {"again": b"A"}
    return (
        ImageBuilder(place)
        .layer({"a/": directory(0o750, uid=3, gid=4), "a/old": b"old", "a/big": BIG, "b/": directory(0o1777)})
        .layer(again, compression="zstd")
        .layer(
            {"a/.wh.old": b"", "a/new": Entry(b"new", mode=0o4711), "a/twin": hardlink("a/new", mode=0o4711)}
        )
        .layer(again, compression="zstd")
        .layer({"b/.wh..wh..opq": b"", "b/link": symlink("../a/new")}, compression="uncompressed")
        .build()
    )


def facts(dump: list[str]) -> dict[str, Any]:
    """A dumped tree by path, without the times of directories that no layer names."""
    entries = [json.loads(line) for line in dump]
    return {entry["path"]: {**entry, "mtime_ns": 0} for entry in entries}


def prepared(system: LazySystem, mark: int) -> list[str]:
    """What became of each layer since the log had `mark` such records."""
    return [r.get("local-snapshot-prepared", "lazy") for r in system.records("image layer prepared")[mark:]]


def content(system: LazySystem) -> set[str]:
    return set(system.containerd.ctr("content", "ls", "--quiet").split())


def test_an_image_without_an_index(system: LazySystem, module_workdir: Path) -> None:
    image = nasty(module_workdir / "image")
    reference = system.registry.push(image, "plain")
    mark = system.registry.mark()
    system.pull(reference)
    assert prepared(system, 0) == ["true"] * 5
    ranges = [
        r
        for r in system.registry.requests(mark)
        if image.layers[0].digest in r.path and r.is_range and r.size > 2
    ]
    assert len(ranges) == -(-image.layers[0].size // (1 << 20))
    ours = facts(system.containerd.dump_tree(reference, snapshotter="soci"))
    system.soci("image", "rpull", "--snapshotter", "overlayfs", reference)
    assert ours == facts(system.containerd.dump_tree(reference))
    assert content(system) >= {layer.digest for layer in image.layers}
    system.containerd.ctr("images", "export", module_workdir / "plain.tar", reference)
    assert os.listdir(system.daemon.root / "unpack") == []
    system.containerd.ctr("images", "rm", "--sync", reference)
    assert content(system) == set()
    assert system.containerd.ctr("leases", "ls", "--quiet") == ""


def test_a_layer_that_a_mirror_damages_comes_from_the_registry(
    system: LazySystem, module_workdir: Path
) -> None:
    """containerd refuses the whole blob at its end; the second one is a write of its own."""
    image = ImageBuilder(module_workdir / "lied").layer({"big": BIG[::-1]}).build()
    reference = system.registry.push(image, "lied")
    with Registry() as mirror:
        blob = image.layers[0].content
        mirror.add_blob(blob, repository="lied")
        lie = mirror.fault(FlipByte(path=image.layers[0].digest, at=50, count=-1))
        hosts = module_workdir / "hosts" / system.registry.name / "hosts.toml"
        hosts.parent.mkdir(parents=True)
        hosts.write_text(f'[host."http://{mirror.host}"]\ncapabilities = ["pull"]\n')
        mark = len(system.records("image layer prepared"))
        system.pull(reference)
        hosts.unlink()
        assert lie.hits
        assert prepared(system, mark) == ["true"]
    assert "lied" in [record["outcome"] for record in system.records("a mirror is passed over")]
    assert content(system) >= {image.layers[0].digest}
    system.containerd.ctr("images", "rm", "--sync", reference)
    assert content(system) == set()


def test_containerd_s_own_client(system: LazySystem, module_workdir: Path) -> None:
    """ctr passes no labels of the image: it is left to containerd, as ever."""
    image = ImageBuilder(module_workdir / "ctr").layer({"ctr": b"C"}).build()
    reference = system.registry.push(image, "ctr")
    system.containerd.pull(reference, snapshotter="soci")
    assert content(system) >= {layer.digest for layer in image.layers}
    system.containerd.ctr("images", "rm", "--sync", reference)


def test_another_containerd_is_not_written_to(module_workdir: Path) -> None:
    place = module_workdir / "other"
    with lazy_system(
        place,
        {
            "content_store": {"containerd_address": str(place / "nobody.sock")},
            "pull_modes": {"parallel_pull_unpack": {"experimental_parallel_pull_as_fallback": True}},
        },
    ) as system:
        image = ImageBuilder(place / "image").layer({"a": b"A"}).layer({"b": b"B"}).build()
        reference = system.registry.push(image, "other")
        system.pull(reference)
        assert prepared(system, 0) == ["false", "false"]
        reasons = [r["reason"] for r in system.records("layer is left to the client")]
        assert reasons == ["no-index"] * 2
        assert content(system) >= {layer.digest for layer in image.layers}
        system.containerd.ctr("images", "rm", "--sync", reference)


def test_every_image_and_nothing_kept(module_workdir: Path) -> None:
    place = module_workdir / "always"
    with system_with(place, enable=True, discard_unpacked_layers=True) as system:
        image = ImageBuilder(place / "image").layer({"a": b"A"}).layer({"b": BIG}).build()
        reference = system.publish(image, "always", "--min-layer-size", "0")
        system.pull(reference)
        assert prepared(system, 0) == ["true", "true"]
        assert system.mounts() == []
        assert not content(system) & {layer.digest for layer in image.layers}
        paths = facts(system.containerd.dump_tree(reference, snapshotter="soci"))
        assert paths.keys() >= {"a", "b"}
        system.containerd.ctr("images", "rm", "--sync", reference)
