"""The host: kernel, /dev/fuse, limits, disk, and the service itself.

Stateless; reads /proc, /dev and the file system's numbers, and asks systemctl.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from snapshotter import reports
from snapshotter.daemon.install.finding import Finding, ok, problem, warning
from snapshotter.errors import UsageError

DAEMON = "soci-snapshotter-grpc.service"
HOLDER = "soci-snapshotter-holder.service"

_GIB = 1 << 30

_OLDEST = (5, 17)
"""The Linux whose FUSE protocol is spoken here (7.36)."""

_MIN_FILES = 16_384
"""Open files: a few for each of some thousand layers. The units ask for more."""

_LITTLE_DISK = 5 * _GIB
"""Not measured: the compressed bytes of one large image."""


def check_host(root: Path) -> Iterator[Finding]:
    """Gather the facts and judge them; `root` is the daemon's, which need not exist."""
    yield kernel(os.uname().release, Path("/proc/filesystems").read_text())
    yield device(Path("/dev/fuse"))
    running = _running(root)
    pid = running["pids"]["daemon"] if running else os.getpid()
    yield files(_file_limit(pid), is_daemon=bool(running))
    yield cgroup(_group_limits(pid), is_daemon=bool(running))
    yield disk(root)
    if Path("/run/systemd/system").is_dir():
        yield from units({name: _unit(name) for name in (DAEMON, HOLDER)})
    else:
        yield warning(
            "systemd",
            "it is not the service manager here",
            "start the daemon by other means and keep it running; its holder becomes a detached process",
        )
    yield daemon(running)


def kernel(release: str, filesystems: str) -> Finding:
    """Judge uname's release and the text of /proc/filesystems."""
    missing = [
        name for name in ("overlay", "fuse") if not re.search(rf"\b{name}$", filesystems, re.MULTILINE)
    ]
    if missing:
        return problem(
            "kernel", f"Linux {release} without {' and '.join(missing)}", f"modprobe {' '.join(missing)}"
        )
    numbers = re.match(r"(\d+)\.(\d+)", release)
    if numbers and (int(numbers[1]), int(numbers[2])) >= _OLDEST:
        return ok("kernel", f"Linux {release}")
    return warning(
        "kernel",
        f"Linux {release} is too old for lazy loading (5.17 and later can)",
        "images are pulled in full here; a newer kernel is the way",
    )


def device(path: Path) -> Finding:
    """Judge whether the FUSE device can be opened."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return problem(
            "fuse device",
            f"{path} cannot be opened: {error.strerror}",
            "modprobe fuse; be root; in a container, hand the device in",
        )
    return ok("fuse device", str(path))


def files(limit: int, *, is_daemon: bool) -> Finding:
    """Judge the limit on open files: of the daemon, or of this shell while there is none."""
    whose = "the daemon's" if is_daemon else "this shell's"
    text = f"{whose} limit is {limit}"
    if limit >= _MIN_FILES:
        return ok("open files", text)
    return warning("open files", text, "LimitNOFILE= in the unit, or ulimit -Hn where there is no systemd")


def cgroup(limits: Mapping[str, str], *, is_daemon: bool) -> Finding:
    """Judge limits of the cgroup: file name to content, those that say "max" left out."""
    if limits:
        shown = ", ".join(f"{name} {value}" for name, value in sorted(limits.items()))
        return warning(
            "cgroup",
            f"{'the daemon' if is_daemon else 'this shell'} is limited: {shown}",
            "no MemoryMax= or TasksMax= for the daemon: containers read through it",
        )
    return ok("cgroup", "no limit on memory or processes")


def disk(root: Path) -> Finding:
    """Judge the room where the cache is, or will be."""
    place = root
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    text = f"{free / _GIB:.1f} GiB free for {root}"
    if os.statvfs(place).f_flag & os.ST_RDONLY:
        return problem("disk", f"{place} is read-only", "choose another --root")
    if free < _LITTLE_DISK:
        return warning("disk", text, "give it more, or set [cache] max_bytes and min_free_bytes")
    return ok("disk", text)


def units(found: Mapping[str, Mapping[str, str]]) -> Iterator[Finding]:
    """Judge the properties that systemd knows of daemon and holder."""
    for name, unit in found.items():
        if unit.get("LoadState") != "loaded":
            yield problem(name, "there is no such unit", "install the package, or the files of systemd/")
        elif unit.get("ActiveState") != "active":
            yield problem(
                name, f"it is {unit.get('ActiveState')}", f"systemctl start {name}; journalctl -u {name}"
            )
        elif name == DAEMON and unit.get("UnitFileState") != "enabled":
            yield warning(name, "it is not started at boot", f"systemctl enable {name}")
        else:
            yield ok(name, "active")


def daemon(running: Mapping[str, Any] | None) -> Finding:
    """Judge what the daemon says of itself; None when none answers."""
    if running is None:
        return problem("daemon", "it does not answer", "start it; then its log says what is wrong")
    if not running["lazy"]:
        return problem(
            "daemon", f"nothing is lazy: {running['not_lazy_because']}", "mend that, and restart the daemon"
        )
    return ok("daemon", f"lazy loading works; {len(running['mounts'])} lazy mounts")


def _running(root: Path) -> dict[str, Any] | None:
    with suppress(UsageError):
        return reports.ask(root, reports.STATUS)
    return None


def _file_limit(pid: int) -> int:
    with suppress(OSError), open(f"/proc/{pid}/limits", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("Max open files"):
                return int(line.split()[4])
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def _group_limits(pid: int) -> dict[str, str]:
    """Return the limits of a process's cgroup, v1 or v2, that are not "max"."""
    found = {}
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            base = Path("/sys/fs/cgroup", controllers)
            for name in ("memory.max", "pids.max"):
                with suppress(OSError):
                    found[name] = Path(f"{base}/{path}/{name}").read_text().strip()
    return {name: value for name, value in found.items() if value != "max"}


def _unit(name: str) -> dict[str, str]:
    wanted = "--property=LoadState,ActiveState,UnitFileState"
    result = subprocess.run(["systemctl", "show", wanted, name], capture_output=True, text=True, check=False)
    return dict(line.split("=", 1) for line in result.stdout.splitlines() if "=" in line)
