"""A daemon that is asked directly, as containerd asks it, so that one Prepare can be timed alone.

Images are made for it (`publish`), indexed by our own command line, and lie in the site's registry.

Concurrency: one thread.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import grpc

from bench.site import Site
from snapshotter.errors import AlreadyExists
from tests.support.images import ImageBuilder, LayerBlob
from tests.support.process import Daemon, wait_until
from tests.support.snapshots_client import RemoteSnapshotter

_PATIENCE_S = 300.0
"""How long a Prepare may take; containerd has no limit."""


class Published(NamedTuple):
    """An image in the registry, with its index."""

    reference: str
    manifest: str
    layers: tuple[LayerBlob, ...]


def publish(site: Site, name: str, *layers: LayerBlob) -> Published:
    """Push an image of `layers` and the zTOCs of all of them. Raises AssertionError."""
    image = ImageBuilder(site.directory / f"{name}-oci").add(*layers).build()
    reference = site.registry.push(image, name)
    site.command(
        *(sys.executable, "-m", "snapshotter.cli.main", "--root", str(site.directory / f"{name}-soci")),
        *("create", "--registry", "--min-layer-size", "0", *site.scheme, reference),
    )
    return Published(reference, image.digest, image.layers)


class Direct:
    """One daemon, and what was prepared in it."""

    def __init__(self, site: Site, name: str, config: Mapping[str, object] | None = None) -> None:
        self.daemon: Daemon = site.daemon(name, config)
        self._channel = grpc.insecure_channel(f"unix:{self.daemon.address}")
        self._snapshotter = RemoteSnapshotter(self._channel, timeout=_PATIENCE_S)
        self._numbers = itertools.count(1)

    def prepare(self, image: Published, layer: int = 0) -> tuple[str, float]:
        """Prepare a layer as if it were the lowest; return its name and the seconds. Raises AssertionError."""
        number = next(self._numbers)
        name = f"sha256:{number:064x}"
        labels = {
            "containerd.io/snapshot.ref": name,
            "containerd.io/snapshot/cri.image-ref": image.reference,
            "containerd.io/snapshot/cri.manifest-digest": image.manifest,
            "containerd.io/snapshot/cri.layer-digest": image.layers[layer].digest,
        }
        started = time.perf_counter()
        try:
            self._snapshotter.prepare(f"extract-{number}", labels=labels)
        except AlreadyExists:
            return name, time.perf_counter() - started
        raise AssertionError(
            f"layer {layer} of {image.reference} is not lazy: {self.daemon.log_text()[-2000:]}"
        )

    def remove(self, *names: str) -> None:
        """Remove snapshots, and what no other one uses of their layers."""
        for name in names:
            self._snapshotter.remove(name)
        self._snapshotter.cleanup()

    def phase_seconds(self, *phases: str) -> float:
        """Return how long these steps took so far, all together."""
        samples = self.daemon.metrics()
        return sum(samples.get(f'soci_phase_seconds_sum{{phase="{phase}"}}', 0.0) for phase in phases)

    def wait_removed(self) -> None:
        """Return when no layer has files any more."""
        layers = self.daemon.root / "layers/sha256"
        wait_until(lambda: not any(layers.iterdir()), timeout=60, what="the layers' files are removed")

    def targets(self) -> list[Path]:
        """Return where the lazy layers are mounted, the latest last."""
        mounts = self.daemon.status()["mounts"]
        return sorted((Path(mount["target"]) for mount in mounts), key=lambda path: int(path.parent.name))

    def close(self) -> None:
        """End the daemon and its mounts."""
        self._channel.close()
        self.daemon.cleanup()
