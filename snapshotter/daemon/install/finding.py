"""What one check says, and how all of it is shown. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"
    """It works, with a drawback that the text names."""
    PROBLEM = "problem"
    """Images will not be lazy, or not safely."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report; `mend` says what to do, and is empty where all is well."""

    check: str
    level: Level
    text: str
    mend: str = ""


def ok(check: str, text: str) -> Finding:
    """Return a finding that needs nothing."""
    return Finding(check, Level.OK, text)


def warning(check: str, text: str, mend: str) -> Finding:
    """Return a finding of something that could be better."""
    return Finding(check, Level.WARNING, text, mend)


def problem(check: str, text: str, mend: str) -> Finding:
    """Return a finding of something that has to be mended."""
    return Finding(check, Level.PROBLEM, text, mend)


def is_good(findings: Sequence[Finding]) -> bool:
    """Tell whether nothing has to be mended."""
    return all(each.level is not Level.PROBLEM for each in findings)


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the report for programs."""
    return {"ok": is_good(findings), "findings": [asdict(each) for each in findings]}


def render(findings: Sequence[Finding]) -> str:
    """Return the report for people."""
    lines = []
    for each in findings:
        lines.append(f"{each.level.upper():8} {each.check:18} {each.text}")
        if each.mend:
            lines.append(f"{'':27} -> {each.mend}")
    return "\n".join(lines)
