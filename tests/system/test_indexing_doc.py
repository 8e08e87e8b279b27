"""Every command of docs/indexing.md is run as it is written, but for those of programs that are not here."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.images import Entry, ImageBuilder
from tests.support.lazysystem import LazySystem, lazy_system

DOCUMENT = Path(__file__).parents[2] / "docs/indexing.md"
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
PLACEHOLDER = re.compile(r"\b(REGISTRY|COMMAND|INDEX|ZTOC|PREFETCH|FILE)\b")
ABSENT = ("nerdctl", "finch", "docker")
PROGRAM = Path("/sbin/ldconfig")
"""Static, so that it runs in an image that holds nothing else."""

_WRAPPERS = {
    "soci": 'exec {python} -m snapshotter.cli.main --root {state} "$@"',
    "ctr": 'case "$1 $2" in\n"image push") shift 2; set -- image push --plain-http "$@" ;;\n'
    '"run --rm") shift; set -- run --runc-root {directory}/runc --fifo-dir {directory}/fifo "$@" ;;\nesac\n'
    'exec /usr/bin/env -u PATH PATH={path} ctr "$@"',
    "skopeo": 'shift\nexec /usr/bin/env PATH={path} skopeo --insecure-policy copy --quiet {insecure} "$@"',
}
"""What stands between the document and this machine: a registry without TLS, and state that is not the host's."""


def commands(block: str) -> list[str]:
    """Return the commands of a block, without what is said of them."""
    lines = (line.partition(" #")[0].strip() for line in block.splitlines())
    return [line for line in lines if line]


def is_run(block: str) -> bool:
    return not any(line.startswith(ABSENT) for line in commands(block))


@pytest.fixture
def system(workdir: Path) -> Iterator[LazySystem]:
    with lazy_system(workdir) as running:
        yield running


@pytest.fixture
def shell(system: LazySystem, workdir: Path) -> Callable[[str], str]:
    """Run a line of the document in a directory of its own."""
    place = workdir / "shell"
    place.mkdir()
    values = {
        "python": sys.executable,
        "state": workdir / "state",
        "directory": system.containerd.directory,
        "path": os.environ["PATH"],
        "insecure": "--src-tls-verify=false --dest-tls-verify=false",
    }
    for name, text in _WRAPPERS.items():
        (place / name).write_text("#!/bin/sh\n" + text.format(**values) + "\n")
        (place / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{place}:{os.environ['PATH']}",
        "CONTAINERD_ADDRESS": str(system.containerd.address),
        "DOCKER_CONFIG": str(workdir),
        "PYTHONPATH": str(DOCUMENT.parents[1]),
    }

    def run(line: str) -> str:
        done = subprocess.run(
            ["sh", "-c", line],
            cwd=place, env=environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
        return done.stdout

    return run


def test_the_document_is_followed(system: LazySystem, shell: Callable[[str], str], workdir: Path) -> None:
    files = {
        "ldconfig": Entry(PROGRAM.read_bytes(), mode=0o755),
        "data": random.Random(1).randbytes(11 << 20),
    }
    image = ImageBuilder(workdir / "image").layer(files, level=1).build()
    reference = system.registry.push(image, "app", "1")
    for name in ("runc", "fifo"):
        (system.containerd.directory / name).mkdir(exist_ok=True)

    def known(kind: str) -> str:
        return shell(f"soci {kind} ls").splitlines()[1].split()[0]

    values: dict[str, Callable[[], str]] = {
        "REGISTRY": lambda: system.registry.name,
        "COMMAND": lambda: "/ldconfig --version",
        "FILE": lambda: "data >data",
        "INDEX": lambda: known("index"),
        "ZTOC": lambda: known("ztoc"),
        "PREFETCH": lambda: known("prefetch"),
    }
    blocks = [block for block in BLOCK.findall(DOCUMENT.read_text()) if is_run(block)]
    assert len(blocks) >= 5
    for block in blocks:
        if "PREFETCH" in block:
            shell(f"soci create --prefetch-file data {reference}")
        for line in commands(block):
            shell(PLACEHOLDER.sub(lambda found: values[found[1]](), line))
            if line.startswith("ctr run"):
                assert len(system.mounts()) == 1
    system.containerd.ctr("images", "rm", "--sync", *system.containerd.ctr("images", "ls", "-q").split())


def test_what_is_not_run_is_said() -> None:
    text = DOCUMENT.read_text()
    left_out = [block for block in BLOCK.findall(text) if not is_run(block)]
    programs = {line.split()[0] for block in left_out for line in commands(block)} & set(ABSENT)
    assert programs == set(ABSENT)
    assert "Not run: those of Finch and of Docker." in text
