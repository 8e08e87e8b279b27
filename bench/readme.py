"""The README's table of goals, made of figures: between two markers, and nothing else of the file is touched."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from bench.figures import Figure
from bench.goals import GOALS, Goal

README = Path(__file__).parent.parent / "README.md"
BEGIN = "<!-- made by `python -m bench --readme`: begin -->"
END = "<!-- made by `python -m bench --readme`: end -->"
HEAD = ("| figure | goal | measured |", "|---|---|---|")


def table(figures: Iterable[Figure]) -> str:
    """Return the table: a row for each goal, in their order, with what was measured for it."""
    by_name = {figure.name: figure for figure in figures}
    return "\n".join([*HEAD, *(row(goal, by_name.get(goal.name)) for goal in GOALS)])


def row(goal: Goal, figure: Figure | None) -> str:
    """Return one row; a figure that missed its goal is bold, one that is missing a dash."""
    got = "-"
    if figure is not None and figure.got is not None:
        got = f"{figure.got:.3g} {goal.unit}".rstrip()
        if figure.met is False:
            got = f"**{got}**"
    return f"| {goal.name} | {goal.figure(None).limit} | {got} |"


def write(figures: Iterable[Figure], path: Path = README) -> None:
    """Replace the table in `path`. Raises ValueError when a marker is missing."""
    text = path.read_text()
    before, after = text.index(BEGIN) + len(BEGIN), text.index(END)
    path.write_text(f"{text[:before]}\n{table(figures)}\n{text[after:]}")
