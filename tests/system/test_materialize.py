"""`soci image materialize`: what is left out of containerd by a lazy pull is there afterwards, and nothing else changes."""

from __future__ import annotations

import json
import random
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.images import Image, ImageBuilder, sha256
from tests.support.lazysystem import LazySystem

BASE = {f"base/f{number}": random.Random(number).randbytes(300_000) for number in range(4)}
TOP = {f"top/f{number}": random.Random(100 + number).randbytes(200_000) for number in range(3)}
CREATE = ("--min-layer-size", "0", "--span-size", "262144")


def published(system: LazySystem, place: Path, name: str) -> tuple[Image, str]:
    image = ImageBuilder(place / name).layer({**BASE, "name": name.encode()}).layer(TOP).build()
    reference = system.publish(image, name, *CREATE)
    system.pull(reference)
    assert len(system.mounts()) == 2
    return image, reference


def exported(system: LazySystem, reference: str, path: Path) -> dict[str, str]:
    """Return the blobs of `ctr images export`: what each is called, and the digest of what it holds."""
    system.containerd.ctr("images", "export", path, reference)
    with tarfile.open(path) as archive:
        files = {member.name: archive.extractfile(member) for member in archive if member.isfile()}
        return {
            name.removeprefix("blobs/sha256/"): sha256(file.read()).removeprefix("sha256:")
            for name, file in files.items()
            if file is not None and name.startswith("blobs/")
        }


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_export_and_push_after_a_lazy_pull(system: LazySystem, module_workdir: Path) -> None:
    image, reference = published(system, module_workdir, "whole")
    complete = "layer is complete"
    until(lambda: len({r["layer"] for r in system.records(complete)} & {e.digest for e in image.layers}) == 2)
    mark = system.registry.mark()
    root = str(system.daemon.root)
    told = json.loads(system.soci("--root", root, "image", "materialize", "--json", reference))
    assert [layer["from"] for layer in told["layers"]] == ["cache", "cache"]
    assert [layer["digest"] for layer in told["layers"]] == [layer.digest for layer in image.layers]
    assert [r for r in system.registry.requests(mark) if r.kind == "blob"] == []
    blobs = exported(system, reference, module_workdir / "whole.tar")
    assert blobs.items() >= {(digest, digest) for digest in blobs}
    assert blobs.keys() >= {layer.digest.removeprefix("sha256:") for layer in image.layers}
    again = system.registry.name + "/pushed:1"
    system.containerd.ctr("images", "tag", reference, again)
    system.containerd.ctr("images", "push", "--plain-http", again)
    assert len(system.mounts()) == 2
    system.containerd.ctr("images", "rm", "--sync", again, reference)
    assert system.containerd.ctr("content", "ls", "--quiet") == ""


def test_what_is_not_here_comes_from_the_registry(system: LazySystem, module_workdir: Path) -> None:
    image, reference = published(system, module_workdir, "remote")
    text = system.soci("image", "materialize", reference)
    assert text.count("from the registry") == 2, text
    text = system.soci("image", "materialize", reference)
    assert text.count("in containerd before") == 2, text
    blobs = exported(system, reference, module_workdir / "remote.tar")
    assert blobs.keys() >= {layer.digest.removeprefix("sha256:") for layer in image.layers}
    system.containerd.ctr("images", "rm", "--sync", reference)
