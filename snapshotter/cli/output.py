"""How commands print: tables as the field's tools do, ages, JSON for people."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

_GAP = 4


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print columns, left aligned, four spaces between them."""
    lines = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) + _GAP for column in range(len(header))]
    for line in lines:
        print("".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def age(created_at: float) -> str:
    """Return the time since `created_at`, seconds since the epoch: `42s ago`, `3m5s ago`, `26h0m7s ago`."""
    seconds = max(round(time.time() - created_at), 0)
    hours, rest = divmod(seconds, 3600)
    minutes, seconds = divmod(rest, 60)
    text = f"{seconds}s"
    if hours or minutes:
        text = f"{minutes}m{text}"
    if hours:
        text = f"{hours}h{text}"
    return f"{text} ago"


def print_json(value: object) -> None:
    """Print `value` as JSON over several lines."""
    print(json.dumps(value, indent=2, ensure_ascii=False))
