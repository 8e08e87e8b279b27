"""What a layer server is told by the keeper, besides its descriptors. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeArguments:
    """Arguments of one layer server; times in seconds."""

    layer: str
    init: str
    idle_timeout: float
    read_budget: float
    getxattr_unsupported: bool
    """Whether a layer without extended attributes says so to the first question, and is not asked again."""

    def to_json(self) -> dict[str, Any]:
        """Return the arguments as the zygote's message carries them."""
        return asdict(self)
