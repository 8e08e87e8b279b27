"""How fast ranges of a blob come over TLS: `python -m bench.transfer`.

The client of the fetcher and of `soci create --registry`, four connections, ranges of 4 MiB one after the other, from
a real registry on the loopback address that shares the processors. Each line is one figure as JSON.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from bench import image as images
from bench.demo import orderly_end
from bench.figures import Figure, summary
from snapshotter.registry.ranges import RangeClient
from snapshotter.registry.source import BlobSource
from tests.support.dockerregistry import DockerRegistry

RECIPE: Final = images.Recipe(name="transfer", packages=(), weights=256 << 20)
RANGE: Final = 4 << 20
CONNECTIONS: Final = 4
_ROUNDS: Final = 5


def figures(directory: Path) -> Iterator[Figure]:
    """Measure in `directory`. Raises AssertionError when the registry does not start, RegistryError."""
    image = images.build(RECIPE)
    layer = image.layers[0]
    registry = DockerRegistry(directory / "registry", tls=True)
    try:
        registry.start().push(image, RECIPE.name)
        url = f"{registry.url}/v2/{RECIPE.name}/blobs/{layer.digest}"
        source = BlobSource(url, {}, registry.name)
        client = RangeClient(connections=CONNECTIONS, ca_file=registry.ca)
        buffers = [bytearray(RANGE) for _ in range(CONNECTIONS)]
        ends = layer.size // RANGE * RANGE

        def read(number: int) -> None:
            with memoryview(buffers[number]) as buffer:
                for start in range(number * RANGE, ends, CONNECTIONS * RANGE):
                    client.read(source, start, start + RANGE, into=buffer)

        walls, used = [], []
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            for _ in range(_ROUNDS):
                started, cpu = time.perf_counter(), time.process_time()
                list(pool.map(read, range(CONNECTIONS)))
                walls.append(time.perf_counter() - started)
                used.append(time.process_time() - cpu)
        client.close()
    finally:
        registry.cleanup()
    detail = {"connections": CONNECTIONS, "range": RANGE, "bytes": ends}
    rate = ends / statistics.median(walls) / 1e6
    yield Figure("ranges over TLS, loopback", "MB/s", rate, 600, better="more", detail=detail)
    cost = statistics.median(used) / ends * 1e9
    yield Figure("ranges over TLS, client", "CPU s per GB", cost, 1.5, detail=detail)


def main() -> int:
    """Print both figures and the summary; return the exit code."""
    with tempfile.TemporaryDirectory(prefix="sb-", dir="/var/tmp") as directory, orderly_end():
        found = list(figures(Path(directory)))
    for figure in found:
        print(figure.to_json())
    print(summary(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
