"""WWW-Authenticate, parsed as RFC 9110 section 11.6.1 has it: several challenges, several headers, quoted strings.

Pure. What cannot be parsed ends the list; what came before it counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_SCHEME: Final = re.compile(rf"[\s,]*({_TOKEN})(?:\s+|\s*(?=,|$))")
_PARAMETER: Final = re.compile(
    rf'[\s,]*({_TOKEN})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|({_TOKEN}))\s*(?=,|$)', re.DOTALL
)
_TOKEN68: Final = re.compile(r"\s*[A-Za-z0-9\-._~+/]+=*\s*(?=,|$)")
_QUOTED_PAIR: Final = re.compile(r"\\(.)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way in that a server offers. Scheme and parameter names are in lower case."""

    scheme: str
    parameters: Mapping[str, str] = field(default_factory=dict, hash=False)


def parse_challenges(headers: Iterable[str]) -> tuple[Challenge, ...]:
    """Return the challenges of every WWW-Authenticate header, in order."""
    return tuple(challenge for header in headers for challenge in _parse(header))


def _parse(header: str) -> list[Challenge]:
    challenges: list[Challenge] = []
    position = 0
    # A scheme is a token that is not followed by "=": that is all that tells it from a parameter.
    while (match := _SCHEME.match(header, position)) is not None:
        position = match.end()
        parameters: dict[str, str] = {}
        while (parameter := _PARAMETER.match(header, position)) is not None:
            name, quoted, plain = parameter.groups()
            parameters[name.lower()] = plain if quoted is None else _QUOTED_PAIR.sub(r"\1", quoted)
            position = parameter.end()
        if not parameters and (opaque := _TOKEN68.match(header, position)) is not None:
            position = opaque.end()
        challenges.append(Challenge(match[1].lower(), parameters))
    return challenges
