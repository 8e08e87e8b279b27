"""Why a layer is not lazy, in the words of the metric and of the log. Pure."""

from __future__ import annotations

from typing import Final

import trio

from snapshotter.errors import CorruptData, ProcessFailed, RegistryError, UnsupportedLayer

REASONS: Final = (
    "missing-labels", "not-lazy", "no-index", "index-failed", "no-ztoc", "unsupported-layer", "corrupt-data",
    "registry-failed", "timeout", "process-failed", "mount-failed", "unpack-failed",
    "parallel-mode", "parallel-failed",
)  # fmt: skip


def reason_of(error: BaseException) -> str:
    """Return the word for what came in the way of mounting a layer."""
    for kind, word in (
        (UnsupportedLayer, "unsupported-layer"),
        (CorruptData, "corrupt-data"),
        (RegistryError, "registry-failed"),
        (trio.TooSlowError, "timeout"),
        (ProcessFailed, "process-failed"),
    ):
        if isinstance(error, kind):
            return word
    return "mount-failed"
