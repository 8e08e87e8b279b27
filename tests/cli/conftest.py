"""A real containerd, a namespace of its own for each test, and `soci` run in this process against both."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty

from snapshotter.api import snapshots_pb2, snapshots_pb2_grpc
from snapshotter.cli.main import main
from snapshotter.containerd.client import Containerd
from snapshotter.snapshot.directories import metadata_path
from snapshotter.snapshot.snapshotter import Snapshotter
from snapshotter.snapshot.store import SnapshotStore
from tests.support import host
from tests.support.containerd import Containerd as Server
from tests.support.dockerregistry import DockerRegistry
from tests.support.layer_providers import DirectoryLayers
from tests.support.snapshots_client import served


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


class Liar(snapshots_pb2_grpc.SnapshotsServicer):
    """A snapshotter that says that every layer exists, and shows none."""

    def __init__(self) -> None:
        self.prepared = 0

    def Prepare(  # noqa: N802
        self, request: snapshots_pb2.PrepareSnapshotRequest, context: grpc.ServicerContext
    ) -> snapshots_pb2.PrepareSnapshotResponse:
        self.prepared += 1
        context.abort(grpc.StatusCode.ALREADY_EXISTS, "I have it")

    def List(  # noqa: N802
        self, request: snapshots_pb2.ListSnapshotsRequest, context: grpc.ServicerContext
    ) -> Iterator[snapshots_pb2.ListSnapshotsResponse]:
        return iter(())

    def Cleanup(self, request: snapshots_pb2.CleanupRequest, context: grpc.ServicerContext) -> Empty:  # noqa: N802
        return Empty()


@pytest.fixture(scope="session")
def layers(session_workdir: Path) -> Iterator[DirectoryLayers]:
    """What the plugin `soci` of the shared containerd makes itself: nothing, until a test puts something there."""
    provider = DirectoryLayers({})
    root = session_workdir / "snapshotter"
    snapshotter = Snapshotter(root, SnapshotStore(metadata_path(root)), provider)
    with served(snapshotter, session_workdir / "soci.sock"):
        yield provider
    snapshotter.close()
    host.detach_below(root)


@pytest.fixture(scope="session")
def liar(session_workdir: Path) -> Iterator[Liar]:
    """The plugin `liar` of the shared containerd."""
    service = Liar()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    snapshots_pb2_grpc.add_SnapshotsServicer_to_server(service, server)
    server.add_insecure_port(f"unix:{session_workdir}/liar.sock")
    server.start()
    yield service
    server.stop(grace=None).wait()


@pytest.fixture(scope="session")
def running_server(session_workdir: Path, layers: DirectoryLayers, liar: Liar) -> Iterator[Server]:
    # The plugins are there before it starts and after it ends: a socket that once failed is left alone for a while.
    plugins = {name: session_workdir / f"{name}.sock" for name in ("soci", "liar")}
    server = Server(session_workdir / "c", snapshotters=plugins)
    try:
        yield server.start()
    finally:
        server.cleanup()


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
