"""All checks in order. Stateless."""

from __future__ import annotations

import json
import os

from snapshotter.daemon.config import DEFAULT_ADDRESS, Settings
from snapshotter.daemon.install.finding import Finding, as_json, is_good, ok, problem, render
from snapshotter.daemon.install.host import check_host
from snapshotter.daemon.install.reference import check_reference
from snapshotter.daemon.install.runtime import check_containerd
from snapshotter.errors import ConfigError


def install_check(settings: Settings, *, as_object: bool) -> int:
    """Print the report, as one JSON object or for people; return 0 when nothing has to be mended, otherwise 1."""
    findings = list(_findings(settings))
    print(json.dumps(as_json(findings)) if as_object else render(findings))
    return 0 if is_good(findings) else 1


def _findings(settings: Settings) -> list[Finding]:
    if os.geteuid() != 0:
        return [problem("root", "this is not root, as the daemon has to be", "run it by sudo")]
    address = settings.address.path or DEFAULT_ADDRESS
    return [
        *check_host(settings.root),
        configuration(settings),
        *check_containerd(str(address), str(settings.root)),
        *check_reference(settings.root),
    ]


def configuration(settings: Settings) -> Finding:
    """Judge the configuration file."""
    try:
        loaded = settings.load()
    except ConfigError as error:
        first = str(error).splitlines()[0]
        return problem("configuration", first, "`config check` names every mistake")
    count = len(loaded.warnings)
    return ok("configuration", f"{settings.config_path}: {count} warnings, see `config check`")
