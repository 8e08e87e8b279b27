"""A machine of its own for tests of services: systemd as PID 1 in a container (systemd-nspawn), up in two seconds.

Its /usr and its package database are the host's, under an overlay that takes what is written; /etc and /var are
its own and nearly empty, so that nothing that is enabled on the host runs in it. It shares the host's kernel and
network: a registry on the host's loopback address can be reached. Beyond what runc needs on the host it needs nothing.

The end of its PID 1 ends everything in it, its mounts included; nothing of it can be seen from the host.

Concurrency: one thread drives it; `run` may be called from several.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from tests.support.process import kill_and_wait, wait_until

_ETC = {
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    "hosts": "127.0.0.1 localhost\n",
    # One that is there keeps systemd from enabling whatever /usr brings, as it does at a first boot.
    "machine-id": "0123456789abcdef0123456789abcdef\n",
    "systemd/system/machine.target": (
        "[Unit]\nRequires=basic.target\nAfter=basic.target\nWants=multi-user.target\nAllowIsolate=yes\n"
    ),
    # Nobody reads what a test machine did last time.
    "systemd/journald.conf": "[Journal]\nStorage=volatile\nRateLimitIntervalSec=0\n",
}
_NOT_NEEDED = (
    "systemd-logind.service",
    "systemd-user-sessions.service",
    "dbus.service",
    "dbus.socket",
    "getty.target",
)

_CONTAINERD_UNIT = """\
[Unit]
Description=containerd
After=network.target

