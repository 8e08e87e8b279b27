"""What a benchmark says: one figure beside its goal, as one line of JSON, and at the end which goals were missed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number of `unit`.

    `goal` is the limit that `got` should keep, from above or below as `better` says; None for a number that is only
    told. `got` is None when the figure cannot be had here; `detail` then says why under "reason". What else is in
    `detail` (strings, numbers, lists of them) stands on the same line of JSON.
    """

    name: str
    unit: str
    got: float | None
    goal: float | None = None
    better: Literal["less", "more"] = "less"
    detail: Mapping[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without a goal or without a number."""
        if self.goal is None or self.got is None:
            return None
        return self.got <= self.goal if self.better == "less" else self.got >= self.goal

    @property
    def limit(self) -> str:
        """The goal as text, `<= 0.33 x`; empty without one."""
        if self.goal is None:
            return ""
        return f"{'<=' if self.better == 'less' else '>='} {self.goal:g} {self.unit}".rstrip()

    @property
    def rounded(self) -> float | None:
        """What was measured, with four significant digits."""
        return None if self.got is None else float(f"{self.got:.4g}")

    def to_json(self) -> str:
        """Return the line of JSON."""
        line = {
            "figure": self.name,
            "goal": self.limit,
            "got": self.rounded,
            "unit": self.unit,
            "met": self.met,
        }
        return json.dumps(line | dict(self.detail))


def summary(figures: Iterable[Figure]) -> str:
    """Return the last line of JSON: how many figures have a goal, those that missed it with what they got, and the
    names of those that could not be measured."""
    aimed = [figure for figure in figures if figure.goal is not None]
    missed = [
        {"figure": figure.name, "goal": figure.limit, "got": figure.rounded}
        for figure in aimed
        if figure.met is False
    ]
    unmeasured = [figure.name for figure in aimed if figure.met is None]
    return json.dumps({"goals": len(aimed), "missed": missed, "not_measured": unmeasured})
