"""containerd: whether it is new enough, and what its configuration says of us.

Stateless; runs `containerd` and `ctr`, and reads what they print.
"""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

from snapshotter.daemon.install.finding import Finding, ok, problem, warning

_OLDEST = (1, 4)
_KUBELET = (1, 7, 16)
"""Before this one kubelet counts the disk of a snapshotter's images wrongly."""

_DROP_IN = (
    'imports = ["/etc/containerd/conf.d/*.toml"] in /etc/containerd/config.toml, and soci-snapshotter.toml in '
    "/etc/containerd/conf.d; then systemctl restart containerd"
)

Table = Mapping[str, Any]


def check_containerd(address: str, root: str) -> Iterator[Finding]:
    """Gather the facts and judge them; `address` and `root` are the daemon's."""
    text = _output("containerd", "--version")
    yield version(text)
    if text is None:
        return
    dumped = _output("containerd", "config", "dump")
    try:
        settings = tomllib.loads(dumped or "")
    except tomllib.TOMLDecodeError:
        settings = {}
    if not settings:
        yield problem("containerd config", "containerd cannot read it", "containerd config dump says why")
        return
    name, found = plugin(settings, address, root)
    yield from found
    if name:
        yield from cri(settings, name)
        yield loaded(_output("ctr", "plugins", "list"), name)


def version(text: str | None) -> Finding:
    """Judge what `containerd --version` prints; None when there is no such program."""
    numbers = re.search(r"(?<![\d.])(\d+)\.(\d+)\.(\d+)", text or "")
    if numbers is None:
        return problem("containerd", "there is none in PATH", "install containerd 1.6 or newer")
    found = tuple(map(int, numbers.groups()))
    if found < _OLDEST:
        return problem("containerd", f"{numbers[0]} is too old", "install containerd 1.6 or newer")
    if found < _KUBELET:
        return warning(
            "containerd",
            f"{numbers[0]}: kubelet counts the disk of images wrongly before 1.7.16",
            "update containerd if this is a Kubernetes node",
        )
    return ok("containerd", numbers[0])


def plugin(settings: Table, address: str, root: str) -> tuple[str, list[Finding]]:
    """Find the proxy plugin that leads to `address`; return its name ("" when there is none) and the judgement."""
    check = "proxy plugin"
    for name, entry in settings.get("proxy_plugins", {}).items():
        if os.path.normpath(entry.get("address", "").removeprefix("unix://")) != address:
            continue
        if entry.get("type") != "snapshot":
            return "", [problem(check, f"{name} is of type {entry.get('type')!r}", 'type = "snapshot"')]
        said = entry.get("exports", {}).get("root", root)  # which 1.6 does not dump
        if os.path.normpath(said) != root:
            mend = f'[proxy_plugins.{name}.exports] root = "{root}"'
            return name, [warning(check, f"{name} exports root {said!r}: kubelet counts another disk", mend)]
        return name, [ok(check, f"{name} at {address}")]
    return "", [problem(check, f"containerd's configuration names none at {address}", _DROP_IN)]


def cri(settings: Table, name: str) -> Iterator[Finding]:
    """Judge the two keys that Kubernetes needs, where the CRI plugin is not switched off."""
    disabled = settings.get("disabled_plugins") or []
    tables = {
        "io.containerd.grpc.v1.cri": ("containerd",),
        "io.containerd.cri.v1.images": (),
    }
    for table, below in tables.items():
        entry = settings.get("plugins", {}).get(table)
        if entry is None or table in disabled:
            continue
        for key in below:
            entry = entry.get(key, {})
        if "snapshotter" not in entry:
            continue
        place = ".".join([f'[plugins."{table}"', *below]) + "]"
        if entry.get("disable_snapshot_annotations", True):
            mend = f"{place} disable_snapshot_annotations = false"
            yield warning("CRI annotations", "off: images of pods are pulled in full", mend)
        else:
            yield ok("CRI annotations", "on")
        if entry["snapshotter"] != name:
            mend = f'{place} snapshotter = "{name}"'
            yield warning("CRI snapshotter", f"{entry['snapshotter']}: pods do not use this one", mend)
        else:
            yield ok("CRI snapshotter", name)


def loaded(listing: str | None, name: str) -> Finding:
    """Judge what `ctr plugins list` prints; None when containerd does not answer."""
    check = "containerd runs"
    if listing is None:
        return problem(check, "it does not answer", "systemctl start containerd")
    for fields in map(str.split, listing.splitlines()):
        if fields[:2] == ["io.containerd.snapshotter.v1", name]:
            if fields[-1] == "ok":
                return ok(check, f"with the plugin {name}")
            return problem(
                check, f"the plugin {name} is in state {fields[-1]}", "systemctl restart containerd"
            )
    return problem(check, f"without the plugin {name}", "systemctl restart containerd")


def _output(*command: str) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None
