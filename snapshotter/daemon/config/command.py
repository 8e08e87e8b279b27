"""`soci-snapshotter-grpc config default|dump|check`."""

from __future__ import annotations

import sys
from pathlib import Path

from snapshotter.daemon.config.loading import DEFAULT_PATH, load
from snapshotter.daemon.config.writing import default_text, dump
from snapshotter.errors import ConfigError, UsageError

ACTIONS = ("default", "dump", "check")
EXIT_CONFIG = 78
"""EX_CONFIG of sysexits.h: what the daemon exits with for the same mistakes."""


def run_config_command(action: str, path: Path | None) -> int:
    """Write to stdout what is asked; return the exit code.

    default: the documented defaults. dump: what the file at `path` (None: the usual one, if there is one)
    comes to, defaults included. check: every mistake of that file, one a line. Warnings, and the mistakes that
    keep dump from working, go to stderr. Raises UsageError for another action.
    """
    if action not in ACTIONS:
        raise UsageError(f"config: must be followed by one of {', '.join(ACTIONS)}, got {action!r}")
    if action == "default":
        sys.stdout.write(default_text())
        return 0
    try:
        loaded = load(path, explicit=path is not None and path != DEFAULT_PATH)
    except ConfigError as error:
        print(error, file=sys.stdout if action == "check" else sys.stderr)
        return EXIT_CONFIG
    for warning in loaded.warnings:
        print(warning, file=sys.stderr)
    if action == "dump":
        sys.stdout.write(dump(loaded.config))
    return 0
