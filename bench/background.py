"""The background: how much of an idle link it uses, and what a reader notices of it.

A link of 20 ms round trip and 500 Mbit/s, TLS, less than what its emulation can carry. The share of the link is the
bytes of a layer that nobody reads, from the first of them to the last, over the time and the link's rate. The reader
wants bytes of spans that are not there, one after another with pauses, of one layer while another one arrives in the
background, and again with no background; its time is the median from asking to having.

Concurrency: one thread.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bench.direct import Direct, Published, publish
from bench.figures import Figure
from bench.goals import goal
from bench.site import Site
from snapshotter.layer.spans import SpanView
from snapshotter.layer.store import LayerStore
from snapshotter.units import Digest
from tests.support.images import LayerBlob, layer
from tests.support.netem import Link
from tests.support.process import wait_until

_LINK = Link(delay=0.01, rate=62.5e6)
_SIZE = 256 << 20
_PIECE = 1 << 20
_TAIL = 8 << 20
"""Left out of the rate: the last connections have no successors."""

_READS = 12
_PAUSE_S = 0.25
_PATIENCE_S = 60.0

_READER = """\
import json, os, sys, time
times = []
file = os.open(sys.argv[1], os.O_RDONLY)
for offset in json.loads(sys.argv[2]):
    time.sleep(float(sys.argv[3]))
    started = time.monotonic()
    assert len(os.pread(file, 4096, offset)) == 4096
    times.append(time.monotonic() - started)
print(json.dumps(times))
"""


def figures(directory: Path) -> Iterator[Figure]:
    """Yield both figures. Raises AssertionError."""
    site = Site(directory, link=_LINK, tls=True)
    try:
        site.start()
        arriving, read = (
            publish(site, name, _stored(seed)) for seed, name in enumerate(("arriving", "read"))
        )
        rate = _rate(site, arriving)
        name = "background on an idle link over the link"
        yield goal(name).figure(rate / _LINK.rate, mb_s=round(rate / 1e6, 1))
        idle = _reader(site, "idle", read, None)
        beside = _reader(site, "beside", read, arriving)
    finally:
        site.close()
    middles = {name: statistics.median(times) for name, times in (("idle", idle), ("beside", beside))}
    yield goal("a reader's median wait beside the background over idle").figure(
        middles["beside"] / middles["idle"],
        **{f"{name}_ms": round(seconds * 1000, 1) for name, seconds in middles.items()},
    )


def _stored(seed: int) -> LayerBlob:
    """Return a layer of one file that does not compress."""
    source = random.Random(seed)
    return layer({"file": b"".join(source.randbytes(_PIECE) for _ in range(_SIZE // _PIECE))}, level=0)


def _rate(site: Site, image: Published) -> float:
    """Return the bytes per second at which a layer that nobody reads arrives."""
    direct = Direct(site, "rate")
    try:
        direct.prepare(image)
        view = _states(direct, image)
        wait_until(lambda: view.fetched_bytes, timeout=_PATIENCE_S, what="the background has begun")
        first, started = view.fetched_bytes, time.monotonic()
        enough = image.layers[0].size - _TAIL
        wait_until(lambda: view.fetched_bytes >= enough, timeout=_PATIENCE_S, what="the layer is there")
        rate = (view.fetched_bytes - first) / (time.monotonic() - started)
        view.close()
        return rate
    finally:
        direct.close()


def _reader(site: Site, name: str, image: Published, arriving: Published | None) -> list[float]:
    """Return the seconds of each read of `image` that had to wait, beside `arriving` in the background or alone."""
    direct = Direct(site, name, {"fetch": {"background": arriving is not None}})
    try:
        if arriving is not None:
            direct.prepare(arriving)
            view = _states(direct, arriving)
            wait_until(lambda: view.fetched_bytes, timeout=_PATIENCE_S, what="the background has begun")
            view.close()
        direct.prepare(image)
        offsets = [_SIZE * number // _READS for number in range(_READS)]
        random.Random(1).shuffle(offsets)
        file = direct.targets()[-1] / "file"
        command = [sys.executable, "-I", "-c", _READER, str(file), json.dumps(offsets), str(_PAUSE_S)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=True)
        times: list[float] = json.loads(done.stdout)
        return times
    finally:
        direct.close()


def _states(direct: Direct, image: Published) -> SpanView:
    path = LayerStore(direct.daemon.root).paths(Digest(image.layers[0].digest)).spans
    wait_until(path.exists, timeout=_PATIENCE_S, what="the layer has a span file")
    with open(path, "rb") as file:
        return SpanView(file.fileno())
