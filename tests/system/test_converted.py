"""Images that carry their index with them: converted in the registry, copied by another tool, pulled lazily."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
from pathlib import Path

from tests.support.images import ImageBuilder
from tests.support.lazysystem import LazySystem

_RANDOM = random.Random(12)
FILES = {f"d/f{number}": _RANDOM.randbytes(300_000) for number in range(10)}


def test_a_converted_image_is_lazy_and_so_is_its_copy(system: LazySystem, module_workdir: Path) -> None:
    image = ImageBuilder(module_workdir / "image").layer(FILES, level=1).build()
    source = system.registry.push(image, "test/source")
    target, copy = f"{system.registry.name}/test/converted:soci", f"{system.registry.name}/test/copied:soci"
    options = ("--min-layer-size", "0", "--span-size", "262144", "--prefetch-file", "d/f1")
    system.soci("convert", "--registry", *options, source, target)
    insecure = ("--src-tls-verify=false", "--dest-tls-verify=false")
    subprocess.run(
        [
            "skopeo",
            "--insecure-policy",
            "copy",
            "--quiet",
            "--all",
            *insecure,
            f"docker://{target}",
            f"docker://{copy}",
        ],
        check=True,
        timeout=60,
    )
    for reference in (target, copy):
        system.pull(reference)
        assert [mount["layer"] for mount in system.mounts()] == [image.layers[0].digest]
        entries = [json.loads(line) for line in system.containerd.dump_tree(reference, snapshotter="soci")]
        found = {one["path"]: one["sha256"] for one in entries if one["path"].startswith("d/f")}
        assert found == {path: hashlib.sha256(data).hexdigest() for path, data in FILES.items()}
        system.containerd.ctr("images", "rm", "--sync", reference)
    system.pull(source)
    assert system.mounts() == []
    system.containerd.ctr("images", "rm", "--sync", source)
