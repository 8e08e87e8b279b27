"""A real containerd, a namespace of its own for each test, and `soci` run in this process against both."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from snapshotter.cli.main import main
from snapshotter.containerd.client import Containerd
from snapshotter.errors import Unavailable
from tests.support.containerd import Containerd as Server
from tests.support.dockerregistry import DockerRegistry


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code and both outputs."""

    code: int
    out: str
    err: str


@dataclass
class Soci:
    """The program, with its global options set."""

    options: list[str]
    root: Path
    capture: pytest.CaptureFixture[str]

    def __call__(self, *arguments: str | Path, code: int = 0) -> Outcome:
        """Run a command, expect an exit code, and return what it left."""
        self.capture.readouterr()
        found = main([*self.options, *map(str, arguments)])
        outcome = Outcome(found, *self.capture.readouterr())
        assert outcome.code == code, outcome
        return outcome

    def fails(self, *arguments: str | Path) -> str:
        """Run a command that must end with one line of error, and return the line without the program's name."""
        outcome = self(*arguments, code=1)
        lines = outcome.err.splitlines()
        assert len(lines) == 1, outcome
        assert lines[0].startswith("soci: "), outcome
        return lines[0].removeprefix("soci: ")


@pytest.fixture(scope="session")
def running_server(session_workdir: Path) -> Iterator[Server]:
    # Nobody listens on the plugins' sockets, except where a test serves a snapshotter there.
    plugins = {name: session_workdir / f"{name}.sock" for name in ("soci", "liar")}
    server = Server(session_workdir / "c", snapshotters=plugins)
    try:
        yield server.start()
    finally:
        server.cleanup()


def wait_for_plugin(server: Server, name: str) -> None:
    """Return when containerd reaches a snapshotter: after failures it tries again only every few seconds."""
    end = time.monotonic() + 15
    with Containerd.connect(str(server.address), "default") as client:
        while True:
            try:
                client.snapshots(name).list()
            except Unavailable:
                assert time.monotonic() < end, f"containerd does not reach snapshotter {name}"
                time.sleep(0.1)
            else:
                return


@pytest.fixture
def server(running_server: Server) -> Iterator[Server]:
    """The shared containerd; its `ctr` works in this test's namespace."""
    running_server.namespace = f"test-{uuid.uuid4().hex[:8]}"
    try:
        yield running_server
    finally:
        for container in running_server.ctr("containers", "ls", "--quiet").split():
            running_server.remove(container)


@pytest.fixture
def containerd(server: Server) -> Iterator[Containerd]:
    with Containerd.connect(str(server.address), server.namespace) as client:
        yield client


@pytest.fixture
def soci(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Soci:
    root = tmp_path / "root"
    options = ["--address", str(server.address), "--namespace", server.namespace, "--root", str(root)]
    return Soci(options, root, capsys)


@pytest.fixture(scope="session")
def docker_registry(session_workdir: Path) -> Iterator[DockerRegistry]:
    """The real one: no referrers API."""
    registry = DockerRegistry(session_workdir / "registry")
    try:
        yield registry.start()
    finally:
        registry.cleanup()
