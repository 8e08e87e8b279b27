"""One fleet, two makers: what `soci` makes is run by reference daemons, and what they make by ours.

    REFERENCE_SOCI=DIRECTORY[:DIRECTORY] python -m bench.mixed

A directory has `soci` and `soci-snapshotter-grpc`. Each image is pulled
lazily by a real containerd from a real registry with TLS, and a container reads all of it; what it sees must be what it
sees through overlayfs, and the layers must be FUSE mounts.

References of today need containerd 2: older ones do not tell a snapshotter the namespace.

Everything happens in network namespaces and one temporary directory, and is undone. Concurrency: one thread.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path

from bench.identity import Reference, references
from tests.support import corpus, host
from tests.support.containerd import Containerd, remove_directory
from tests.support.dockerregistry import DockerRegistry
from tests.support.images import Entry, Image, ImageBuilder, directory, hardlink, symlink, tar_layer
from tests.support.netns import Network
from tests.support.process import Daemon, Service, accepts_connections, to_toml

SNAPSHOTTER = "soci"
_MODES = {"pull_modes": {"soci_v1": {"enable": True}, "soci_v2": {"enable": True}}}
_CONFIG = {**_MODES, "content_store": {"type": "soci"}}
LAYERS = 3
"""Of the image; each is to be lazy."""


class ReferenceDaemon(Service):
    """The daemon of a reference, with a root of its own."""

    def __init__(self, reference: Reference, place: Path, fleet: Fleet) -> None:
        program = reference.program.with_name("soci-snapshotter-grpc")
        self.address = place / "snapshotter.sock"
        self.root = place / "root"
        place.mkdir()
        config = place / "config.toml"
        config.write_text(to_toml(_CONFIG))
        options: list[str | Path] = ["--config", config, "--address", self.address, "--root", self.root]
        super().__init__([*fleet.prefix, program, *options], log=place / "log", env=fleet.env)

    def cleanup(self) -> None:
        """End it and detach what it mounted."""
        super().cleanup()
        host.detach_below(self.root)


class Fleet:
    """A registry on another host, and the environment of those who use it."""

    def __init__(self, place: Path, stack: ExitStack) -> None:
        self.place = place
        self._stack = stack
        network = stack.enter_context(Network(place))
        self.prefix = network.client.prefix
        far = network.server
        self.registry = DockerRegistry(place / "registry", host=far.address, tls=True, prefix=far.prefix)
        stack.callback(self.registry.cleanup)
        self.registry.start()
        self.env = {"DOCKER_CONFIG": str(place), "SSL_CERT_FILE": str(self.registry.ca), "TZ": "UTC"}

    @contextmanager
    def containerd(self, name: str, snapshotter: Path | None = None) -> Iterator[Containerd]:
        """Give a containerd for a `with` block, with a snapshotter if one is named."""
        plugins = {} if snapshotter is None else {SNAPSHOTTER: snapshotter}
        server = Containerd(self.place / name, snapshotters=plugins, prefix=self.prefix, env=self.env)
        try:
            yield server.start()
        finally:
            server.cleanup()
            remove_directory(server.directory)

    def run(self, *command: str | Path) -> None:
        """Run a program. Raises AssertionError when it fails."""
        env = {**os.environ, **self.env}
        done = subprocess.run(
            [*self.prefix, *command], capture_output=True, text=True, env=env, timeout=300, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"

    def soci(self, *arguments: str | Path) -> None:
        """Run our `soci`."""
        self.run(sys.executable, "-m", "snapshotter.cli.main", "--root", self.place / "soci", *arguments)


def image(layout: Path) -> Image:
    """Return an image of real files and of some that make several spans."""
    source = random.Random(1)
    large: dict[str, Entry | bytes] = {"srv/": directory()}
    large |= {f"srv/{number}": source.randbytes(5_000_000) for number in range(3)}
    links: dict[str, Entry | bytes] = {
        "./": directory(),
        "etc/": directory(),
        "etc/a": b"a",
        "etc/b": hardlink("etc/a"),
        "etc/c": symlink("a"),
    }
    builder = ImageBuilder(layout).add(tar_layer(corpus.real_tar())).layer(large)
    return builder.layer({**links, "srv/": directory(), "srv/.wh.1": b""}).build()


def ours(fleet: Fleet, reference: str, version: int) -> str:
    """Index an image by our own `soci`, in its registry; return the name of the lazy one."""
    if version == 1:
        fleet.soci("create", "--registry", "--min-layer-size", "0", reference)
        return reference
    fleet.soci("convert", "--registry", "--min-layer-size", "0", reference, f"{reference}-soci")
    return f"{reference}-soci"


def theirs(program: Reference, fleet: Fleet, reference: str, version: int) -> str:
    """Index an image by the reference's `soci`, in a containerd; return the name of the lazy one."""
    with fleet.containerd("maker") as server:
        server.ctr("content", "fetch", reference)
        place: list[str | Path] = [
            "--address",
            server.address,
            "--content-store",
            "soci" if version == 1 else "containerd",
        ]
        state = fleet.place / f"state-{program.version}-{version}"

        def act(*arguments: str | Path) -> None:
            fleet.run(*program.command(state), *place, *arguments)

        if version == 1:
            act("create", "--min-layer-size", "0", reference)
            act("push", reference)
            return reference
        act("convert", "--min-layer-size", "0", reference, f"{reference}-soci")
        server.ctr("images", "push", f"{reference}-soci")
        return f"{reference}-soci"


