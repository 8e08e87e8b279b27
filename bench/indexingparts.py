"""The parts of indexing that are measured in a process of their own: `python -m bench.indexingparts PART [FILE...]`.

Each prints one JSON object: seconds, processor seconds, bytes. A process of its own, because peak memory and
processor time are those of a process.
"""

from __future__ import annotations

import json
import os
import random
import resource
import statistics
import struct
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from isal import isal_zlib

from snapshotter.soci.content import CHUNK_SIZE
from snapshotter.ztoc.build import build
from snapshotter.ztoc.model import Algorithm
from snapshotter.ztoc.parse import parse
from snapshotter.ztoc.serialize import serialize
from snapshotter.ztoc.tar import TarScanner

FILES = 100_000
LARGE_LAYER = 10 << 30
"""Bytes of tar in the layer whose memory is measured."""
_PATTERN = 8 << 20
"""Bytes of tar after which that layer repeats itself."""
_FILE = (1 << 20) - 512
_REPEATS = 5


def one_core(blobs: list[Path]) -> dict[str, Any]:
    """Build the zTOC of each blob, all threads on one core; the blobs are in the page cache."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    layers = []
    for blob in blobs:
        for _ in _chunks(blob):
            pass
        started, used = time.perf_counter(), time.process_time()
        built = build(_chunks(blob), algorithm=Algorithm.GZIP)
        layers.append(
            {
                "blob": built.layer_size,
                "tar": built.ztoc.uncompressed_size,
                "files": len(built.ztoc.entries),
                "wall_s": time.perf_counter() - started,
                "cpu_s": time.process_time() - used,
            }
        )
    return {"layers": layers}


def _chunks(blob: Path) -> Iterator[bytes]:
    with blob.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_SIZE):
            yield chunk


def large_layer(_: list[Path]) -> dict[str, Any]:
    """Build the zTOC of a layer of 10 GiB, which nothing keeps."""
    pattern = _pattern()
    before = _peak_memory()
    started = time.perf_counter()
    built = build(_gzip_repeated(pattern, LARGE_LAYER // len(pattern)), algorithm=Algorithm.GZIP)
    return {
        "peak": _peak_memory(),
        "before": before,
        "blob": built.layer_size,
        "tar": built.ztoc.uncompressed_size,
        "ztoc": len(built.data),
        "wall_s": time.perf_counter() - started,
    }


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _pattern() -> bytes:
    """Return files of words, which shrink to about a third."""
    source = random.Random(1)
    words = [source.randbytes(source.randrange(3, 8)) for _ in range(2048)]
    archive = BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT) as writer:
        for number in range(_PATTERN // (_FILE + 512)):
            member = tarfile.TarInfo(f"srv/data/{number}")
            member.size = _FILE
            writer.addfile(member, BytesIO(b"".join(source.choices(words, k=_FILE // 4))[:_FILE]))
    return archive.getvalue()[:_PATTERN]


def _gzip_repeated(pattern: bytes, count: int) -> Iterator[bytes]:
    """Yield one gzip member that inflates to `pattern`, `count` times, and the end of a tar; deflated only once."""
    deflate = zlib.compressobj(6, zlib.DEFLATED, -15)
    body = deflate.compress(pattern) + deflate.flush(zlib.Z_FULL_FLUSH)
    trailer = bytes(1024)
    yield b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
    checksum = 0
    for _ in range(count):
        checksum = isal_zlib.crc32(pattern, checksum)
        for start in range(0, len(body), CHUNK_SIZE):
            yield body[start : start + CHUNK_SIZE]
    last = zlib.compressobj(6, zlib.DEFLATED, -15)
    size = (count * len(pattern) + len(trailer)) & 0xFFFFFFFF
    yield last.compress(trailer) + last.flush() + struct.pack("<II", zlib.crc32(trailer, checksum), size)


def many_files(_: list[Path]) -> dict[str, Any]:
    """Make the TOC part of a zTOC of 100,000 files from their headers, and parse it.

    `ustar` is what image builders write; in `pax` each file has a PAX header, for a time that is no whole second.
    """
    found: dict[str, Any] = {}
    for name, form, fraction in (("ustar", tarfile.USTAR_FORMAT, 0.0), ("pax", tarfile.PAX_FORMAT, 0.25)):
        tar = _many_files(form, fraction)
        built = build([tar], algorithm=Algorithm.UNCOMPRESSED)
        found[name] = {
            "scan_s": _median(partial(_scan, tar)),
            "serialize_s": _median(partial(serialize, built.ztoc)),
            "parse_s": _median(partial(parse, built.data)),
            "ztoc": len(built.data),
        }
    return found


def _many_files(form: int, fraction: float) -> bytes:
    archive = BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=form) as writer:
        for number in range(FILES):
            member = tarfile.TarInfo(
                f"usr/lib/python3/dist-packages/package{number // 100}/module{number}.py"
            )
            member.uname = member.gname = "root"
            member.mtime = 1_700_000_000 + number // 10 + fraction
            member.size = number * 37 % 1000
            writer.addfile(member, BytesIO(bytes(member.size)))
    return archive.getvalue()


def _scan(tar: bytes) -> None:
    scanner = TarScanner()
    view = memoryview(tar)
    for start in range(0, len(tar), CHUNK_SIZE):
        scanner.feed(view[start : start + CHUNK_SIZE])
    scanner.close()


def _median(work: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


_PARTS = {"one-core": one_core, "large-layer": large_layer, "many-files": many_files}


if __name__ == "__main__":
    print(json.dumps(_PARTS[sys.argv[1]]([Path(name) for name in sys.argv[2:]])))
