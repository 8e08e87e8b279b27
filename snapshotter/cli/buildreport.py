"""What `create` and `convert` say about their work: lines as it goes on, or one JSON document at the end.

Concurrency: as `TerminalProgress`; the document is for the command's thread.
"""

from __future__ import annotations

import argparse
import sys
from types import TracebackType
from typing import Any, Self

from snapshotter.cli.output import print_json
from snapshotter.cli.progress import TerminalProgress
from snapshotter.oci.descriptor import Platform
from snapshotter.soci.create import CreatedIndex, LayerOutcome


class BuildReport:
    """Use as a context manager: the document is printed when the block ends without an error."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.is_json: bool = arguments.json
        self.progress = TerminalProgress()
        self._document: dict[str, Any] = {"indices": []}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.close()
        if self.is_json and kind is None:
            print_json(self._document)

    def layer(self, outcome: LayerOutcome) -> None:
        """One layer is finished."""
        if not self.is_json:
            self.progress.print(str(outcome))

    def line(self, text: str, **members: Any) -> None:
        """Say `text`, or add `members` to the document."""
        self._document |= members
        if not self.is_json:
            self.progress.print(text)

    def index(self, platform: Platform, created: CreatedIndex) -> None:
        """One platform is finished."""
        if not self.is_json:
            for layer, artifact in created.index.prefetch:
                self.progress.print(f"Created prefetch artifact for layer {layer}: {artifact.digest}")
        for pattern in created.unmatched:
            print(f"[WARN] prefetch {pattern}: no such file in an indexed layer", file=sys.stderr)
        self._document["indices"].append(
            {
                "platform": str(platform),
                "digest": created.index.digest,
                "size": len(created.index.data),
                "layers": [_layer(outcome) for outcome in created.layers],
                "prefetch": [
                    {"layer": layer, "digest": artifact.digest} for layer, artifact in created.index.prefetch
                ],
                "unmatched_prefetch": list(created.unmatched),
            }
        )


def _layer(outcome: LayerOutcome) -> dict[str, Any]:
    members: dict[str, Any] = {
        "digest": outcome.layer.digest,
        "size": outcome.layer.size,
        "media_type": outcome.layer.media_type,
    }
    if outcome.ztoc is None:
        return members | {"skipped": outcome.skipped}
    ztoc = {"digest": outcome.ztoc.ztoc, "size": outcome.ztoc.ztoc_size, "reused": outcome.reused}
    return members | {"ztoc": ztoc}
