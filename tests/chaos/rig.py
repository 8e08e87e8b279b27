"""The system that chaos is made in: registry and daemon on two hosts, the holder's unit, and clients of the daemon.

The registry (token server, presigned URLs, TLS) is in this process, but its sockets are in another network
namespace than the daemon, with a link between them. A pull speaks to the daemon as containerd does, and mounts
what it is told to mount; so readers come through overlayfs, as containers do. A daemon that is away is called
again, as containerd does.

Concurrency: `pull` and `remove` may be called by several threads; the rest by one.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import itertools
import json
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from snapshotter import reports
from snapshotter.errors import AlreadyExists, NotFound, SnapshotterError, Unavailable, UsageError
from tests.chaos.manager import HolderUnit
from tests.support import oldkernel
from tests.support.images import Entry, directory, tar
from tests.support.indexed import IndexedImage, publish
from tests.support.netns import Host, Network
from tests.support.process import Daemon
from tests.support.registry import Bearer, Registry
from tests.support.snapshot_mounts import mounted
from tests.support.snapshots_client import RemoteSnapshotter
from tests.support.tls import make_certificate

Result = TypeVar("Result")

RESTART_S = 0.1
"""RestartSec= of the daemon's unit."""

PATIENCE_S = 180.0
"""How long a call to the daemon is repeated while it is away."""
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


class OldKernelDaemon(Daemon):
    """The daemon as it is before Linux 6.9."""

    program = oldkernel.__name__


class NotLazy(Exception):
    """A pull in which a layer was left to containerd. No error: laziness that fails never fails a pull."""


@dataclass
class Pulled:
    """An image that is mounted as a container's root file system."""

    image: IndexedImage
    chains: list[str]
    key: str
    root: Path
    truth: Path
    mounted: ExitStack = field(default_factory=ExitStack)


