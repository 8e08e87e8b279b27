"""How things grow: with the number of mounted layers, with the files of one, and with its bytes.

Layers are made up: tiny ones for their number, empty files for the number of files, and one file of zeros, which
compresses a thousandfold and has as many spans as any other, for bytes. For each size the figures are the seconds of a
Prepare (the first on this host, network included, on loopback), proportional memory with everything asleep, and the
seconds from asking for a file's first bytes to having them, of a layer whose server has ended.

There is no goal but that nothing grows faster than linearly; what is printed is one figure a size, with the constants.

Concurrency: one thread.
"""

from __future__ import annotations

import gzip
import hashlib
import statistics
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

from bench.direct import Direct, Published, publish
from bench.figures import Figure
from bench.site import Site
from tests.support import raw_tar
from tests.support.images import LayerBlob, gzip_file_layer, layer
from tests.support.process import wait_until

_MOUNTS = (10, 50, 200)
_FILES = (10_000, 100_000, 1_000_000)
_GIB = (1, 4, 10)
_IDLE_S = 2
_CONFIG = {
    "mount_timeout_sec": 300,
    "fuse": {"idle_timeout_sec": _IDLE_S},
    "fetch": {"background": False},
    "layer": {"compile_timeout_sec": 300},
}
"""Whatever a size takes is what is measured."""

_CHUNK = 1 << 20
_READ = """\
import os, sys, time
started = time.monotonic()
assert os.read(os.open(sys.argv[1], os.O_RDONLY), 4096)
print(time.monotonic() - started)
"""


def figures(directory: Path) -> Iterator[Figure]:
    """Yield the figures of all sizes, the smallest first. Raises AssertionError."""
    site = Site(directory)
    try:
        site.start()
        yield from _of_mounts(site)
        for files in _FILES:
            image = publish(site, f"files{files}", _many_files(directory, files))
            yield from _of_one(site, image, f"{files:,} files", "last")
        for number, blob in zip(_GIB, _zeros(directory), strict=True):
            image = publish(site, f"gib{number}", blob)
            yield from _of_one(site, image, f"{number} GiB", f"f{number - 1:06}")
    finally:
        site.close()


def _of_mounts(site: Site) -> Iterator[Figure]:
    layers = [layer({"last": b"%d" % number}) for number in range(_MOUNTS[-1])]
    image = publish(site, "mounts", *layers)
    direct = Direct(site, "mounts-daemon", _CONFIG)
    try:
        times: list[float] = []
        direct.prepare(image)
        trees = direct.daemon.root / "layers/sha256"
        wait_until(
            lambda: len(list(trees.glob("*/tree"))) == len(layers), timeout=60, what="all are prepared ahead"
        )
        for count in _MOUNTS:
            while len(times) < count - 1:
                times.append(direct.prepare(image, len(times) + 1)[1])
            yield from _sized(direct, f"{count} mounted layers", statistics.median(times[-9:]), "last")
    finally:
        direct.close()


def _of_one(site: Site, image: Published, what: str, file: str) -> Iterator[Figure]:
    direct = Direct(site, f"{what.replace(' ', '')}-daemon".replace(",", ""), _CONFIG)
    try:
        _, seconds = direct.prepare(image)
        yield from _sized(direct, what, seconds, file)
    finally:
        direct.close()


def _sized(direct: Direct, what: str, prepare: float, file: str) -> Iterator[Figure]:
    """Yield the three figures of one size."""
    yield Figure(f"growth, {what}, Prepare", "ms", prepare * 1000)
    _wait_asleep(direct)
    yield Figure(f"growth, {what}, memory asleep", "MB", direct.daemon.usage().pss / 1e6)
    path = direct.targets()[-1] / file
    command = [sys.executable, "-I", "-c", _READ, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    yield Figure(f"growth, {what}, first read", "ms", float(done.stdout) * 1000)


def _wait_asleep(direct: Direct) -> None:
    def asleep() -> bool:
        return not any(mount["pid"] for mount in direct.daemon.status()["mounts"])

    wait_until(asleep, timeout=60, what="every server has ended")


def _many_files(directory: Path, count: int) -> LayerBlob:
    """Return a layer of `count` empty files, a thousand in a directory, and one that is not empty."""
    block = raw_tar.header(name=b"d000000/f000000", size=0)
    between, behind, free = block[15:148], block[156:], sum(block[15:148] + block[156:]) + 8 * 32
    path = directory / f"{count}.tar.gz"
    with gzip.open(path, "wb", compresslevel=1) as out:
        for first in range(0, count, 1000):
            names = [b"d%06d/f%06d" % (first // 1000, number) for number in range(min(1000, count - first))]
            out.write(
                b"".join(
                    [
                        b"%b%b%06o\0 %b" % (name, between, (free + sum(name)) & 0o777777, behind)
                        for name in names
                    ]
                )
            )
        out.write(raw_tar.entry(b"last", name=b"last") + raw_tar.END)
    return gzip_file_layer(path)


def _zeros(directory: Path) -> Iterator[LayerBlob]:
    """Yield layers of so many GiB as there are in _GIB, each a beginning of the next: files of 1 GiB of zeros."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    zeros = bytes(_CHUNK)
    piece = squeeze.compress(zeros) + squeeze.flush(zlib.Z_FULL_FLUSH)
    stream = bytearray(b"\x1f\x8b\x08\0\0\0\0\0\0\xff")
    content, check, size = hashlib.sha256(), 0, 0
    for number in range(_GIB[-1]):
        header = raw_tar.header(name=b"f%06d" % number, size=1 << 30)
        stream += squeeze.compress(header) + squeeze.flush(zlib.Z_FULL_FLUSH) + piece * (1 << 10)
        content.update(header)
        check = zlib.crc32(header, check)
        for _ in range(1 << 10):
            content.update(zeros)
            check = zlib.crc32(zeros, check)
        size += len(header) + (1 << 30)
        if number + 1 in _GIB:
            yield _ended(directory / f"{number + 1}gib.tar.gz", bytes(stream), content.copy(), check, size)


def _ended(path: Path, stream: bytes, content: hashlib._Hash, check: int, size: int) -> LayerBlob:
    """Return the layer of a gzip stream to which the end of its tar is still to be added."""
    last = zlib.compressobj(9, zlib.DEFLATED, -15)
    content.update(raw_tar.END)
    trailer = struct.pack("<II", zlib.crc32(raw_tar.END, check), (size + len(raw_tar.END)) & 0xFFFFFFFF)
    path.write_bytes(stream + last.compress(raw_tar.END) + last.flush() + trailer)
    blob = path.read_bytes()
    digest = f"sha256:{hashlib.sha256(blob).hexdigest()}"
    return LayerBlob(
        "application/vnd.oci.image.layer.v1.tar+gzip",
        digest,
        f"sha256:{content.hexdigest()}",
        len(blob),
        path,
    )