def tree(server: Containerd, reference: str, snapshotter: str) -> list[str]:
    """Return what a container sees of an image, but for the root itself, which is the container's own."""
    return [
        line for line in server.dump_tree(reference, snapshotter=snapshotter) if '"path": "."' not in line
    ]


def consumed(fleet: Fleet, reference: str, daemon: Daemon | ReferenceDaemon) -> list[str]:
    """Pull an image through a daemon; return what a container sees of it. Raises AssertionError when it is not lazy."""
    daemon.start()
    try:
        daemon.wait_ready(lambda: accepts_connections(daemon.address))
        with fleet.containerd("lazy", daemon.address) as server:
            options = ["--address", str(server.address), "image", "rpull", "--snapshotter", SNAPSHOTTER]
            fleet.soci(*options, reference)
            lazy = sum(mount.fstype.startswith("fuse") for mount in host.mounts_below(daemon.root))
            assert lazy == LAYERS, f"{lazy} of {LAYERS} layers are lazy\n{daemon.log_text()[-3000:]}"
            return tree(server, reference, SNAPSHOTTER)
    finally:
        daemon.cleanup()


def mix(fleet: Fleet, program: Reference, maker: str, version: int) -> str:
    """Have an image indexed by one ("ours", "theirs") and run by the other; return what is wrong, "" for nothing."""
    source = fleet.registry.push(image(fleet.place / "image"), f"mixed/{maker}-{version}-{program.version}")
    with fleet.containerd("full") as server:
        server.pull(source, plain_http=False)
        expected = tree(server, source, "overlayfs")
    place = fleet.place / "daemon"
    daemon: Daemon | ReferenceDaemon
    if maker == "ours":
        made, daemon = ours(fleet, source, version), ReferenceDaemon(program, place, fleet)
    else:
        made = theirs(program, fleet, source, version)
        daemon = Daemon(place, _MODES, env=fleet.env, prefix=fleet.prefix)
    try:
        found = consumed(fleet, made, daemon)
    except AssertionError as error:
        return str(error)
    finally:
        remove_directory(place)
    return "\n".join(sorted(set(expected) ^ set(found)))


def main() -> int:
    """Run every combination; exit code 1 when one is not as it must be, 2 when there is no reference."""
    found = references()
    if not found:
        print("no reference: set REFERENCE_SOCI to the directory of its programs", file=sys.stderr)
        return 2
    good = True
    place = Path(tempfile.mkdtemp(prefix="st-"))
    try:
        with ExitStack() as stack:
            fleet = Fleet(place, stack)
            for program in found:
                for version, maker in product((1, 2) if program.converts else (1,), ("ours", "theirs")):
                    wrong = mix(fleet, program, maker, version)
                    reader = {"ours": "theirs", "theirs": "ours"}[maker]
                    print(
                        f"{program.version}, v{version}: made by {maker}, run by {reader}: {wrong or 'identical'}"
                    )
                    good = good and not wrong
    finally:
        remove_directory(place)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
