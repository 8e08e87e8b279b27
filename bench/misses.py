"""What a request costs that no cache of the kernel answers: ours beside a server in C, in the same run and by turns.

Both serve the same bytes of the same file, which is in the page cache, through real mounts with the same readahead and
the same lifetimes of entries; both are one thread. The server in C is ours too (bench/cserver.c, libfuse's low-level
API) and does as little as one can. The readers are in C as well, so that the servers are what is measured; they
forget the pages of a file before they read it, and look up each name once. Of each server the best round counts: a round
is a fraction of a second, and whatever else the machine does can only make it slower. Reader and servers share one
processor: on several, where the scheduler happens to put a server changes its rate five times as much as its code does.

Concurrency: one trio loop; readers are programs, because whoever holds a mount's descriptor must not look at it.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from bench.figures import Figure
from bench.goals import goal
from snapshotter.fuse import mounting
from tests.support.keeping import keeping
from tests.support.lazylayer import LazyLayer, make_layer, make_tar
from tests.support.process import wait_until

ROUNDS = 9
READERS = 1
"""With more of them, who is slower at waking up profits: one makes every request a whole round trip."""

_BIG = 256 << 20
_PAGES = 10_000
_NAMES = 5_000
"""In each round; no name is looked up twice."""

_READ_AHEAD_KB = 512
_SPAN = 4 << 20
_HERE = Path(__file__).parent


def figures(directory: Path) -> Iterator[Figure]:
    """Yield ours over the server in C. Raises AssertionError, OSError, subprocess.CalledProcessError."""
    files = {f"names/f{number:06}": b"" for number in range(_NAMES * ROUNDS)}
    layer = make_layer(directory / "layer", make_tar({"big": bytes(_BIG), **files}), span_size=_SPAN)
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(everywhere)})
    try:
        rates = trio.run(_measure, directory, layer)
    finally:
        os.sched_setaffinity(0, everywhere)
    for name, unit in (
        ("cold-page 4 KiB reads over a C server", "op_s"),
        ("uncached lookups over a C server", "op_s"),
        ("1 MiB sequential over a C server", "byte_s"),
    ):
        ours, other = (max(rates[who, name]) for who in ("ours", "c"))
        yield goal(name).figure(ours / other, **{f"ours_{unit}": round(ours), f"c_{unit}": round(other)})


async def _measure(directory: Path, layer: LazyLayer) -> dict[tuple[str, str], list[float]]:
    """Return operations (or bytes) per second of every round, by server and figure."""
    reader = await _compiled(directory, "creader", "-lpthread")
    rates: dict[tuple[str, str], list[float]] = {}
    places = {who: directory / who for who in ("ours", "c")}
    async with (
        keeping(directory, idle_timeout=600) as kept,
        _c_server(directory, places["c"], layer),
    ):
        await kept.keeper.mount(layer.spec(1, places["ours"]))
        for place in places.values():
            mounting.set_read_ahead(str(place), _READ_AHEAD_KB)
        for number in range(ROUNDS):
            for who in sorted(places, reverse=bool(number % 2)):
                place = places[who]
                for name, *arguments in (
                    (
                        "cold-page 4 KiB reads over a C server",
                        "pages",
                        place / "big",
                        _PAGES,
                        READERS,
                        number,
                    ),
                    (
                        "uncached lookups over a C server",
                        *("names", place / "names", number * _NAMES, _NAMES, READERS),
                    ),
                    ("1 MiB sequential over a C server", "whole", place / "big", _BIG),
                ):
                    rate = await _run(reader, *arguments)
                    rates.setdefault((who, name), []).append(rate)
    return rates


@asynccontextmanager
async def _c_server(directory: Path, place: Path, layer: LazyLayer) -> AsyncIterator[None]:
    """Run the server in C over the layer's own data for a `with` block."""
    place.mkdir()
    program = await _compiled(directory, "cserver", *await _flags())
    arguments = [place, layer.paths.data, _BIG, _NAMES * ROUNDS]
    async with trio.open_nursery() as nursery:
        process = await nursery.start(trio.run_process, [str(program), *map(str, arguments)])
        try:
            await trio.to_thread.run_sync(_wait_mounted, place)
            yield
        finally:
            mounting.detach(str(place))  # it ends with its mount
            with trio.CancelScope(shield=True), trio.move_on_after(30):
                await process.wait()
            nursery.cancel_scope.cancel()


def _wait_mounted(place: Path) -> None:
    wait_until(
        lambda: bool(mounting.mounts_below(str(place.resolve()))),
        timeout=30,
        what="the server in C has mounted",
    )


async def _compiled(directory: Path, name: str, *options: str) -> Path:
    program = directory / name
    await trio.run_process(["gcc", "-O2", "-o", str(program), str(_HERE / f"{name}.c"), *options])
    return program


async def _flags() -> list[str]:
    done = await trio.run_process(["pkg-config", "--cflags", "--libs", "fuse3"], capture_stdout=True)
    return shlex.split(done.stdout.decode())


async def _run(program: Path, *arguments: object) -> float:
    """Run the reader; return what it did per second."""
    done = await trio.run_process([str(program), *map(str, arguments)], capture_stdout=True)
    operations, seconds = done.stdout.split()
    return float(operations) / float(seconds)
