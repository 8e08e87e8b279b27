"""How large the code is: figures of the source itself, read without running it.

That every function is annotated is not a figure but a rule: `tests/test_code_shape.py` holds it.
"""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

from bench.figures import Figure
from bench.goals import goal
from tests.support import sources
from tests.support.sources import Function

_ROOT = Path(__file__).parent.parent


def figures(root: Path = _ROOT) -> Iterator[Figure]:
    """Yield the figures of the repository at `root`; what is generated does not count."""
    written = [each for name, each in sources.modules(root).items() if not name.startswith(sources.GENERATED)]
    largest = max(written, key=lambda module: module.lines)
    longest = max(
        (
            ((node.end_lineno or 0) - node.lineno + 1, f"{module.name}.{node.name}")
            for module in written
            for node in ast.walk(module.tree)
            if isinstance(node, Function)
        ),
    )
    yield goal("code, median lines of a module").figure(statistics.median(one.lines for one in written))
    yield goal("code, lines of the largest module").figure(largest.lines, module=largest.name)
    yield goal("code, lines of the longest function").figure(longest[0], function=longest[1])
    known = {module.name: module for module in written}
    circles = sources.cycles({name: sources.imports(one, known) for name, one in known.items()})
    yield goal("code, import cycles").figure(len(circles))
    own = sum(one.lines for one in written)
    tests = sum(len(path.read_text().splitlines()) for path in (root / "tests").rglob("*.py"))
    yield goal("code, lines of tests over lines of code").figure(tests / own, code=own, tests=tests)
