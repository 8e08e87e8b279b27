"""The last cold start out of what the daemon remembers, and what is to be said about it.

A start is a burst: steps of the daemon and waits of readers with no pause of more than `QUIET_S` between them.
Ranges of the background belong to it as far as they overlap with it.

Concurrency: none; values in, values out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from snapshotter.errors import NotFound, UsageError
from snapshotter.reports import TRACE_FORMAT

QUIET_S = 10.0
"""A pause after which another start begins. A program that starts is hardly ever silent for so long."""


class Bar(NamedTuple):
    """Something that took time: seconds since the start's begin. `layer` is a digest, or that of a manifest."""

    kind: str
    layer: str
    start: float
    seconds: float
    text: str
    size: int = 0
    failed: bool = False

    @property
    def end(self) -> float:
        """Seconds since the start's begin."""
        return self.start + self.seconds


@dataclass(frozen=True, slots=True)
class Start:
    """One cold start."""

    began: float
    """Seconds since the epoch."""
    seconds: float
    images: tuple[str, ...]
    steps: tuple[Bar, ...]
    waits: tuple[Bar, ...]
    ranges: tuple[Bar, ...]

    @property
    def layers(self) -> list[str]:
        """The layers, in the order in which something happened to them."""
        return list(
            dict.fromkeys(bar.layer for bar in sorted((*self.steps, *self.waits, *self.ranges), key=_start))
        )


def find_start(report: Mapping[str, Any], *, image: str = "") -> Start:
    """Return the last start of which the daemon's `report` tells, or the last one of an image.

    Raises NotFound when there was none, UsageError for a report of another version.
    """
    if report.get("format") != TRACE_FORMAT:
        raise UsageError("the daemon tells in another version; use the soci that came with it")
    layers = report["layers"]
    wanted = {
        short for short, each in layers.items() if not image or any(_is(image, ref) for ref in each["images"])
    }
    if image and not wanted:
        raise NotFound(f"no lazy layer of {image} is mounted; `ctr images ls` has the names of images")
    about = {layers[short]["digest"] for short in wanted}
    about |= {manifest for short in wanted for manifest in layers[short]["manifests"]}
    steps = [_step(each) for each in report["steps"] if not image or each["about"] in about]
    events = [_event(each, layers) for each in report["events"] if not image or each["layer"] in wanted]
    waits = [bar for bar in events if bar.kind.startswith("wait")]
    burst = _last_burst([*steps, *waits])
    if not burst:
        raise NotFound("nothing was pulled or read lazily since the daemon's start")
    zero = min(bar.start for bar in burst)
    end = max(bar.end for bar in burst)
    chosen = set(burst)
    seen = [bar for bar in events if not bar.kind.startswith("wait") and bar.end > zero and bar.start < end]
    shorts = {each["digest"]: short for short, each in layers.items()}
    images = {ref for bar in burst if bar.layer in shorts for ref in layers[shorts[bar.layer]]["images"]}
    return Start(
        began=report["wall"] - report["now"] + zero,
        seconds=end - zero,
        images=tuple(sorted(images)),
        steps=_shifted((bar for bar in steps if bar in chosen), zero),
        waits=_shifted((bar for bar in waits if bar in chosen), zero),
        ranges=_shifted(seen, zero),
    )


