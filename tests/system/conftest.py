"""One running system per test module: registry, containerd, daemon."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.lazysystem import LazySystem, lazy_system


@pytest.fixture(scope="module")
def system(module_workdir: Path) -> Iterator[LazySystem]:
    with lazy_system(module_workdir, {"fuse": {"idle_timeout_sec": 2.0}}) as running:
        yield running