class Rig:
    """The running system; a context manager. `read_budget` is the daemon's, in seconds.

    With `old_kernel` requests cannot be sent again, as before Linux 6.9.
    """

    def __init__(self, workdir: Path, *, read_budget: float = 30.0, old_kernel: bool = False) -> None:
        self._workdir = workdir
        self._budget = read_budget
        self._old_kernel = old_kernel
        self._undo = ExitStack()
        self._numbers = itertools.count()
        self._login = Bearer()
        self.holder: HolderUnit | None = None
        self.restart_times: list[float] = []
        """Seconds from each start of the daemon until it answered."""

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._undo.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def _start(self) -> None:
        for name in ("tls", "truth", "mnt"):
            (self._workdir / name).mkdir()
        self.network = self._undo.enter_context(Network(self._workdir))
        certificate = make_certificate(self._workdir / "tls", [self.network.server.address])
        self.registry = in_namespace(
            self.network.server,
            lambda: Registry(
                auth=self._login,
                presigned_ttl=600,
                certificate=certificate,
                address=self.network.server.address,
            ),
        )
        self._undo.callback(self.registry.close)
        kind = OldKernelDaemon if self._old_kernel else Daemon
        self.daemon = kind(
            self._workdir / "d",
            {
                "fuse": {"read_budget_sec": self._budget, "idle_timeout_sec": 3.0},
                "http": {"DialTimeoutMsec": 1000, "ResponseHeaderTimeoutMsec": 3000},
            },
            env={
                "SSL_CERT_FILE": str(certificate.ca_file),
                "DOCKER_CONFIG": str(self._credentials()),
                "NOTIFY_SOCKET": str(self._workdir / "notify"),
            },
            prefix=self.network.client.prefix,
        )
        self._undo.callback(self.daemon.cleanup)
        self.daemon.root.mkdir(mode=0o700)
        self.holder = self._undo.enter_context(
            HolderUnit(self.daemon.root / "holder.sock", self._workdir / "notify", tag=self.daemon.tag)
        )
        self.daemon.start()
        channel = self._undo.enter_context(
            grpc.insecure_channel(
                f"unix:{self.daemon.address}",
                options=[("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200)],
            )
        )
        self._client = RemoteSnapshotter(channel)

    def _credentials(self) -> Path:
        place = self._workdir / "docker"
        place.mkdir()
        auth = base64.b64encode(f"{self._login.username}:{self._login.password}".encode()).decode()
        (place / "config.json").write_text(json.dumps({"auths": {self.registry.host: {"auth": auth}}}))
        return place

    # ---- images ----

    def publish(self, seed: int, *, layers: int, files: int, largest: int) -> tuple[IndexedImage, Path]:
        """Put a new image into the registry; return it and the directory with its files as they have to be."""
        source = random.Random(seed)
        truth = self._workdir / "truth" / str(next(self._numbers))
        tars = []
        for layer in range(layers):
            entries: dict[str, Entry | bytes] = {f"d{layer}/": directory()}
            for number in range(files):
                content = source.randbytes(source.randrange(largest // 2)) + b"\0" * source.randrange(
                    largest // 2
                )
                entries[f"d{layer}/f{number}"] = content
                (truth / f"d{layer}").mkdir(parents=True, exist_ok=True)
                (truth / f"d{layer}/f{number}").write_bytes(content)
            tars.append(tar(entries))
        image = publish(self.registry, tars, repository=f"image{truth.name}", span_size=1 << 16)
        return image, truth

    def pull(self, image: IndexedImage, truth: Path) -> Pulled:
        """Pull and mount an image. Raises NotLazy, and then nothing of it is left."""
        chains: list[str] = []
        mark = f"{truth.name}-{next(self._numbers)}"
        try:
            for layer in range(len(image.layers)):
                chains.append(self._prepare(image, layer, chains, mark))
        except NotLazy:
            self._remove(reversed(chains))
            raise
        key = f"container-{mark}"
        mounts = self._retried(lambda: self._container(key, chains[-1]))
        pulled = Pulled(image, chains, key, self._workdir / "mnt" / mark, truth)
        pulled.mounted.enter_context(mounted(mounts, pulled.root))
        return pulled

    def _prepare(self, image: IndexedImage, layer: int, chains: Sequence[str], mark: str) -> str:
        """Pull one layer as containerd does; return its chain ID."""
        chain = f"sha256:{mark}-{layer}"
        labels = image.labels(layer) | {"containerd.io/snapshot.ref": chain}
        for attempt in itertools.count():
            key = f"extract-{mark}-{layer}-{attempt}"
            try:
                self._retried(lambda: self._client.prepare(key, chains[-1] if chains else "", labels))  # noqa: B023
            except AlreadyExists:
                with contextlib.suppress(NotFound):
                    self._retried(lambda: self._client.stat(chain))
                    return chain
                continue  # an earlier call of ours had made the key when the daemon died
            self._remove([key])
            raise NotLazy(image.reference)
        raise AssertionError

    def _container(self, key: str, parent: str) -> Any:
        try:
            return self._client.prepare(key, parent)
        except AlreadyExists:
            return self._client.mounts(key)

    def release(self, pulled: Pulled) -> None:
        """Unmount an image and have the daemon forget it; it can be pulled again."""
        pulled.mounted.close()
        pulled.root.rmdir()
        self._remove([pulled.key, *reversed(pulled.chains)])
        self._retried(self._client.cleanup)

    def remove(self, pulled: Pulled) -> None:
        """Release an image and take it away, from the registry too."""
        self.release(pulled)
        shutil.rmtree(pulled.truth)
        for layer in pulled.image.layers:
            self.registry.delete_blob(pulled.image.image.repository, layer.digest)
            self.registry._api.blobs.pop(layer.digest, None)

    def _remove(self, keys: Iterator[str] | Sequence[str]) -> None:
        for key in keys:
            with contextlib.suppress(NotFound):
                self._retried(lambda: self._client.remove(key))  # noqa: B023

    def _retried(self, call: Callable[[], Result]) -> Result:
        """Call until the daemon answers."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return call()
            except (Unavailable, SnapshotterError) as error:
                passing = isinstance(error, Unavailable) or type(error) is SnapshotterError
                if not passing or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    # ---- processes ----

    def status(self) -> dict[str, Any]:
        """Return what the daemon tells of itself; {} while it does not."""
        try:
            return reports.ask(self.daemon.root, reports.STATUS)
        except (UsageError, OSError):
            return {}

    def restart_daemon(self) -> None:
        """Start the daemon as its unit does after it ended."""
        time.sleep(RESTART_S)
        begin = time.monotonic()
        self.daemon.start()
        self.restart_times.append(time.monotonic() - begin)


def in_namespace(there: Host, make: Callable[[], Result]) -> Result:
    """Return what `make` makes in a thread that has gone to another network namespace; its sockets are from there."""
    made: list[Result] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            with open(f"/run/netns/{there.namespace}", "rb") as namespace:
                if _libc.setns(namespace.fileno(), _CLONE_NEWNET) != 0:
                    number = ctypes.get_errno()
                    raise OSError(number, os.strerror(number))
            made.append(make())
        except BaseException as error:  # noqa: BLE001  raised by whoever waits
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return made[0]
