"""Artifacts that were made on the host and pushed nowhere: the daemon finds them where `soci` keeps them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotter.containerd.client import Containerd
from tests.support.images import ImageBuilder, sha256
from tests.support.lazysystem import LazySystem, lazy_system

FILES = {f"d/f{number}": random.Random(number).randbytes(200_000) for number in range(5)}
CREATE = ("create", "--min-layer-size", "0", "--span-size", "262144")


@pytest.fixture(scope="module")
def system(module_workdir: Path) -> Iterator[LazySystem]:
    where = {"type": "containerd", "containerd_address": str(module_workdir / "c" / "c.sock")}
    with lazy_system(module_workdir, {"content_store": where}) as running:
        yield running


def indexed_here(system: LazySystem, place: Path, repository: str, *options: str) -> str:
    """Push an image, pull it whole, and index it; return its name."""
    image = ImageBuilder(place / repository).layer({**FILES, "name": repository.encode()}).build()
    reference = system.registry.push(image, repository)
    system.soci("image", "rpull", "--snapshotter", "overlayfs", reference)
    system.soci(*CREATE, *options, reference)
    return reference


def artifacts(system: LazySystem) -> set[str]:
    """Digests of the SOCI indices in containerd, and of what they name."""
    with Containerd.connect(str(system.containerd.address), "default") as containerd:
        content = containerd.content
        indices = [digest for _created, digest in content.labelled("containerd.io/gc.ref.content.ztoc.0")]
        named = [set(content.labels(digest).values()) for digest in indices]
        return {str(digest) for digest in indices}.union(*named)


def read_all(system: LazySystem, reference: str) -> dict[str, str]:
    entries = map(json.loads, system.containerd.dump_tree(reference, snapshotter="soci"))
    return {one["path"]: one["sha256"] for one in entries if one["path"].startswith("d/f")}


def test_containerd_s_garbage_collector_and_the_daemon(system: LazySystem, module_workdir: Path) -> None:
    """Two images with an index in containerd: lazy both, and each index is kept exactly as long as its image."""
    gone = indexed_here(system, module_workdir, "gone")
    of_gone = artifacts(system)
    kept = indexed_here(system, module_workdir, "kept")
    of_kept = artifacts(system) - of_gone
    assert len(of_gone) == 3  # index, config and zTOC
    assert len(of_kept) == 2  # the config is the same
    mark = system.registry.mark()
    for reference in (gone, kept):
        system.pull(reference)
        assert read_all(system, reference) == {path: sha256(data)[7:] for path, data in FILES.items()}
    assert len(system.mounts()) == 2
    whole = [r for r in system.registry.requests(mark) if r.kind == "blob" and not r.is_range]
    assert [r for r in whole if any(digest in r.path for digest in of_gone | of_kept)] == []
    system.containerd.ctr("images", "rm", "--sync", gone)
    assert artifacts(system) == of_kept | {sha256(b"{}")}
    assert len(system.mounts()) == 1
    assert read_all(system, kept) == {path: sha256(data)[7:] for path, data in FILES.items()}
    system.containerd.ctr("images", "rm", "--sync", kept)
    assert artifacts(system) == set()
    assert system.mounts() == []


def test_the_store_below_the_root(module_workdir: Path) -> None:
    with lazy_system(module_workdir / "own") as system:
        where = ("--content-store", "soci", "--root", str(system.daemon.root))
        reference = indexed_here(system, module_workdir / "own", "own", *where)
        assert artifacts(system) == set()
        system.pull(reference)
        assert len(system.mounts()) == 1
        assert read_all(system, reference) == {path: sha256(data)[7:] for path, data in FILES.items()}
        system.containerd.ctr("images", "rm", "--sync", reference)
