"""What goes wrong and when: a list of faults from a seed, the same for the same seed.

Three kinds: the end of processes (`Kill`), a registry that misbehaves (`Misbehave`) and a link that does
(`Disturb`). A fault of registry or link either passes, and then no reader may see an error, or is `final`: the
registry says something that no patience can help, and then an error is what the policy promises, as long as the fault is
there.

Pure.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tests.support.netem import Link
from tests.support.registry import (
    Drop,
    ExpireToken,
    ExpireUrl,
    Fault,
    FlipByte,
    IgnoreRange,
    Redirect,
    Slow,
    Stall,
    Status,
    Truncate,
    WrongRange,
)

ROLES = ("layer", "fetcher", "zygote", "daemon", "holder", "all")

_KILLS = 8
"""Of each role in a round. Ten minutes have 20 rounds on a machine with two cores of its own: more than 100 of each."""

_BYTES = "/blobs/|/storage/"
_STORAGE = "/storage/"


class Kill(NamedTuple):
    """kill -9 of a role; "all" is every process at once."""

    role: str


class Misbehave(NamedTuple):
    """A fault of the registry. Makers, because an armed fault counts."""

    name: str
    make: Callable[[], Fault]
    final: bool = False


class Disturb(NamedTuple):
    """Another link for some seconds."""

    name: str
    link: Link
    seconds: float


class Step(NamedTuple):
    """Wait so long, then do that."""

    pause: float
    action: Kill | Misbehave | Disturb


PASSING = (
    Misbehave("503", lambda: Status(path=_BYTES, status=503, count=3)),
    Misbehave("429", lambda: Status(path=_BYTES, status=429, headers={"Retry-After": "1"}, count=2)),
    Misbehave("reset", lambda: Drop(path=_BYTES, count=3)),
    Misbehave("closed", lambda: Drop(path=_BYTES, politely=True, count=3)),
    Misbehave("stall", lambda: Stall(path=_STORAGE, seconds=2.0)),
    Misbehave("stall in body", lambda: Stall(path=_STORAGE, seconds=2.0, after=3000)),
    Misbehave("slow", lambda: Slow(path=_STORAGE, rate=60_000, count=2)),
    Misbehave("truncated", lambda: Truncate(path=_STORAGE, after=1000, count=2)),
    Misbehave("empty", lambda: Truncate(path=_STORAGE, after=0, count=2)),
    Misbehave("corrupt", lambda: FlipByte(path=_STORAGE, at=50)),
    Misbehave("expired URL", lambda: ExpireUrl(path=_STORAGE)),
    Misbehave("expired session", lambda: ExpireUrl(path=_STORAGE, session=True)),
    Misbehave("expired token", lambda: ExpireToken(path="/v2/.*/blobs/")),
    Misbehave("token server down", lambda: Status(path="/token", status=503, count=2)),
    Misbehave("DNS", lambda: Redirect(path="/v2/.*/blobs/", to="https://storage.invalid/blob", count=1)),
)

FINAL = (
    Misbehave("200 for 206", lambda: IgnoreRange(path=_STORAGE), final=True),
    Misbehave("wrong range", lambda: WrongRange(path=_STORAGE), final=True),
    Misbehave("corrupt for good", lambda: FlipByte(path=_STORAGE, at=60, count=6), final=True),
    Misbehave("redirect loop", lambda: Redirect(path="/v2/.*/blobs/", count=2), final=True),
    Misbehave("not found", lambda: Status(path=_STORAGE, status=404), final=True),
)

LINKS = (
    Disturb("loss", Link(loss=0.1), 1.5),
    Disturb("delay", Link(delay=0.1), 1.5),
    Disturb("partition", Link(cut=True), 1.5),
    Disturb("narrow", Link(rate=200_000.0), 1.5),
)


def schedule(seed: int, *, pause: float) -> Iterator[Step]:
    """Yield steps for ever, `pause` seconds apart on the average; in each round everything has its turn once or more."""
    source = random.Random(seed)
    while True:
        actions: list[Kill | Misbehave | Disturb] = [Kill(role) for role in ROLES * _KILLS]
        actions += source.sample(PASSING, 5)
        actions += [source.choice(FINAL), source.choice(LINKS)]
        source.shuffle(actions)
        for action in actions:
            yield Step(source.uniform(0.0, 2 * pause), action)
