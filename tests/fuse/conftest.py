"""Both ways in which unanswered requests survive their server."""

from __future__ import annotations

import pytest

from snapshotter.fuse import kernel
from tests.support import oldkernel


@pytest.fixture(params=["resend", "relay"])
def recovery(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How requests are recovered: this kernel sends them again, or a journal keeps them as for older ones."""
    if request.param == "relay":
        monkeypatch.setattr(kernel, "parse_init", oldkernel.parse_init)
    return str(request.param)
