"""The ways to start a container that are compared: a full pull by overlayfs, the reference's lazy pull, and ours.

A contender is made for one cold start: nothing of the image is on its side before `pull`. The reference's programs,
`soci` and `soci-snapshotter-grpc`, are looked for in $REFERENCE_SOCI (a directory) and in $PATH; without them it does
not take part.

Concurrency: one thread drives a contender.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import ClassVar

from bench.recipes import COMMAND
from bench.site import SNAPSHOTTER, Site
from snapshotter.fetch import trace
from snapshotter.layer.store import LayerStore
from snapshotter.layer.tree import Tree
from tests.support.process import (
    Service,
    accepts_connections,
    descendants,
    usage,
    wait_until,
)

COMPLETE_SECONDS = 240.0
"""How long the rest of an image may take to come."""

_ROLES = (
    ("snapshotter.daemon.main", "daemon"),
    ("snapshotter.fetch", "fetcher"),
    ("snapshotter.fuse.zygote", "servers"),
    ("snapshotter.fuse.holder", "holder"),
    ("soci-snapshotter-grpc", "daemon"),
    ("containerd", "containerd"),
)
"""What a command line names, and the role of its process; a server has the zygote's, from which it was forked."""


class Contender:
    """Full pull: containerd's own overlayfs. The lazy ones differ in what they add to it."""

    name = "full"
    snapshotter = "overlayfs"

    def __init__(self, site: Site) -> None:
        self.site = site
        self.directory = f"{self.name}-{time.monotonic_ns():x}"
        self.services: list[Service] = []
        self.containerd = site.containerd(f"{self.directory}-c", self._plugins())

    def pull(self, reference: str) -> None:
        """Pull the image from nothing."""
        self.containerd.pull(reference, plain_http=not self.site.registry.tls)

    def run(self, reference: str, *command: str) -> str:
        """Run a container, the image's own program unless `command` is another, and return what it prints."""
        return self.containerd.run(
            reference, *(command or COMMAND), snapshotter=self.snapshotter, timeout=300
        )

    def wait_complete(self) -> None:
        """Return when the network is not needed any more for the image."""

    def facts(self) -> dict[str, float]:
        """Return what there is to tell of this contender alone."""
        return {}

    def cpu_seconds(self) -> dict[str, float]:
        """Return the processor time so far by role, that of children which ended included."""
        return {role: cpu for role, (_, cpu) in self._usage().items()}

    def memory(self) -> float:
        """Return the proportional memory of the snapshotter's processes; containerd's is not among them."""
        return sum(pss for role, (pss, _) in self._usage().items() if role != "containerd")

    def close(self) -> None:
        """End it, and remove what it stored."""
        self.containerd.cleanup()
        for service in self.services:
            service.cleanup()
        for path in self.site.directory.glob(f"{self.directory}*"):
            shutil.rmtree(path, ignore_errors=True)

    def _plugins(self) -> Mapping[str, Path]:
        return {}

    def _usage(self) -> dict[str, tuple[float, float]]:
        pids = descendants([self.containerd.pid])
        for service in self.services:
            pids |= service.processes()
        found: dict[str, tuple[float, float]] = {}
        for pid in pids:
            role = _role(pid)
            if role is not None:
                pss, cpu = usage([pid])
                before = found.get(role, (0.0, 0.0))
                found[role] = before[0] + pss, before[1] + cpu + _cpu_of_children(pid)
        return found


