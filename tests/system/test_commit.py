"""Committing a container: containerd compares its tree, attributes too, with that of its lazy image."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path

import pytest

from tests.support.images import ImageBuilder
from tests.support.lazysystem import LazySystem, lazy_system

SNAPSHOTS = ("snapshots", "--snapshotter", "soci")
PLAIN_TAR = ("--media-type", "application/vnd.oci.image.layer.v1.tar")


def changed_container(system: LazySystem, workdir: Path) -> str:
    """Make the snapshot of a container that has written a file beside those of its image; return its key."""
    image = ImageBuilder(workdir / "image").layer({"d/old": b"old" * 10_000, "e/f": b"f"}).build()
    reference = system.publish(image, "test/commit", "--min-layer-size", "0")
    system.pull(reference)
    parent = system.containerd.ctr(*SNAPSHOTS, "ls").splitlines()[1].split()[0]
    mounts = system.containerd.ctr(
        *SNAPSHOTS, "prepare", "--target", str(workdir / "target"), "container", parent
    )
    upper = re.search(r"upperdir=([^,\s\"]+)", mounts)
    assert upper is not None, mounts
    directory = Path(upper[1]) / "d"
    directory.mkdir()
    (directory / "new").write_text("new")
    return "container"


@pytest.mark.parametrize("unsupported", [False, True])
def test_a_commit_takes_what_the_container_wrote(workdir: Path, unsupported: bool) -> None:
    config = {"fuse": {"getxattr_unsupported": unsupported}}
    with lazy_system(workdir, config) as system:
        key = changed_container(system, workdir)
        told = system.containerd.ctr(*SNAPSHOTS, "diff", *PLAIN_TAR, key, check=not unsupported)
        if unsupported:  # as docs/clients.md says
            assert "operation not supported" in told
            return
        with tarfile.open(fileobj=io.BytesIO(told.encode())) as layer:
            assert layer.getnames() == ["d", "d/new"]
