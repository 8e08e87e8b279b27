"""What most tests of the fetcher start from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fetch.rig import Rig
from tests.support.registry import Registry


@pytest.fixture
def rig(tmp_path: Path, registry: Registry) -> Iterator[Rig]:
    """A fetcher in a thread, with its usual options."""
    with Rig(tmp_path, registry) as rig:
        yield rig
