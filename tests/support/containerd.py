"""A real containerd of our own: private root, state, sockets and cgroups, beside any other on the machine.

One thing cannot be private: the shims put their sockets, named by a hash of this containerd's address, below
/run/containerd/s, and take them away again. Everything else lives in one directory.

Concurrency: one thread drives it; `ctr` and `run` may be called from several.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc

from tests.support import host, toolbox
from tests.support.process import Service, accepts_connections, to_toml

_UNUSED_PLUGINS = [
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.zfs",
    "io.containerd.tracing.processor.v1.otlp",
    "io.containerd.internal.v1.tracing",
]
_CRI = "io.containerd.grpc.v1.cri"
_CGROUPS = Path("/sys/fs/cgroup")


class Containerd:
    """containerd in `directory` (short: it holds sockets), with `snapshotters` (name to socket) as proxy plugins.

    `cri` names the snapshotter of the CRI plugin, which is off without it, and `pause` the image of its pods. `prefix` is a command put before
    containerd's and ctr's own, say to enter a network namespace; `env` is added to their environment.
    """

    def __init__(
        self,
        directory: Path,
        *,
        snapshotters: Mapping[str, Path] | None = None,
        cri: str | None = None,
        pause: str = "",
        prefix: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        namespace: str = "default",
    ) -> None:
        self.directory = directory.resolve()
        self.address = self.directory / "c.sock"
        self.namespace = namespace
        self.snapshotters = dict(snapshotters or {})
        self._cri = cri
        self._pause = pause
        self._prefix = list(prefix)
        self._env = dict(env or {})
        self._names = (f"t{os.getpid()}-{number}" for number in itertools.count())
        self._config = self.directory / "config.toml"
        self._service = Service(
            [*prefix, "containerd", "--config", self._config], log=self.directory / "containerd.log", env=env
        )

    @property
    def pid(self) -> int:
        """containerd's process."""
        return self._service.pid

    def start(self) -> Containerd:
        """Start it and return it once it answers. Raises AssertionError with its log when it does not."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._config.write_text(to_toml(self._settings()))
        self._service.start()
        self._service.wait_ready(self._answers)
        return self

    def stop(self) -> None:
        """End containerd in order; containers and mounts stay."""
        self._service.stop()

    def kill(self) -> None:
        """End containerd as a crash would; containers and mounts stay."""
        self._service.kill()

    def restart(self) -> None:
        """Stop and start it."""
        self.stop()
        self.start()

    def log_text(self) -> str:
        """Return what containerd logged in all its lives."""
        return self._service.log_text()

    def ctr(self, *arguments: str | Path, timeout: float = 120.0, check: bool = True) -> str:
        """Run ctr against this containerd and return what it printed.

        Raises AssertionError with both outputs when it fails, unless `check` is false (the outputs come joined).
        """
        result = subprocess.run(
            [
                *self._prefix,
                "ctr",
                "--address",
                self.address,
                "--namespace",
                self.namespace,
                *map(str, arguments),
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=timeout,
            env={**os.environ, **self._env},
            check=False,
        )
        if not check:
            return result.stdout + result.stderr
        told = " ".join(map(str, arguments))
        assert result.returncode == 0, (
            f"ctr {told}: exit {result.returncode}\n{result.stdout}\n{result.stderr}"
        )
        return result.stdout

    def pull(
        self,
        reference: str,
        *,
        snapshotter: str = "overlayfs",
        plain_http: bool = True,
        timeout: float = 300.0,
    ) -> None:
        """Pull an image and unpack it by `snapshotter`, as ctr does."""
        scheme = ["--plain-http"] if plain_http else []
        self.ctr("images", "pull", *scheme, "--snapshotter", snapshotter, reference, timeout=timeout)

    def run(
        self,
        image: str,
        *command: str,
        snapshotter: str = "overlayfs",
        mounts: Mapping[Path, str] | None = None,
        options: Sequence[str] = (),
        timeout: float = 120.0,
    ) -> str:
        """Run `command` in a new container of `image`, remove the container, and return what it printed.

        `mounts` maps directories of the host to read-only mount points. Raises AssertionError when it fails.
        """
        return self.ctr(
            *("run", "--rm", "--snapshotter", snapshotter, *self._private_run_options()),
            *self._mount_options(mounts or {}),
            *options,
            image,
            next(self._names),
            *command,
            timeout=timeout,
        )

    def run_detached(
        self,
        image: str,
        *command: str,
        snapshotter: str = "overlayfs",
        mounts: Mapping[Path, str] | None = None,
    ) -> str:
        """Start `command` in a container that stays, and return the container's id (see `exec`, `remove`)."""
        name = next(self._names)
        self.ctr(
            *("run", "--detach", "--null-io", "--snapshotter", snapshotter, *self._private_run_options()),
            *self._mount_options(mounts or {}),
            image,
            name,
            *command,
        )
        return name

    def exec(self, container: str, *command: str, timeout: float = 60.0) -> str:
        """Run `command` in a running container and return what it printed."""
        fifos = self.directory / "fifo"
        name = next(self._names)
        return self.ctr(
            "tasks", "exec", "--fifo-dir", fifos, "--exec-id", name, container, *command, timeout=timeout
        )

    def remove(self, container: str) -> None:
        """Kill a container's processes and remove it with its snapshot; a missing one is fine."""
        self.ctr("tasks", "rm", "--force", container, check=False)
        self.ctr("containers", "rm", container, check=False)

    def dump_tree(self, image: str, *, snapshotter: str = "overlayfs", timeout: float = 300.0) -> list[str]:
        """Return the whole tree of `image` as a container sees it, one line for each path (see `treedump`).

        The dump runs in a privileged container, on an interpreter of the host that lies on the container's own
        tmpfs at /run: the image needs to hold nothing, and nothing is added to it.
        """
        tools = toolbox.make(self.directory / "toolbox")
        program = toolbox.command(f"/run/{tools.name}", "treedump.py", "/")
        text = self.run(
            image,
            *program,
            snapshotter=snapshotter,
            mounts={tools: f"/run/{tools.name}"},
            options=["--privileged"],
            timeout=timeout,
        )
        return text.splitlines()

    def cleanup(self) -> None:
        """Remove every container and end every process; detach every mount; the directory stays."""
        if self._service.alive:
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                for container in self.ctr("containers", "ls", "--quiet", timeout=20).split():
                    self.remove(container)
        self._service.cleanup()
        host.detach_below(self.directory)
        self._remove_cgroups()

    def _answers(self) -> bool:
        if not accepts_connections(self.address):
            return False
        result = subprocess.run(
            ["ctr", "--address", str(self.address), "version"], capture_output=True, timeout=60, check=False
        )
        return result.returncode == 0 and (self._cri is None or self._answers_kubelet())

    def _answers_kubelet(self) -> bool:
        """Tell whether the CRI plugin is initialized, which is some time after the other services answer."""
        with grpc.insecure_channel(f"unix://{self.address}") as channel:
            call: Any = channel.unary_unary("/runtime.v1.ImageService/ListImages")
            try:
                call(b"", timeout=60)
            except grpc.RpcError:
                return False
        return True

    def _settings(self) -> dict[str, Any]:
        state = self.directory / "state"
        plugins: dict[str, Any] = {"io.containerd.internal.v1.opt": {"path": str(self.directory / "opt")}}
        if self._cri is not None:
            plugins[_CRI] = {
                "disable_tcp_service": True,
                "restrict_oom_score_adj": True,
                "sandbox_image": self._pause,
                "cni": {"bin_dir": str(self.directory / "cni"), "conf_dir": str(self.directory / "cni")},
                "containerd": {"snapshotter": self._cri, "disable_snapshot_annotations": False},
            }
        return {
            "version": 2,
            "root": str(self.directory / "root"),
            "state": str(state),
            "oom_score": 0,
            "disabled_plugins": [*_UNUSED_PLUGINS, *([] if self._cri is not None else [_CRI])],
            "grpc": {"address": str(self.address)},
            "ttrpc": {"address": f"{self.address}.ttrpc"},
            "debug": {"address": str(self.directory / "debug.sock"), "level": "info"},
            "plugins": plugins,
            "proxy_plugins": {
                name: {"type": "snapshot", "address": str(socket)}
                for name, socket in self.snapshotters.items()
            },
        }

    def _private_run_options(self) -> list[str]:
        for name in ("runc", "fifo"):
            (self.directory / name).mkdir(exist_ok=True)
        return ["--runc-root", str(self.directory / "runc"), "--fifo-dir", str(self.directory / "fifo")]

    def _mount_options(self, mounts: Mapping[Path, str]) -> list[str]:
        return [
            part
            for source, target in mounts.items()
            for part in ("--mount", f"type=bind,src={source},dst={target},options=rbind:ro")
        ]

    def _remove_cgroups(self) -> None:
        """Take away the empty groups that runc leaves: /<namespace> in each hierarchy, when it is empty."""
        for group in _CGROUPS.glob(f"*/{self.namespace}"):
            with contextlib.suppress(OSError):
                group.rmdir()


def remove_directory(directory: Path) -> None:
    """Detach what is mounted at or below `directory` and delete it; never enters a mount."""
    host.detach_below(directory.resolve())
    shutil.rmtree(directory, ignore_errors=True)
