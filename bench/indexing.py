"""How fast indices are made: `python -m bench.indexing`, beside the reference's `soci` where that can be had.

The reference is looked for in $REFERENCE_SOCI (a directory) and $PATH. It is run in a mount namespace of its own, because it keeps its state
in one place of the host. Needs root. Each line is one figure as JSON; see docs/performance.md.

Everything lives in one temporary directory, which goes with all processes and namespaces whatever happens.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from bench import image as images
from bench.contenders import Reference
from bench.demo import orderly_end
from bench.figures import Figure, summary
from tests.support.containerd import Containerd, remove_directory
from tests.support.dockerregistry import DockerRegistry
from tests.support.images import Image
from tests.support.netem import Link
from tests.support.netns import Network

RECIPE: Final = images.Recipe(
    name="indexing",
    packages=("python3", "bash", "coreutils", "base-files", "libstdc++6", "libgomp1", "git", "perl"),
    wheels=(
        (
            *("numpy==2.4.6", "pandas==3.1.1", "scipy==1.17.1", "scikit-learn==1.9.1", "pyarrow==26.0.1"),
            *("joblib==1.6.0", "narwhals==2.29.0", "cloudpickle==3.1.2", "threadpoolctl==3.8.0"),
            *("python-dateutil==4.0.0", "tzdata==2026.6"),
        ),
        ("jaxlib==0.10.2", "polars-runtime-32==2.1.0"),
        ("opencv-python-headless==5.0.0.93", "sympy==1.14.0"),
    ),
    weights=256 << 20,
)
"""700 MiB compressed, 1.8 GB of tar, 5 layers."""

LINK: Final = Link(delay=0.01, rate=62.5e6)
"""500 Mbit/s: at 1 Gbit/s two cores are too few for both registries, the link itself and us."""

_ROUNDS: Final = 3
_REFERENCE_ROOT: Final = Path("/var/lib/soci-snapshotter-grpc")
_REFERENCE: Final = (
    *("unshare", "--mount", "sh", "-c"),
    f'mount --bind "$1" {_REFERENCE_ROOT} && shift && exec "$@"',
    "reference",
)

_COPY: Final = (
    *("skopeo", "--insecure-policy", "copy", "--quiet", "--preserve-digests"),
    *("--src-tls-verify=false", "--dest-tls-verify=false"),
)

Tell = Callable[[str], None]


def figures(directory: Path, tell: Tell = lambda _: None) -> Iterator[Figure]:
    """Measure in `directory` and yield each figure once it is known; `tell` gets a line for each step.

    Raises AssertionError, with what the program said, when a step fails.
    """
    image = images.build(RECIPE, tell=tell)
    tell("indexing: start of the command line")
    yield _start()
    tell("indexing: one layer on one core")
    cores = _part("one-core", *[str(layer.content) for layer in image.layers])["layers"]
    yield _one_core(cores)
    tell("indexing: 100,000 files")
    yield from _many_files()
    tell("indexing: a layer of 10 GiB")
    yield _large_layer()
    tell("indexing: soci create")
    yield _create(directory / "create", image, tell)
    tell("indexing: registry to registry")
    one_core = image.size / sum(layer["cpu_s"] for layer in cores)
    yield _streaming(directory / "streaming", image, one_core)


def _start() -> Figure:
    """What every command pays before it does anything."""
    seconds = [_timed([*_soci(), "--version"], {}) for _ in range(5)]
    return Figure("start of soci", "s", statistics.median(seconds))


def _one_core(layers: Sequence[dict[str, Any]]) -> Figure:
    """The layers that compress; the weights, which do not, would only make it look faster."""
    shrunk = [layer for layer in layers if layer["blob"] < 0.9 * layer["tar"]]
    rates = [round(layer["tar"] / layer["cpu_s"] / 1e6) for layer in shrunk]
    rate = sum(layer["tar"] for layer in shrunk) / sum(layer["cpu_s"] for layer in shrunk)
    return Figure(
        *("one layer, one core, tar per CPU second", "MB/s", rate / 1e6, 450),
        better="more",
        detail={"layers": rates, "files": [layer["files"] for layer in shrunk]},
    )


def _many_files() -> Iterator[Figure]:
    found = _part("many-files")
    for name, what in (("ustar", "as image builders write them"), ("pax", "each with a PAX header")):
        part = found[name]
        detail = {"files": 100_000, "headers": what, "bytes": part["ztoc"]}
        make = part["scan_s"] + part["serialize_s"]
        # The goals are for what images hold; how long the costlier headers take is told beside them.
        make_goal, parse_goal = (1.5, 0.4) if name == "ustar" else (None, None)
        yield Figure(f"TOC of 100k files, build ({name})", "s", make, make_goal, detail=detail)
        yield Figure(f"TOC of 100k files, parse ({name})", "s", part["parse_s"], parse_goal, detail=detail)


def _large_layer() -> Figure:
    part = _part("large-layer")
    return Figure(
        *("peak memory, 10 GiB layer", "MB", part["peak"] / 1e6, 300),
        detail={"blob": part["blob"], "tar": part["tar"], "ztoc": part["ztoc"], "wall_s": part["wall_s"]},
    )


def _part(name: str, *arguments: str) -> dict[str, Any]:
    """Run one of `indexingparts` and return what it found."""
    command = [sys.executable, "-m", "bench.indexingparts", name, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, f"{name}: {result.stderr}"
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def _create(directory: Path, image: Image, tell: Tell) -> Figure:
    """Wall time of `soci create`, ours and the reference's by turns; each time with nothing known from before."""
    reference = Reference.program("soci") if Reference.available() else None
    env = {"DOCKER_CONFIG": str(directory)}
    registry = DockerRegistry(directory / "registry")
    containerd = Containerd(directory / "containerd", env=env)
    ours: list[float] = []
    theirs: list[float] = []
    with contextlib.ExitStack() as undo:
        undo.callback(registry.cleanup)
        name = registry.start().push(image, RECIPE.name)
        undo.callback(containerd.cleanup)
        containerd.start().ctr("content", "fetch", "--plain-http", name, timeout=300)
        registry.stop()
        if reference:
            undo.enter_context(_reference_root())
        for number in range(_ROUNDS):
            state = directory / f"ours{number}"
            address = ["--address", str(containerd.address)]
            ours.append(_timed([*_soci(), *address, "--root", str(state), "create", name], env))
            tell(f"indexing: soci create took {ours[-1]:.2f} s")
            if reference:
                state = directory / f"theirs{number}"
                state.mkdir()
                theirs.append(_timed([*_REFERENCE, str(state), reference, *address, "create", name], env))
                tell(f"indexing: the reference took {theirs[-1]:.2f} s")
    detail: dict[str, Any] = {"bytes": image.size, "layers": len(image.layers), "ours_s": ours}
    ratio = None
    if theirs:
        ratio = statistics.median(ours) / statistics.median(theirs)
        detail["reference_s"] = theirs
    else:
        detail["reason"] = "the reference is not on this machine (REFERENCE_SOCI)"
    return Figure("soci create, wall", "x reference", ratio, 0.33, detail=detail)


