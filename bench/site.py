"""Where demo and benchmarks take place: a registry, perhaps a link to it, and containerds and daemons beside it.

A site is made for one way to the registry:

    loopback, plain HTTP     the machine's own loopback address; what `make demo` shows first
    loopback, TLS            a network namespace with one host in it, whose address is not a loopback one: some
                             clients speak no TLS to those
    a link, TLS              two hosts in namespaces, and a link of some delay and rate between them

Whatever is started through a site is ended by `close`, interrupts included. Nothing uses a containerd that is already
on the machine, nor anybody's credentials.

Concurrency: one thread drives a site.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.support import host
from tests.support.containerd import Containerd
from tests.support.dockerregistry import DockerRegistry
from tests.support.netem import Link
from tests.support.netns import LoneHost, Network
from tests.support.process import Daemon

SNAPSHOTTER = "soci"
"""The name under which a containerd knows a lazy snapshotter."""

_READ = 1 << 20


class Site:
    """One registry and what talks to it; `storage` is where the registry keeps its blobs, if they are to stay."""

    def __init__(
        self, directory: Path, *, link: Link | None = None, tls: bool = False, storage: Path | None = None
    ) -> None:
        self.directory = directory
        self.undo = contextlib.ExitStack()
        self.prefix: tuple[str, ...] = ()
        """The command that enters the network of the client's side."""
        self.registry = self._make_registry(link, tls)
        if storage is not None:
            storage.mkdir(parents=True, exist_ok=True)
            self.registry.directory.mkdir(parents=True, exist_ok=True)
            self.registry.storage.symlink_to(storage.resolve())
        self.env = {"DOCKER_CONFIG": str(directory)}
        if self.registry.tls:
            self.env["SSL_CERT_FILE"] = str(self.registry.ca)
        self.undo.callback(self.registry.cleanup)

    def start(self) -> None:
        """Start the registry. Clients get credentials that it does not ask for: some refuse to go without."""
        self.registry.start()
        token = base64.b64encode(b"nobody:nothing").decode()
        config = {"auths": {self.registry.name: {"auth": token}}}
        (self.directory / "config.json").write_text(json.dumps(config))

    def close(self) -> None:
        """End every process and detach every mount of this site."""
        self.undo.close()

    @property
    def scheme(self) -> list[str]:
        """The option by which clients are told how to speak to the registry."""
        return [] if self.registry.tls else ["--plain-http"]

    def containerd(self, name: str, snapshotters: Mapping[str, Path] | None = None) -> Containerd:
        """Start a containerd with nothing in it; its directory is `name`."""
        containerd = Containerd(
            self.directory / name, snapshotters=snapshotters, prefix=self.prefix, env=self.env
        )
        self.undo.callback(containerd.cleanup)
        return containerd.start()

    def daemon(self, name: str, config: Mapping[str, object] | None = None) -> Daemon:
        """Start a daemon of ours with an empty root."""
        daemon = Daemon(self.directory / name, config, env=self.env, prefix=self.prefix)
        self.undo.callback(daemon.cleanup)
        daemon.start()
        return daemon

    def soci(self, containerd: Containerd, *arguments: str) -> str:
        """Run our command line, as a user does, and return what it prints. Raises AssertionError when it fails."""
        options = ["--address", str(containerd.address), "--root", str(self.directory / "soci")]
        return self.command(sys.executable, "-m", "snapshotter.cli.main", *options, *arguments)

    def command(self, *command: str, timeout: float = 600) -> str:
        """Run `command` on the client's side and return what it prints. Raises AssertionError when it fails."""
        env = {**os.environ, **self.env}
        result = subprocess.run(
            [*self.prefix, *command], capture_output=True, text=True, timeout=timeout, env=env, check=False
        )
        if result.returncode != 0:
            raise AssertionError(f"{' '.join(command)}: {result.stdout}{result.stderr}")
        return result.stdout

    def index(self, reference: str) -> None:
        """Make the zTOCs and the SOCI index of an image and put them beside it."""
        containerd = self.containerd("builder")
        containerd.ctr("content", "fetch", *self.scheme, reference)
        self.soci(containerd, "create", reference)
        self.soci(containerd, "push", *self.scheme, reference)
        containerd.cleanup()

    def make_cold(self) -> None:
        """Drop the page cache, but for what the registry serves: that is another machine's in reality."""
        host.drop_caches()
        for path in (self.registry.storage.resolve() / "docker/registry/v2/blobs").rglob("data"):
            with path.open("rb", buffering=0) as file:
                while file.read(_READ):
                    pass

    def _make_registry(self, link: Link | None, tls: bool) -> DockerRegistry:
        place = self.directory / "registry"
        if link is not None:
            network = self.undo.enter_context(Network(self.directory, link))
            self.prefix = network.client.prefix
            return DockerRegistry(place, host=network.server.address, tls=True, prefix=network.server.prefix)
        if tls:
            alone = self.undo.enter_context(LoneHost())
            self.prefix = alone.host.prefix
            return DockerRegistry(place, host=alone.host.address, tls=True, prefix=alone.host.prefix)
        return DockerRegistry(place)
