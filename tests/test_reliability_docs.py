"""docs/reliability.md names tests that exist, and commands that do."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/reliability.md").read_text()
_TEST = re.compile(r"`(tests/[a-z_/]+\.py)::(test_[a-z0-9_]+)`")


def test_every_named_test_exists() -> None:
    named = _TEST.findall(TEXT)
    assert len(named) > 30
    for path, name in named:
        functions = {
            node.name
            for node in ast.walk(ast.parse((ROOT / path).read_text()))
            if isinstance(node, ast.FunctionDef)
        }
        assert name in functions, f"{path} has no {name}"


def test_no_test_is_named_in_another_way() -> None:
    assert len(re.findall(r"::test_", TEXT)) == len(_TEST.findall(TEXT))


def test_every_promise_names_a_test() -> None:
    promises = TEXT.partition("## Promises")[2].partition("## Not promised")[0].split("\n### ")[1:]
    assert promises
    assert [each.splitlines()[0] for each in promises if not _TEST.search(each)] == []


def test_every_command_is_a_target_of_make() -> None:
    makefile = (ROOT / "Makefile").read_text()
    commands = set(re.findall(r"`make ([a-z]+)", TEXT))
    assert {"chaos", "fuzz", "leaks", "test"} <= commands
    assert [command for command in commands if f"\n{command}:" not in makefile] == []
