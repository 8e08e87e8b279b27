"""A forker that runs beside a test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from snapshotter.fuse.forker import Forker
from tests.support.background import background


@asynccontextmanager
async def forking(root: Path, *, inherited_fds: Sequence[int] = ()) -> AsyncIterator[Forker]:
    """Run a forker whose zygote has its empty root below `root`; what its children log is not shown."""
    forker = Forker(str(root / "empty"), inherited_fds=inherited_fds, log_level="fatal")
    async with background() as nursery:
        nursery.start_soon(forker.run)
        yield forker