def verdict(start: Start) -> str:
    """Return one paragraph: how long what took, and what to look at."""
    waited = covered(start.waits)
    total = max(start.seconds, 1e-9)
    mounts = [bar for bar in start.steps if bar.kind == "provide"]
    text = [f"{len(mounts)} layers became lazy" + (f" in {covered(mounts):.2f} s" if mounts else "")]
    slow = Counter({kind: covered([bar for bar in start.steps if bar.kind == kind]) for kind in _PARTS})
    parts = [f"{_PARTS[kind]} {seconds:.2f} s" for kind, seconds in slow.most_common(3) if seconds >= 0.01]
    text[0] += f" ({', '.join(parts)})." if parts else "."
    unpacked = [bar for bar in start.steps if bar.kind == "unpack"]
    if unpacked:
        text.append(f"{len(unpacked)} layers were not lazy and took {covered(unpacked):.2f} s.")
    text.append(
        f"Then readers waited {len(start.waits)} times, {waited:.2f} s of the {start.seconds:.2f} s"
        f" ({100 * waited / total:.0f} %)" + _longest(start.waits) + "."
    )
    for kind, name in (
        ("on_demand", "on demand"),
        ("ahead", "read ahead"),
        ("background", "in the background"),
    ):
        ranges = [bar for bar in start.ranges if bar.kind == kind]
        if ranges:
            text.append(
                f"{len(ranges)} ranges {name} brought {sum(bar.size for bar in ranges) / 1e6:.1f} MB."
            )
    failed = sum(bar.failed for bar in (*start.steps, *start.waits))
    if failed:
        text.append(f"{failed} of all this failed: see the daemon's log.")
    text.append(_advice(start, waited / total))
    return " ".join(text)


def covered(bars: Iterable[Bar]) -> float:
    """Return for how many seconds at least one of the bars was under way."""
    total, until = 0.0, float("-inf")
    for bar in sorted(bars, key=_start):
        total += max(0.0, bar.end - max(bar.start, until))
        until = max(until, bar.end)
    return total


_PARTS = {
    "index": "finding the index",
    "ztoc": "fetching zTOCs",
    "compile": "compiling them",
    "source": "finding the blobs",
}


def _advice(start: Start, share: float) -> str:
    mounting = covered(bar for bar in start.steps if bar.kind in {"provide", "unpack", "index"})
    if mounting > start.seconds / 2:
        return (
            "Most of the time went before the first read: the registry's answers, or layers without a zTOC."
        )
    if share > 0.5:
        demand = [bar for bar in start.ranges if bar.kind == "on_demand"]
        rate = sum(bar.size for bar in demand) / max(covered(demand), 1e-9) / 1e6
        return (
            f"Most of the time went into waiting for spans, which came with {rate:.0f} MB/s while they were fetched: "
            "a faster link, or prefetching what the program reads (`soci create --prefetch-file`), would shorten it."
        )
    return "Most of the time nobody waited for data: it went into the program itself."


def _longest(waits: Sequence[Bar]) -> str:
    if not waits:
        return ""
    longest = max(waits, key=lambda bar: bar.seconds)
    return f"; the longest wait was {longest.seconds:.2f} s for {longest.text} of {longest.layer[:19]}"


def _last_burst(bars: Sequence[Bar]) -> list[Bar]:
    """Return the bars after the last pause."""
    burst: list[Bar] = []
    end = float("-inf")
    for bar in sorted(bars, key=_start):
        if bar.start - end > QUIET_S:
            burst = []
        burst.append(bar)
        end = max(end, bar.end)
    return burst


def _step(each: Mapping[str, Any]) -> Bar:
    return Bar(
        each["phase"], each["about"], each["start"], each["seconds"], each["phase"], failed=each["failed"]
    )


def _event(each: Mapping[str, Any], layers: Mapping[str, Any]) -> Bar:
    short = each["layer"]
    layer = layers[short]["digest"] if short in layers else f"sha256:{short}"
    first, count = each["span"], each["spans"]
    text = f"span {first}" if count == 1 else f"spans {first} to {first + count - 1}"
    failed = each["kind"] == "wait_failed"
    return Bar(each["kind"], layer, each["start"], each["seconds"], text, each["bytes"], failed)


def _shifted(bars: Iterable[Bar], zero: float) -> tuple[Bar, ...]:
    return tuple(bar._replace(start=bar.start - zero) for bar in sorted(bars, key=_start))


def _start(bar: Bar) -> float:
    return bar.start


def _is(wanted: str, reference: str) -> bool:
    """Tell whether a user means `reference`, which has a digest at its end, by `wanted`."""
    return reference == wanted or reference.partition("@")[0] == wanted.partition("@")[0]
