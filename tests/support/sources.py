"""The project's own source as data: modules, what each imports, its functions.

Only the text is read; nothing is imported or run. `root` is a directory that holds the package `snapshotter`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PACKAGE = "snapshotter"
GENERATED = "snapshotter.api."
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One file: its dotted name and its text."""

    name: str
    path: Path

    @cached_property
    def text(self) -> str:
        """The source."""
        return self.path.read_text()

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return ast.parse(self.text)

    @property
    def lines(self) -> int:
        """Number of lines."""
        return len(self.text.splitlines())

    @property
    def is_package(self) -> bool:
        """Whether it is a package's own module."""
        return self.path.name == "__init__.py"

    @property
    def unit(self) -> str:
        """What the architecture calls it: the folder, or the file where there is none."""
        return unit_of(self.name)

    def functions(self) -> Iterator[tuple[str, Function, bool]]:
        """Yield qualified name, function and whether it can be seen from outside, of each but the nested ones."""
        yield from _functions(self.tree.body, f"{self.name}.", public=True)


def unit_of(name: str) -> str:
    """Return the folder (or file) directly below the package that holds the module `name`; "" for the package."""
    return name.split(".")[1] if "." in name else ""


def _functions(
    body: Iterable[ast.stmt], prefix: str, *, public: bool
) -> Iterator[tuple[str, Function, bool]]:
    for node in body:
        if isinstance(node, Function):
            yield prefix + node.name, node, public and not node.name.startswith("_")
        elif isinstance(node, ast.ClassDef):
            visible = public and not node.name.startswith("_")
            yield from _functions(node.body, f"{prefix}{node.name}.", public=visible)
        elif isinstance(node, ast.If | ast.Try | ast.With):
            inner = (child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt))
            yield from _functions(inner, prefix, public=public)


def modules(root: Path) -> dict[str, Module]:
    """Return every module of the package below `root`, by name."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = Module(name, path)
    return found


def imports(module: Module, known: Mapping[str, Module]) -> dict[str, int]:
    """Return what `module` imports, wherever in it, as dotted names with the line.

    Own modules come by the name of the module, also when only a name in it was asked for.
    """
    found: dict[str, int] = {}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, node)
            children = [f"{base}.{alias.name}" for alias in node.names]
            own = [child for child in children if child in known]
            names = own + [base] * (len(own) < len(children))
        else:
            continue
        for name in names:
            found.setdefault(name, node.lineno)
    return found


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    parts = module.name.split(".")
    parts = parts[: len(parts) - node.level + module.is_package]
    return ".".join([*parts, *([node.module] if node.module else [])])


def is_standard(name: str) -> bool:
    """Tell whether a dotted name belongs to the standard library."""
    return name.split(".", maxsplit=1)[0] in sys.stdlib_module_names


def cycles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Return the groups of nodes that reach each other, each sorted; empty when `graph` has no cycle."""
    groups: list[list[str]] = []
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in graph.get(node, ()):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1 or node in graph.get(node, ()):
                groups.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return groups
