"""Layer providers without a registry: what a snapshotter under test asks for layers.

All of them count what is asked, under a lock, because a snapshotter asks from many threads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from snapshotter.errors import Unavailable
from snapshotter.snapshot.layers import Deferred, LayerRequest, Lazy, Provided
from snapshotter.snapshot.model import LABEL_TARGET, Owner, Usage
from snapshotter.units import Digest, sha256_digest
from tests.support import host
from tests.support.snapshot_mounts import bind, mount

LAZY_USAGE = Usage(4096, 3)


def some_digest(text: str) -> Digest:
    """Return a digest that stands for `text`."""
    return sha256_digest(text.encode())


class NoLayers:
    """Defers every layer. The base of the others."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.requests: list[LayerRequest] = []
        self.checked: list[tuple[int, ...]] = []
        self.woken: list[tuple[int, ...]] = []
        self.released: list[int] = []
        self.unavailable: set[int] = set()
        self.closed = 0

    def provide(self, request: LayerRequest) -> Provided:
        """Note the request."""
        with self.lock:
            self.requests.append(request)
        return Deferred("no-index")

    def check(self, ids: Sequence[int]) -> None:
        """Refuse what is in `unavailable`."""
        self.checked.append(tuple(ids))
        for snapshot_id in ids:
            if snapshot_id in self.unavailable:
                raise Unavailable(f'layer "{snapshot_id}" unavailable')

    def wake(self, ids: Sequence[int]) -> None:
        """Note the call."""
        self.woken.append(tuple(ids))

    def usage(self, snapshot_id: int) -> Usage | None:
        """Know nothing."""
        return None

    def release(self, snapshot_id: int, directory: Path) -> bool:
        """Note the call; there is nothing to unmount."""
        with self.lock:
            self.released.append(snapshot_id)
        return False

    def close(self) -> None:
        """Count the calls."""
        self.closed += 1


class ScriptedLayers(NoLayers):
    """Answers as told for each target, and mounts nothing. `act`, if given, runs first, in the call."""

    def __init__(
        self,
        answers: Mapping[str, Provided | Exception],
        act: Callable[[LayerRequest], None] = lambda _request: None,
    ) -> None:
        super().__init__()
        self.answers = dict(answers)
        self.act = act

    def provide(self, request: LayerRequest) -> Provided:
        """Return, or raise, the answer for the request's target; without one, defer."""
        super().provide(request)
        self.act(request)
        answer = self.answers.get(request.labels[LABEL_TARGET], Deferred("no-index"))
        if isinstance(answer, Exception):
            raise answer
        return answer


class DirectoryLayers(NoLayers):
    """Really mounts: a layer is a prepared directory, by its target, bound read-only to the snapshot's."""

    def __init__(self, prepared: Mapping[str, Path], owner: Owner | None = None) -> None:
        super().__init__()
        self.prepared = dict(prepared)
        self.owner = owner
        self.mounted: dict[int, Path] = {}

    def provide(self, request: LayerRequest) -> Provided:
        """Mount the layer, if there is a directory for it."""
        super().provide(request)
        target = request.labels[LABEL_TARGET]
        if target not in self.prepared:
            return Deferred("no-ztoc")
        bind(str(self.prepared[target]), request.directory, read_only=True)
        with self.lock:
            self.mounted[request.snapshot_id] = request.directory
        return Lazy(some_digest(target), LAZY_USAGE, self.owner)

    def release(self, snapshot_id: int, directory: Path) -> bool:
        """Unmount the layer, if one is mounted for this snapshot."""
        super().release(snapshot_id, directory)
        with self.lock:
            known = self.mounted.pop(snapshot_id, None)
        if known is None:
            return False
        host.detach(known)
        return True


class StuckLayers(NoLayers):
    """Mounts FUSE file systems that nobody serves: whoever looks at one, or below, waits until `unstick`."""

    def __init__(self) -> None:
        super().__init__()
        self._devices: dict[int, int] = {}

    def provide(self, request: LayerRequest) -> Provided:
        """Mount a file system and never answer its first request."""
        super().provide(request)
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        self._devices[request.snapshot_id] = device
        options = f"fd={device},rootmode=40755,user_id=0,group_id=0,allow_other"
        mount("stuck", request.directory, "fuse.stuck", 0, options)
        return Lazy(some_digest("stuck"), LAZY_USAGE)

    def release(self, snapshot_id: int, directory: Path) -> bool:
        """Detach the mount without looking at it."""
        super().release(snapshot_id, directory)
        device = self._devices.pop(snapshot_id, None)
        if device is None:
            return False
        host.detach(directory)
        os.close(device)
        return True

    def unstick(self) -> None:
        """End every file system: whoever waits for one gets an error."""
        while self._devices:
            os.close(self._devices.popitem()[1])
