"""How long the daemon is away: killed or stopped with many lazy mounts, and started again, until gRPC answers.

Nothing of it is a large image: 50 layers of one small file each, as small as containerd will ever see them, on a
registry in this process that counts what it is asked. The daemon starts as its unit starts it, without the 100 ms that
the unit waits; the clock runs from the start of the program to the first answer of a call that looks at all snapshots.

Concurrency: one thread, beside the registry's.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc

from bench.figures import Figure
from bench.goals import goal
from snapshotter.errors import AlreadyExists
from tests.support.images import tar
from tests.support.indexed import publish
from tests.support.process import Daemon, Service, accepts_connections, wait_until
from tests.support.registry import Registry
from tests.support.snapshots_client import RemoteSnapshotter

MOUNTS = 50
LAYERS = 5
"""Of one image."""
ROUNDS = 5
_PAUSE_S = 0.002


def figures(directory: Path) -> Iterator[Figure]:
    """Yield the figures of restarts. Raises AssertionError."""
    # As installed: modules are compiled once, whatever this program's environment says.
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(directory / "compiled")}
    daemon = Daemon(directory / "d", env=compiled)
    with Registry() as registry:
        try:
            daemon.start()
            pull(daemon, registry, MOUNTS)
            targets = [mount["target"] for mount in daemon.status()["mounts"]]
            assert len(targets) == MOUNTS, f"{len(targets)} lazy mounts instead of {MOUNTS}"
            _read(targets)
            registry.clear_requests()
            killed = [_restart(daemon, daemon.kill) for _ in range(ROUNDS)]
            stopped = [_restart(daemon, daemon.stop) for _ in range(ROUNDS)]
            _read(targets)
            requests = len(registry.requests)
        finally:
            daemon.cleanup()
    detail = {
        "killed_s": [round(seconds, 3) for seconds in killed],
        "stopped_s": [round(seconds, 3) for seconds in stopped],
    }
    yield goal("daemon restart with 50 mounts, until gRPC answers").figure(
        statistics.median(killed + stopped) * 1000, **detail
    )
    yield goal("network requests of ten restarts with 50 mounts").figure(requests)


def pull(daemon: Daemon, registry: Registry, mounts: int) -> None:
    """Have so many layers of small images mounted, as containerd does; `mounts` is a multiple of LAYERS."""
    with grpc.insecure_channel(f"unix:{daemon.address}") as channel:
        client = RemoteSnapshotter(channel)
        for number in range(mounts // LAYERS):
            tars = [tar({f"f{number}-{layer}": b"x" * 1000}) for layer in range(LAYERS)]
            image = publish(registry, tars, repository=f"image{number}")
            parent = ""
            for layer in range(LAYERS):
                chain = f"sha256:{number}-{layer}"
                labels = image.labels(layer) | {"containerd.io/snapshot.ref": chain}
                try:
                    client.prepare(f"extract-{chain}", parent, labels)
                except AlreadyExists:
                    parent = chain
                else:
                    raise AssertionError(f"layer {layer} of image {number} is not lazy")


def _read(targets: list[str]) -> None:
    """Read every file, by other programs; each layer's server is awake then."""
    for target in targets:
        subprocess.run(["sh", "-c", f"cat {target}/*"], stdout=subprocess.DEVNULL, timeout=60, check=True)


def _restart(daemon: Daemon, end: Callable[[], object]) -> float:
    """End the daemon and start it again; return the seconds from its start until a call was answered."""
    end()
    started = time.monotonic()
    Service.start(daemon)
    while not accepts_connections(daemon.address):
        assert daemon.alive, daemon.log_text()
        time.sleep(_PAUSE_S)
    with grpc.insecure_channel(f"unix:{daemon.address}") as channel:
        found = len(list(RemoteSnapshotter(channel).walk()))
    seconds = time.monotonic() - started
    assert found >= MOUNTS, f"{found} snapshots"
    wait_until(lambda: len(daemon.status()["mounts"]) == MOUNTS, timeout=30, what="every mount is back")
    return seconds
