"""A cold start as a picture: one HTML page with one SVG in it, no script, nothing from elsewhere.

Time goes to the right; each layer has a row of five lanes. Hovering over a bar tells what it is.

Concurrency: none; a value in, text out.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from html import escape

from snapshotter.cli.timeline import Bar, Start

_WIDTH = 1200
_MARGIN = 190
_LANE = 7
_GAP = 10
_TOP = 46
_MIN_WIDTH = 0.6
"""A bar never gets thinner, however short it was: what happened is to be seen."""

_LANES = (
    ("steps", {"index", "ztoc", "compile", "source", "mount", "provide", "unpack"}),
    ("waits", {"wait", "wait_failed"}),
    ("on demand", {"on_demand"}),
    ("ahead", {"ahead"}),
    ("background", {"background"}),
)
_COLOURS = {
    "index": "#8250df", "ztoc": "#a475f9", "compile": "#bf3989", "source": "#6e7781", "mount": "#1f883d",
    "provide": "#d0ebd5", "unpack": "#bc4c00", "wait": "#cf222e", "wait_failed": "#000000",
    "on_demand": "#0969da", "ahead": "#54aeff", "background": "#b6bec6",
}  # fmt: skip

_LEGEND = {
    "provide": "layer made lazy", "index": "index", "ztoc": "zTOC", "compile": "compile", "source": "source",
    "mount": "mount", "unpack": "unpacked", "wait": "a reader waits", "on_demand": "range on demand",
    "ahead": "read ahead", "background": "background",
}  # fmt: skip


_STYLE = (
    f"body{{font:14px sans-serif;margin:24px;max-width:{_WIDTH}px}}text{{font:11px sans-serif}}"
    ".k{display:inline-block;width:11px;height:11px;margin:0 4px 0 12px}rect:hover{stroke:#000}"
)


def render(start: Start, verdict: str) -> str:
    """Return the page."""
    rows = start.layers
    height = _TOP + len(rows) * (_LANE * len(_LANES) + _GAP) + 10
    title = ", ".join(start.images) or "cold start"
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start.began))
    return "\n".join(
        [
            "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
            f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1><p>{when}, {start.seconds:.2f} s</p><p>{escape(verdict)}</p>",
            "<p>" + "".join(_key(kind, name) for kind, name in _LEGEND.items()) + "</p>",
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {height}' width='{_WIDTH}' height='{height}'>",
            *_axis(start.seconds, height),
            *(part for row, layer in enumerate(rows) for part in _row(start, row, layer)),
            "</svg></body></html>\n",
        ]
    )


def _key(kind: str, name: str) -> str:
    return f"<span class='k' style='background:{_COLOURS[kind]}'></span>{name}"


def _axis(seconds: float, height: int) -> Iterable[str]:
    step = next((s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300) if seconds / s <= 15), 600)
    for number in range(int(seconds / step) + 1):
        x = _x(number * step, seconds)
        yield f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{_TOP - 14}' y2='{height}' stroke='#d0d7de'/>"
        yield f"<text x='{x + 2:.1f}' y='{_TOP - 18}'>{number * step:g} s</text>"


def _row(start: Start, row: int, layer: str) -> Iterable[str]:
    top = _TOP + row * (_LANE * len(_LANES) + _GAP)
    yield f"<text x='0' y='{top + 12}'>{escape(layer[:25])}</text>"
    bars = [bar for bar in (*start.steps, *start.waits, *start.ranges) if bar.layer == layer]
    moved = sum(bar.size for bar in bars)
    if moved:
        yield f"<text x='0' y='{top + 26}' fill='#59636e'>{moved / 1e6:.1f} MB</text>"
    for lane, (_name, kinds) in enumerate(_LANES):
        inside = [bar for bar in bars if bar.kind in kinds]
        # What lasts longest goes below: a step of a step is to be seen.
        for bar in sorted(inside, key=lambda each: -each.seconds):
            yield _bar(bar, top + lane * _LANE, start.seconds)


def _bar(bar: Bar, y: int, seconds: float) -> str:
    begin, end = max(bar.start, 0.0), min(bar.end, seconds)
    x = _x(begin, seconds)
    width = max(_x(end, seconds) - x, _MIN_WIDTH)
    size = f", {bar.size / 1e6:.2f} MB" if bar.size else ""
    failed = " (failed)" if bar.failed else ""
    tip = f"{_LEGEND.get(bar.kind, bar.kind)}: {bar.text}, {bar.seconds * 1000:.1f} ms at {bar.start:.3f} s{size}{failed}"
    return (
        f"<rect x='{x:.2f}' y='{y}' width='{width:.2f}' height='{_LANE - 1}' fill='{_COLOURS[bar.kind]}'>"
        f"<title>{escape(tip)}</title></rect>"
    )


def _x(moment: float, seconds: float) -> float:
    return _MARGIN + (_WIDTH - _MARGIN - 10) * moment / max(seconds, 1e-9)
