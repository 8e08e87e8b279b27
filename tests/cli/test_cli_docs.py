"""docs/indexing.md names every command and flag that there is, and no other."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from snapshotter.cli.main import build_parser

DOCUMENT = Path(__file__).parents[2] / "docs/indexing.md"
_FLAG = re.compile(r"--[a-z][a-z-]+")
FOREIGN = {
    "--output",
    "--soci-span-size",
    "--soci-min-layer-size",
    "--soci",
    "--all",
    "--rm",
    "--quiet",
    "--snapshotter",
}
"""Of other programs' commands in the text, where they are not ours, too."""


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from parsers(child)


def flags() -> set[str]:
    found = {
        flag for one in parsers(build_parser()) for action in one._actions for flag in action.option_strings
    }
    return {flag for flag in found if flag.startswith("--")}


def test_every_flag_is_there_and_no_other() -> None:
    named = set(_FLAG.findall(DOCUMENT.read_text()))
    assert flags() <= named
    assert named - FOREIGN <= flags()


def test_every_command_is_there() -> None:
    text = DOCUMENT.read_text()
    for parser in parsers(build_parser()):
        name = parser.prog.removeprefix("soci").strip()
        assert name.split(" ")[-1] in text


def test_no_row_of_the_table_is_without_our_side() -> None:
    rows = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    assert len(rows) > 40
    assert all(row.rstrip(" |").count("|") >= 1 and row.split("|")[-2].strip() for row in rows)
