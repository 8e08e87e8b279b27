"""The environment of our own child processes: what they need to run, and nothing that the daemon alone may know.

Credential helpers and proxies are told their secrets by environment variables of the daemon. A process that
handles foreign bytes must not have them in its memory, so children get the variables listed here, not all but some.

Pure.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

_HARMLESS = re.compile(
    "PATH|LANG|LANGUAGE|LC_.*|TZ|TZDIR|LD_LIBRARY_PATH|PYTHON.*|VIRTUAL_ENV"
    "|JOURNAL_STREAM"  # logs.py finds the journal by it
    "|COVERAGE_.*|SNAPSHOTTER_.*"  # by which whoever watches our processes knows them
)

_NETWORK = re.compile("SSL_CERT_FILE|SSL_CERT_DIR|(https?|all|no)_proxy", re.IGNORECASE)
"""A proxy's address may hold a password: for those only that use the proxy."""


def child_environment(environ: Mapping[str, str] = os.environ, *, network: bool = False) -> dict[str, str]:
    """Return what a child may have of `environ`; with `network`, one that fetches."""
    return {
        name: value
        for name, value in environ.items()
        if _HARMLESS.fullmatch(name) or (network and _NETWORK.fullmatch(name))
    }
