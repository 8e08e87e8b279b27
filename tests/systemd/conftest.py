"""One machine for all tests here: the package installed, containerd, and a container that reads all the while.

The tests of one module share it and run in their order; what one of them does to the services is over at its end.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deb.build import NAME, ROOT, build
from tests.support.dockerregistry import DockerRegistry
from tests.support.images import Entry, ImageBuilder, directory, symlink
from tests.support.machine import Machine
from tests.support.process import wait_until

_RANDOM = random.Random(29)
FILES = {f"d/f{number:03}": _RANDOM.randbytes(_RANDOM.randrange(1_000, 200_000)) for number in range(100)}

# Runs in the container, on the interpreter of the machine: reads whole files in random order, past the page cache.
READER = """
import hashlib, json, os, random, sys, time
truth = json.load(open("/out/truth.json"))
names, chosen = sorted(truth), random.Random(5)
told = {"reads": 0, "wrong": [], "errors": [], "worst": 0.0}
while True:
    name, begin = chosen.choice(names), time.monotonic()
    try:
        with open("/" + name, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            data = file.readall()
        if hashlib.sha256(data).hexdigest() != truth[name]:
            told["wrong"].append(name)
    except OSError as error:
        told["errors"].append(f"{name}: {error}")
    told["worst"] = max(told["worst"], time.monotonic() - begin)
    told["reads"] += 1
    with open("/out/new", "w") as file:
        json.dump(told, file)
    os.rename("/out/new", "/out/told.json")
"""

_CONTAINER = "reader"


@dataclass
class Host:
    """The machine with everything on it."""

    machine: Machine
    registry: DockerRegistry
    reference: str

    def told(self) -> dict[str, Any]:
        """Return what the container has read so far."""
        path = self.machine.path("/var/out/told.json")
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"reads": 0}
        return found

    def reads_on(self) -> None:
        """Wait until the container has read some more. Raises AssertionError when a read failed or hangs."""
        before = self.told()["reads"]
        wait_until(lambda: self.told()["reads"] > before + 20, timeout=60, what="the container reads on")
        told = self.told()
        assert not told["errors"] + told["wrong"], told

    def status(self) -> dict[str, Any]:
        """Return what `status --json` says on the machine."""
        found: dict[str, Any] = json.loads(self.machine.run("soci-snapshotter-grpc", "status", "--json"))
        return found

    def mounts(self) -> list[str]:
        """Return the lazy mounts of snapshots, with the numbers of their devices.

        The start-up test of a daemon that has just become ready has one more, for a moment.
        """
        fields = [line.split() for line in self.machine.run("cat", "/proc/self/mountinfo").splitlines()]
        return [f"{each[2]} {each[4]}" for each in fields if "fuse.soci" in each and "/snapshots/" in each[4]]

    def run_reader(self) -> None:
        """Start the container."""
        output = self.machine.path("/var/out")
        output.mkdir(exist_ok=True)
        truth = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}
        (output / "truth.json").write_text(json.dumps(truth))
        self.machine.run(
            "ctr", "run", "--detach", "--null-io", "--snapshotter", "soci",
            "--mount", "type=bind,src=/usr,dst=/usr,options=rbind:ro",
            "--mount", "type=bind,src=/var/out,dst=/out,options=rbind:rw",
            self.reference, _CONTAINER, "/usr/bin/python3.11", "-c", READER,
        )  # fmt: skip

    def end_reader(self) -> None:
        """Remove the container, if it is still there; the image stays."""
        self.machine.run("ctr", "tasks", "rm", "--force", _CONTAINER, check=False)
        self.machine.run("ctr", "containers", "rm", _CONTAINER, check=False)


@pytest.fixture(scope="module")
def package(module_workdir: Path) -> Path:
    return build(module_workdir / "package", compress=False)


@pytest.fixture(scope="module")
def newer_package(module_workdir: Path) -> Path:
    """The same program as another version, which says so."""
    source = module_workdir / "newer"
    source.mkdir()
    for name in ("snapshotter", "systemd", "deb", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "config.toml.example", "CHANGELOG.md"):
        shutil.copy(ROOT / name, source / name)
    version = source / "snapshotter/__init__.py"
    version.write_text(version.read_text() + '\n__version__ = "99.0"\n')
    return build(module_workdir / "newer-package", source=source, version="99.0", compress=False)


@pytest.fixture(scope="module")
def host(module_workdir: Path, package: Path, fuse: None) -> Iterator[Host]:
    with ExitStack() as stack:
        registry = DockerRegistry(module_workdir / "registry")
        stack.callback(registry.cleanup)
        registry.start()
        machine = Machine(module_workdir / "machine")
        stack.callback(machine.cleanup)
        machine.start()
        install(machine, package)
        machine.add_containerd()
        host = Host(machine, registry, publish(registry, module_workdir))
        machine.run("soci", "image", "rpull", host.reference)
        host.run_reader()
        yield host


def install(machine: Machine, package: Path) -> str:
    """Install a package as an operator does; return what dpkg says."""
    target = machine.path(f"/root/{NAME}.deb")
    shutil.copy(package, target)
    return machine.run("dpkg", "--install", f"/root/{NAME}.deb")


def publish(registry: DockerRegistry, workdir: Path) -> str:
    """Push an image with its SOCI index; its root takes the machine's /usr."""
    links = {name: symlink(f"usr/{name}") for name in ("bin", "lib", "lib64", "sbin")}
    places = {name: directory() for name in ("usr", "out", "proc", "sys", "dev", "d")}
    data = {name: Entry(data) for name, data in FILES.items()}
    image = ImageBuilder(workdir / "image").layer({**places, **links, **data}, level=1).build()
    reference = registry.push(image, "test/systemd")
    subprocess.run(
        [
            sys.executable, "-m", "snapshotter.cli.main", "create", "--registry",
            "--min-layer-size", "0", "--span-size", "131072", reference,
        ],
        check=True, capture_output=True, timeout=120, env={**os.environ, "DOCKER_CONFIG": str(workdir)},
    )  # fmt: skip
    return reference


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show with a failure what the machine's journal says of the time before it."""
    report = yield
    host = getattr(item, "funcargs", {}).get("host")
    if report.failed and isinstance(host, Host):
        text = host.machine.run("journalctl", "--no-pager", "--lines=60", check=False)
        report.sections.append(("journal of the machine", text))
    return report