[Service]
Type=notify
ExecStart={program}
Delegate=yes
KillMode=process
TasksMax=infinity
"""


class Machine:
    """systemd and what it runs, in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.resolve()
        self.root = self.directory / "root"
        self._log = self.directory / "console.log"
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._leader = 0
        self._group = Path(f"/sys/fs/cgroup/snapshotter-test-{os.getpid()}")

    def start(self) -> Machine:
        """Boot; return when systemd has started everything. Raises AssertionError with the console's text."""
        self._furnish()
        command = self._command()
        if Path("/sys/fs/cgroup/cgroup.controllers").exists():
            # With cgroup v2 a group that holds processes (ours) hands no controllers on; one of its own gets them.
            with contextlib.suppress(OSError):  # read-only: then there are none to hand on
                self._group.mkdir(exist_ok=True)
                command = ["sh", "-c", f'echo $$ >{self._group}/cgroup.procs; exec "$@"', "sh", *command]
        with self._log.open("ab") as log:
            self._nspawn = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        try:
            wait_until(self._find_leader, timeout=120, what="systemd-nspawn has started systemd")
            wait_until(self._is_up, timeout=120, what="systemd is up")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self._log.read_text(errors='replace')[-4000:]}") from None
        # nspawn gives /sys and, with cgroup v1, most of the hierarchies read-only; runc makes groups, and we set read-ahead.
        writable = (
            "for each in /sys /sys/fs/cgroup/*; do mount -o remount,bind,rw $each 2>/dev/null || :; done"
        )
        self.run("sh", "-c", writable)
        # Services do start here, whatever the host's policy.
        self.run("rm", "-f", "/usr/sbin/policy-rc.d")
        return self

    def run(self, *command: str | Path, check: bool = True, timeout: float = 120) -> str:
        """Run a command on the machine; return what it prints, with `check=False` on both channels.

        Raises AssertionError when it fails.
        """
        entered = ["nsenter", "--target", str(self._leader), "--mount", "--pid", "--uts", "--ipc", "--cgroup"]
        result = subprocess.run(
            [*entered, "--", *map(str, command)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"},
        )
        if not check:
            return result.stdout + result.stderr
        told = " ".join(map(str, command))
        assert result.returncode == 0, f"{told}: exit {result.returncode}\n{result.stdout}{result.stderr}"
        return result.stdout

    def systemctl(self, *arguments: str) -> str:
        """Run systemctl. Raises AssertionError when it fails."""
        return self.run("systemctl", "--no-pager", *arguments)

    def property(self, unit: str, name: str) -> str:
        """Return one property of a unit, as systemd prints it."""
        return self.systemctl("show", "--value", "--property", name, unit).strip()

    def journal(self, unit: str) -> list[dict[str, Any]]:
        """Return the journal's entries of a unit, oldest first."""
        text = self.run("journalctl", "--no-pager", "--quiet", "--output=json", f"--unit={unit}")
        return [json.loads(line) for line in text.splitlines()]

    def add_containerd(self) -> None:
        """Start a containerd like the host's, with a configuration that takes drop-ins."""
        program = shutil.which("containerd")
        assert program is not None
        self.write("/etc/systemd/system/containerd.service", _CONTAINERD_UNIT.format(program=program))
        self.write(
            "/etc/containerd/config.toml",
            'version = 2\noom_score = 0\nimports = ["/etc/containerd/conf.d/*.toml"]\n'
            'disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.snapshotter.v1.devmapper"]\n',
        )
        self.systemctl("daemon-reload")
        self.systemctl("start", "containerd.service")

    def path(self, path: str) -> Path:
        """Return where a file of the machine's /etc, /var or /root is on the host."""
        return self.root / path.lstrip("/")

    def write(self, path: str, text: str) -> None:
        """Write a file to the machine's /etc, /var or /root."""
        self.path(path).parent.mkdir(parents=True, exist_ok=True)
        self.path(path).write_text(text)

    def cleanup(self) -> None:
        """End it at once, with everything in it."""
        if self._leader:
            kill_and_wait(self._leader)
        if self._nspawn is not None:
            with contextlib.suppress(ProcessLookupError):
                self._nspawn.terminate()
            try:
                self._nspawn.wait(20)
            except subprocess.TimeoutExpired:
                self._nspawn.kill()
                self._nspawn.wait()
        for directory, _, _ in os.walk(self._group, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(directory)

    def _furnish(self) -> None:
        for name in (
            "proc",
            "sys",
            "dev",
            "run",
            "tmp",
            "usr",
            "root",
            "etc",
            "var/lib/dpkg",
            "var/lib/containerd",
        ):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
            if Path("/", name).is_symlink():
                (self.root / name).symlink_to(os.readlink(f"/{name}"))
        for name in ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives", "passwd", "group"):
            subprocess.run(["cp", "-a", f"/etc/{name}", self.root / "etc"], check=True)
        shutil.copy("/usr/lib/os-release", self.root / "etc/os-release")
        for name, text in _ETC.items():
            self.write(f"/etc/{name}", text)
        units = self.root / "etc/systemd/system"
        (units / "default.target").symlink_to("machine.target")
        for unit in _NOT_NEEDED:
            (units / unit).symlink_to("/dev/null")

    def _command(self) -> list[str]:
        overlays = []
        for number, path in enumerate(("/usr", "/var/lib/dpkg")):
            upper = self.directory / f"upper-{number}"
            upper.mkdir(exist_ok=True)
            overlays.append(f"--overlay={path}:{upper}:{path}")
        return [
            "systemd-nspawn", "--quiet", "--boot", f"--directory={self.root}", *overlays,
            # No other service manager or machined is asked: it works where systemd is not PID 1, too.
            "--register=no", "--keep-unit", f"--machine=test-{os.getpid()}",
            # What runc needs to make containers, and FUSE.
            "--capability=all", "--system-call-filter=@keyring bpf", "--bind=/dev/fuse",
            "--console=pipe", "--resolv-conf=off", "--timezone=off", "--link-journal=no",
        ]  # fmt: skip

    def _find_leader(self) -> bool:
        assert self._nspawn is not None
        assert self._nspawn.poll() is None, f"systemd-nspawn ended with {self._nspawn.returncode}"
        children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children").read_text().split()
        for pid in children:
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().strip() == "systemd":
                    self._leader = int(pid)
        return bool(self._leader)

    def _is_up(self) -> bool:
        return self.run("systemctl", "is-system-running", check=False).strip() in {"running", "degraded"}
