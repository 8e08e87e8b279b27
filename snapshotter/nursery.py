"""A trio nursery whose failure is one exception, as in the rest of the project, and not a group of them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import trio

from snapshotter.errors import SnapshotterError


@contextlib.asynccontextmanager
async def open_nursery() -> AsyncIterator[trio.Nursery]:
    """Open a nursery. Raises the one error that says most of those that end it."""
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        raise first_error(group) from group


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the one error of a group that says most: an interrupt, else one of ours, else the first."""
    leaves: list[BaseException] = []
    pending: list[BaseException] = [group]
    while pending:
        error = pending.pop()
        if isinstance(error, BaseExceptionGroup):
            pending.extend(reversed(error.exceptions))
        else:
            leaves.append(error)
    for kind in (KeyboardInterrupt, SnapshotterError):
        for error in leaves:
            if isinstance(error, kind):
                return error
    # A defect hidden behind a cancellation would never be seen.
    defects = [error for error in leaves if not isinstance(error, trio.Cancelled)]
    return (defects or leaves)[0]
