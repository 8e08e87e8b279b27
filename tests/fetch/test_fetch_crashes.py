"""Crash points: the cache is cut at every write, and the next start finds truth or nothing.

A fetcher's life is recorded once: a layer is fetched, verified, read, found again after a reboot, and evicted. Then every
prefix of its writes is a process that was killed, and for every prefix there is a host that went down, its unsynced
sectors in any state. `CRASH_POINTS=20000 CRASH_SEED=7` tries more of the latter; `-s` shows the line of JSON.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from snapshotter.fetch import eviction, pipeline
from snapshotter.fetch.layerstate import LayerFiles
from snapshotter.layer.spans import SpanState
from snapshotter.layer.store import LayerStore
from tests.fetch.rig import Layer, Rig, make_layer, put
from tests.support.crashes import FILES, Image, Tape, recording
from tests.support.registry import Registry

POINTS = int(os.environ.get("CRASH_POINTS", "1200"))
SEED = int(os.environ.get("CRASH_SEED", "1"))

pytestmark = pytest.mark.logs_unchecked  # a cap below one layer is complained about


@dataclass
class Found:
    """What the next starts have found."""

    points: int = 0
    wrong: int = 0
    lost: int = 0
    checked: int = 0
    """Spans that could be read, and were compared."""
    seed: int = SEED
    where: list[str] = field(default_factory=list)
    """The first few that were not right."""

    def note(self, what: str) -> None:
        if len(self.where) < 5:
            self.where.append(what)


class NextStart:
    """Puts an image of a crash into a directory and looks at it as the next fetcher does."""

    def __init__(self, root: Path, layer: Layer, found: Found) -> None:
        self._layer = layer
        self._found = found
        self._store = LayerStore(root)
        put(self._store, layer)
        self._directory = self._store.paths(layer.digest).directory

    def look(self, image: Image, *, boot_id: str, must_be_whole: bool, what: str) -> None:
        """Compare every span that may be read with the truth; without the network."""
        for name in FILES:
            path = self._directory / name
            path.unlink(missing_ok=True)
            if name in image:
                path.write_bytes(image[name])
        files = LayerFiles.open(self._store, self._layer.digest, boot_id=boot_id, span_max=1 << 30)
        self._found.points += 1
        try:
            there = [self._is_there(files, span, what) for span in range(files.span_count)]
            whole = all(there)
            if files.states.verified and not pipeline.blob_has_digest(files):
                self._found.wrong += 1
                self._found.note(f"{what}: verified, and the blob is not right")
            if must_be_whole and not (whole and pipeline.blob_has_digest(files)):
                self._found.lost += 1
                self._found.note(f"{what}: a verified layer is lost")
        finally:
            files.states.close()
            files.close()

    def _is_there(self, files: LayerFiles, span: int, what: str) -> bool:
        """Return whether `span` is stored; count it as wrong when what would be served is not its content."""
        state = files.states.state(span)
        if state is SpanState.SUSPECT:
            state = pipeline.check(files, span, files.states.checksum(span)).state
        where = self._layer.spans[span]
        if state is SpanState.MISSING:
            return False
        self._found.checked += 1
        fd, start, right = files.blob_fd, where.compressed_start, self._layer.compressed(span)
        if state is SpanState.INFLATED:
            fd, start, right = files.data_fd, where.uncompressed_start, self._layer.content(span)
        if os.pread(fd, len(right), start) != right:
            self._found.wrong += 1
            self._found.note(f"{what}: span {span} is wrong")
        return True


@pytest.fixture(scope="module")
def layer() -> Layer:
    return make_layer(size=1 << 20, span_size=1 << 13)


@pytest.fixture(scope="module")
def tape(tmp_path_factory: pytest.TempPathFactory, layer: Layer) -> Tape:
    """The life of a layer."""
    with pytest.MonkeyPatch.context() as patch, Registry() as registry, recording(patch) as tape:
        patch.setattr(eviction, "GRACE_SECONDS", 0.0)
        root = tmp_path_factory.mktemp("life")
        live(root, registry, layer, tape)
    return tape


def live(root: Path, registry: Registry, layer: Layer, tape: Tape) -> None:
    """Fetch and verify the layer, read it, end, come back after a reboot, and be short of room."""
    everything = range(len(layer.spans))
    with Rig(root, registry, options={"boot_id": "first", "range_max_bytes": 1 << 15}) as rig:
        rig.add(layer)
        server = rig.connect(layer)
        for span in everything[::3]:
            assert server.read(span) == layer.content(span)
        rig.open(layer, background=True)
        rig.wait_verified(layer)
        tape.mark("verified")
        for span in everything[::2]:
            assert server.read(span) == layer.content(span)
    with Rig(root, registry, options={"boot_id": "second"}) as rig:
        rig.add(layer)
        server = rig.connect(layer)
        for span in everything[::5]:
            assert server.read(span) == layer.content(span)
        rig.open(layer, background=True)
        rig.wait_verified(layer)
    tape.mark("evicting")
    cap = len(layer.ztoc) + len(layer.tree) + (900 << 10)
    with Rig(root, registry, options={"boot_id": "second", "cache_max_bytes": cap}) as rig:
        rig.add(layer)
        server = rig.connect(layer)
        for span in [*everything, *everything[::4]]:
            assert server.read(span) == layer.content(span)
        assert rig.count("evicted_data_spans") > 0


def test_a_crash_at_any_write_leaves_truth_or_nothing(tmp_path: Path, layer: Layer, tape: Tape) -> None:
    found = Found()
    start = NextStart(tmp_path, layer, found)
    durable = range(tape.at("verified"), tape.at("evicting") + 1)
    chance = random.Random(SEED)
    every = range(len(tape.steps) + 1)
    for point, image in tape.after_kill(chance.sample(every, min(len(every), POINTS // 2))):
        boot_id = "first" if point <= tape.at("verified") else "second"
        start.look(image, boot_id=boot_id, must_be_whole=point in durable, what=f"kill at {point}")
    while found.points < POINTS:
        points = chance.sample(every, min(len(every), POINTS - found.points))
        for point, image in tape.after_power_loss(points, chance):
            start.look(image, boot_id="next", must_be_whole=point in durable, what=f"power loss at {point}")
    print(json.dumps({**vars(found), "steps": len(tape.steps)}))
    assert (found.wrong, found.lost) == (0, 0), found.where
    assert found.points >= 1000
    assert found.checked > found.points, "there was something to be wrong"


def test_the_check_would_notice(tmp_path: Path, layer: Layer, tape: Tape) -> None:
    """States that precede their bytes are what the check is there for."""
    found = Found()
    start = NextStart(tmp_path, layer, found)
    _, image = next(tape.after_kill([tape.at("verified")]))
    damaged = bytearray(image["data"])
    damaged[layer.spans[0].uncompressed_start + 10] ^= 1
    start.look(image | {"data": bytes(damaged)}, boot_id="first", must_be_whole=True, what="")
    assert found.wrong == 0, "it is in doubt, and hashed"
    start.look({name: image[name][:100] for name in image}, boot_id="next", must_be_whole=True, what="")
    assert found.lost == 1
