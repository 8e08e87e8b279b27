"""What a container sees of a lazy image is what it sees of the same image unpacked by containerd."""

from __future__ import annotations

import json
import time
from pathlib import Path

from tests.support.images import ImageBuilder, directory, symlink, tar_layer
from tests.support.lazysystem import LazySystem
from tests.support.nasty import nasty_layers


def both_ways(system: LazySystem, reference: str) -> tuple[list[str], list[str]]:
    """Pull an image lazily and by overlayfs, and return both dumps.

    A directory that no layer names gets the time of its unpacking from containerd; there is no such time for a
    lazy one, so that those times are left out on both sides.
    """
    since = time.time_ns() - 1_000_000_000
    system.pull(reference)
    lazy = [json.loads(line) for line in system.containerd.dump_tree(reference, snapshotter="soci")]
    system.soci("image", "rpull", "--snapshotter", "overlayfs", reference)
    full = [json.loads(line) for line in system.containerd.dump_tree(reference, snapshotter="overlayfs")]
    unpacked = {e["path"] for e in full if e["type"] == "directory" and e["mtime_ns"] >= since}
    for entry in (*lazy, *full):
        if entry["path"] in unpacked:
            del entry["mtime_ns"]
    return [json.dumps(entry) for entry in lazy], [json.dumps(entry) for entry in full]


def remove(system: LazySystem, reference: str) -> None:
    system.containerd.ctr("images", "rm", "--sync", reference)
    assert system.mounts() == []


def test_the_nasty_image(system: LazySystem, module_workdir: Path) -> None:
    blobs = [tar_layer(data) for data in nasty_layers(full=True)]
    image = ImageBuilder(module_workdir / "nasty").add(*blobs).build()
    reference = system.publish(image, "test/nasty", "--min-layer-size", "0")
    lazy, full = both_ways(system, reference)
    assert len(system.mounts()) == len(blobs), "not every layer is lazy"
    assert len(full) > 100
    assert lazy == full
    remove(system, reference)


def test_an_image_without_xattrs(system: LazySystem, module_workdir: Path) -> None:
    builder = ImageBuilder(module_workdir / "plain")
    builder.layer({"etc/a": b"A" * 5000, "etc/link": symlink("a"), "usr/bin/tool": b"#!\n"})
    builder.layer({"etc/b": b"B", "etc/.wh.a": b"", "var/lib/x/y": b"deep"})
    reference = system.publish(builder.build(), "test/plain", "--min-layer-size", "0")
    lazy, full = both_ways(system, reference)
    assert len(system.mounts()) == 2
    assert lazy == full
    assert not any('"xattrs": {"' in line for line in full)
    remove(system, reference)


def test_an_image_with_a_volume(system: LazySystem, module_workdir: Path) -> None:
    """A runtime copies a volume's directory out of the image, and asks for the names of its attributes."""
    builder = ImageBuilder(module_workdir / "volume").layer({"data/inside": b"from the image", "top": b"t"})
    image = builder.config(Volumes={"/data": {}}).build()
    reference = system.publish(image, "test/volume", "--min-layer-size", "0")
    lazy, full = both_ways(system, reference)
    assert lazy == full
    assert any(json.loads(line)["path"] == "data/inside" for line in full)
    remove(system, reference)


def test_directories_that_an_upper_layer_only_implies(system: LazySystem, module_workdir: Path) -> None:
    """The nearest layer below that has them decides their mode and owner, lazy or unpacked."""
    builder = ImageBuilder(module_workdir / "implied")
    builder.layer({"tmp": directory(0o1777), "srv": directory(0o750, uid=7, gid=8), "keep": b"1"})
    builder.layer({"tmp/a/b": b"2", "srv/in/deep": b"3"})
    builder.layer({"tmp/a/c": b"4"})
    reference = system.publish(builder.build(), "test/implied", "--min-layer-size", "0")
    lazy, full = both_ways(system, reference)
    assert lazy == full
    modes = {json.loads(line)["path"]: json.loads(line).get("mode") for line in lazy}
    assert modes["tmp"] == "0o1777"
    assert modes["srv"] == "0o750"
    remove(system, reference)


def test_a_layer_that_is_not_indexed_fits_in(system: LazySystem, module_workdir: Path) -> None:
    """The small middle layer is unpacked; the layers around it stay lazy."""
    big = {f"big/{number}": bytes([number]) * 400_000 for number in range(4)}
    builder = ImageBuilder(module_workdir / "sparse")
    builder.layer(big, level=0)
    builder.layer({"small/x": b"x", "big/.wh.1": b"", "big/2": b"replaced"})
    builder.layer({"top/" + name: data for name, data in big.items()}, level=0)
    reference = system.publish(builder.build(), "test/sparse", "--min-layer-size", "1000000")
    lazy, full = both_ways(system, reference)
    assert len(system.mounts()) == 2
    assert lazy == full
    remove(system, reference)