@contextlib.contextmanager
def _reference_root() -> Iterator[None]:
    """Let there be a directory at the place where the reference keeps its state, to mount its own one over."""
    made = not _REFERENCE_ROOT.exists()
    _REFERENCE_ROOT.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if made:
            _REFERENCE_ROOT.rmdir()


def _streaming(directory: Path, image: Image, one_core: float) -> Figure:
    """Rate of `soci convert` between two registries behind a link, over TLS; `one_core` is bytes of blob per CPU second.

    What the link carries is what a plain copy of the same image, by turns with ours, makes of it: registries, TLS and the
    emulated link share the processors with whoever copies.
    """
    directory.mkdir(parents=True)
    ours: list[float] = []
    copies: list[float] = []
    with contextlib.ExitStack() as undo:
        network = undo.enter_context(Network(directory))
        source = undo.enter_context(_registry(directory / "source", network))
        name = source.push(image, RECIPE.name)
        network.shape(LINK)
        # The settings of a link are read again within 0.2 s.
        time.sleep(0.5)
        for number in range(_ROUNDS):
            copy = [*_COPY, f"docker://{name}"]
            convert = [*_soci(), "--root", str(directory / f"state{number}"), "convert", "--registry", name]
            for what, scheme, command, times in (
                ("copy", "docker://", copy, copies),
                ("ours", "", convert, ours),
            ):
                place = directory / f"{what}{number}"
                # A new one each time: what a registry has is not sent to it again.
                with _registry(place, network) as target:
                    trusted = directory / "trusted.pem"
                    trusted.write_text(source.ca.read_text() + target.ca.read_text())
                    env = {"DOCKER_CONFIG": str(directory), "SSL_CERT_FILE": str(trusted)}
                    goal = f"{scheme}{target.name}/{RECIPE.name}:soci"
                    times.append(_timed([*network.client.prefix, *command, goal], env))
                remove_directory(place)
    seconds, copy_s = statistics.median(ours), statistics.median(copies)
    slower = min(LINK.rate, image.size / copy_s, one_core)
    return Figure(
        *(
            "registry to registry over TLS",
            "x the slower of link and core",
            image.size / seconds / slower,
            0.9,
        ),
        better="more",
        detail={
            "ours_s": ours,
            "plain_copy_s": copies,
            "MB_per_s": round(image.size / seconds / 1e6, 1),
            "plain_copy_MB_per_s": round(image.size / copy_s / 1e6, 1),
            "link_MB_per_s": LINK.rate / 1e6,
            "one_core_MB_per_s": round(one_core / 1e6, 1),
        },
    )


@contextlib.contextmanager
def _registry(directory: Path, network: Network) -> Iterator[DockerRegistry]:
    """Run a registry with TLS at the far end of the link."""
    far = network.server
    registry = DockerRegistry(directory, host=far.address, tls=True, prefix=far.prefix)
    try:
        yield registry.start()
    finally:
        registry.cleanup()


def _soci() -> list[str]:
    return [sys.executable, "-m", "snapshotter.cli.main"]


def _timed(command: Sequence[str], env: dict[str, str]) -> float:
    """Run a command and return how long it took. Raises AssertionError when it fails."""
    started = time.perf_counter()
    result = subprocess.run(
        command, env={**os.environ, **env}, capture_output=True, text=True, timeout=600, check=False
    )
    seconds = time.perf_counter() - started
    assert result.returncode == 0, f"{' '.join(command)}: {result.stdout}{result.stderr}"
    return round(seconds, 3)


def main() -> int:
    """Print every figure as a line of JSON, and the summary; return the exit code."""
    if os.geteuid() != 0:
        print("bench: containerd and network namespaces need root", file=sys.stderr)
        return 1
    directory = Path(tempfile.mkdtemp(prefix="sb-", dir="/var/tmp"))
    found = []
    try:
        with orderly_end():
            for figure in figures(directory, lambda line: print(line, file=sys.stderr, flush=True)):
                found.append(figure)
                print(figure.to_json(), flush=True)
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 130
    except AssertionError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    finally:
        remove_directory(directory)
    print(summary(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
