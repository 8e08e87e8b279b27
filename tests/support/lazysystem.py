"""The whole system for a test: a real registry, a real containerd, and the daemon as its proxy plugin."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.containerd import Containerd
from tests.support.dockerregistry import DockerRegistry
from tests.support.images import Image
from tests.support.process import Daemon

NAMESPACE_FLAGS = ("--namespace", "default")


@dataclass
class LazySystem:
    """What a test has in hand."""

    registry: DockerRegistry
    containerd: Containerd
    daemon: Daemon

    def soci(self, *arguments: str, timeout: float = 120) -> str:
        """Run our `soci` against this containerd; return what it prints."""
        result = subprocess.run(
            [
                sys.executable, "-m", "snapshotter.cli.main",
                "--address", str(self.containerd.address), *NAMESPACE_FLAGS,
                "--root", str(self.containerd.directory / "soci"), *arguments,
            ],
            capture_output=True, text=True, timeout=timeout, check=False,
            env={**os.environ, "DOCKER_CONFIG": str(self.containerd.directory)},
        )  # fmt: skip
        assert result.returncode == 0, f"soci {' '.join(arguments)}: {result.stdout}{result.stderr}"
        return result.stdout

    def publish(self, image: Image, repository: str, *create: str) -> str:
        """Push an image, index it, push the index; return its reference. containerd forgets it afterwards."""
        reference = self.registry.push(image, repository)
        self.soci("image", "rpull", "--snapshotter", "overlayfs", reference)
        self.soci("create", *create, reference)
        self.soci("push", reference)
        self.containerd.ctr("images", "rm", "--sync", reference)
        return reference

    def pull(self, reference: str) -> None:
        """Pull lazily."""
        self.soci("image", "rpull", "--snapshotter", "soci", reference)

    def mounts(self) -> list[dict[str, Any]]:
        """Return the lazy mounts, as `status --json` tells them."""
        found: list[dict[str, Any]] = self.daemon.status()["mounts"]
        return found

    def records(self, message: str) -> list[dict[str, Any]]:
        """Return the daemon's log records with this message."""
        return [record for record in self.daemon.records() if record.get("msg") == message]


@contextmanager
def lazy_system(workdir: Path, config: Mapping[str, Any] | None = None) -> Iterator[LazySystem]:
    """Start registry, daemon and containerd below `workdir`; take everything down again."""
    with ExitStack() as stack:
        registry = DockerRegistry(workdir / "registry")
        stack.callback(registry.cleanup)
        registry.start()
        daemon = Daemon(workdir / "soci", config or {})
        stack.callback(daemon.cleanup)
        daemon.start()
        containerd = Containerd(workdir / "c", snapshotters={"soci": daemon.address})
        stack.callback(containerd.cleanup)
        containerd.start()
        yield LazySystem(registry, containerd, daemon)