class Reference(Contender):
    """The reference's lazy pull, with its own configuration as it comes."""

    name = "reference"
    snapshotter = SNAPSHOTTER

    @staticmethod
    def program(name: str) -> str | None:
        """Return the path of one of its programs, None when it is not on this machine."""
        return shutil.which(
            name, path=os.pathsep.join([os.environ.get("REFERENCE_SOCI", ""), os.environ.get("PATH", "")])
        )

    @classmethod
    def available(cls) -> bool:
        """Whether it can take part. Our own programs bear the same names, and are written in Python."""
        paths = [cls.program(name) for name in ("soci", "soci-snapshotter-grpc")]
        return all(path is not None and Path(path).read_bytes()[:4] == b"\x7fELF" for path in paths)

    def pull(self, reference: str) -> None:
        """Pull the image by its own client."""
        program = self.program("soci")
        assert program is not None, "the reference is not on this machine"
        self.site.command(
            *(program, "--address", str(self.containerd.address), "image", "rpull"),
            *("--snapshotter", SNAPSHOTTER, *self.site.scheme, reference),
        )

    def _plugins(self) -> Mapping[str, Path]:
        program = self.program("soci-snapshotter-grpc")
        assert program is not None, "the reference is not on this machine"
        place = self.site.directory / self.directory
        place.mkdir()
        config, address = place / "config.toml", place / "s.sock"
        config.write_text("")
        command: list[str | Path] = [*self.site.prefix, program, "--config", config, "--address", address]
        service = Service([*command, "--root", place / "root"], log=place / "log", env=self.site.env)
        self.services.append(service)
        self.site.undo.callback(service.cleanup)
        service.start()
        service.wait_ready(lambda: accepts_connections(address))
        return {SNAPSHOTTER: address}


class Ours(Contender):
    """Our lazy pull, with the configuration as it comes."""

    name = "ours"
    snapshotter = SNAPSHOTTER
    config: ClassVar[Mapping[str, object]] = {}

    def pull(self, reference: str) -> None:
        """Pull the image by our client."""
        self.site.soci(
            self.containerd, "image", "rpull", *self.site.scheme, "--snapshotter", SNAPSHOTTER, reference
        )

    def wait_complete(self) -> None:
        """Return when every lazy layer is complete and verified."""

        def verified() -> bool:
            mounts = self.daemon.status()["mounts"]
            return bool(mounts) and all(mount.get("verified") for mount in mounts)

        wait_until(verified, timeout=COMPLETE_SECONDS, what="every layer is complete")

    def facts(self) -> dict[str, float]:
        """Return what went over the link and why, and how long readers waited."""
        metrics = self.daemon.metrics()
        names = {
            "ondemand_ranges": "soci_fetch_ondemand_ranges_total",
            "ondemand_bytes": "soci_fetch_ondemand_bytes_total",
            "background_ranges": "soci_fetch_background_ranges_total",
            "background_bytes": "soci_fetch_background_bytes_total",
            "waits": "soci_fetch_wait_seconds_count",
            "waited_s": "soci_fetch_wait_seconds_sum",
        }
        return {name: metrics[key] for name, key in names.items()}

    def phases(self, since: float) -> dict[str, float]:
        """Return when, in seconds after `since` (of the epoch), each step of the pull was over."""
        times: dict[str, list[float]] = {}
        for record in self.daemon.records():
            times.setdefault(str(record.get("msg")), []).append(_seconds(str(record.get("time", ""))))
        steps = {"resolved": times.get("SOCI index found", [])}
        for step in ("ztoc", "tree"):
            paths = self.daemon.root.glob(f"layers/sha256/*/{step}")
            steps[f"{step}s"] = [path.stat().st_mtime for path in paths]
        steps["mounted"] = times.get("image layer prepared", [])
        return {step: round(max(ends) - since, 3) for step, ends in steps.items() if ends}

    def _plugins(self) -> Mapping[str, Path]:
        self.daemon = self.site.daemon(self.directory, self.config)
        self.services.append(self.daemon)
        return {SNAPSHOTTER: self.daemon.address}

    def touched_bytes(self) -> float:
        """Return the compressed bytes of all spans that a reader has used, as far as that is written down by now."""
        store, total = LayerStore(self.daemon.root), 0
        for layer in store.layers():
            paths = store.paths(layer)
            with contextlib.suppress(FileNotFoundError), open(paths.tree, "rb") as file:
                tree = Tree(file.fileno())
                for span in trace.load(paths.trace, tree.span_count):
                    total += tree.span(span).compressed_end - tree.span(span).compressed_start
                tree.close()
        return float(total)


def contenders() -> list[Callable[[Site], Contender]]:
    """Return all that can take part here, in the order in which they take turns."""
    return [Contender, *([Reference] if Reference.available() else []), Ours]


def _role(pid: int) -> str | None:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return None
    return next((role for needle, role in _ROLES if needle in command), None)


def _cpu_of_children(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
