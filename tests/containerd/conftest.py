"""A real containerd for the tests of this folder; each test has a namespace of its own."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotter.containerd.client import Containerd
from tests.support.containerd import Containerd as Server


@pytest.fixture(scope="session")
def server(session_workdir: Path) -> Iterator[Server]:
    server = Server(session_workdir / "client")
    try:
        yield server.start()
    finally:
        server.cleanup()


@pytest.fixture
def unleased(server: Server) -> Iterator[Containerd]:
    """A client in a new namespace; what it writes is garbage unless something refers to it."""
    with Containerd.connect(str(server.address), f"test-{uuid.uuid4().hex[:8]}") as client:
        yield client


@pytest.fixture
def containerd(unleased: Containerd) -> Iterator[Containerd]:
    """A client in a new namespace, its writes protected for the time of the test."""
    with unleased.lease() as leased:
        yield leased
