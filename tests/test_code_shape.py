"""How large, how annotated and how documented the code is, held by a test instead of by intent."""

import ast
import statistics
from pathlib import Path

import pytest

from tests.support import sources
from tests.support.sources import Function, Module

ROOT = Path(__file__).parent.parent
MODULE_LINES = 450
FUNCTION_LINES = 60
TYPED_BY_PLACE = {"self", "cls"}


@pytest.fixture(scope="module")
def written() -> list[Module]:
    """Every module but the generated ones."""
    return [
        module for name, module in sources.modules(ROOT).items() if not name.startswith(sources.GENERATED)
    ]


def length(function: Function) -> int:
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def unannotated(function: Function) -> list[str]:
    spec = function.args
    arguments = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *filter(None, (spec.vararg, spec.kwarg))]
    missing = [one.arg for one in arguments if one.annotation is None and one.arg not in TYPED_BY_PLACE]
    return missing + (["its result"] if function.returns is None else [])


def test_no_module_is_longer_than_a_reader_can_hold(written: list[Module]) -> None:
    assert [(module.name, module.lines) for module in written if module.lines > MODULE_LINES] == []


def test_no_function_is_longer_than_a_screen(written: list[Module]) -> None:
    every = [
        (module.name, node.name, length(node))
        for module in written
        for node in ast.walk(module.tree)
        if isinstance(node, Function)
    ]
    assert [one for one in every if one[2] > FUNCTION_LINES] == []


def test_every_function_is_annotated(written: list[Module]) -> None:
    wrong = {
        f"{module.name}:{node.lineno} {node.name}": missing
        for module in written
        for node in ast.walk(module.tree)
        if isinstance(node, Function) and (missing := unannotated(node))
    }
    assert wrong == {}


def test_every_public_thing_is_documented(written: list[Module]) -> None:
    wrong = [module.name for module in written if ast.get_docstring(module.tree) is None]
    for module in written:
        wrong += [
            name
            for name, function, public in module.functions()
            if public and ast.get_docstring(function) is None and not overridden(function)
        ]
        wrong += [
            f"{module.name}.{node.name}"
            for node in module.tree.body
            if isinstance(node, ast.ClassDef)
            and not node.name.startswith("_")
            and ast.get_docstring(node) is None
        ]
    assert wrong == []


def overridden(function: Function) -> bool:
    """Tell whether the contract stands elsewhere: an override, an overload, a property's setter."""
    names = {ast.unparse(decorator).split(".")[-1] for decorator in function.decorator_list}
    return bool(names & {"override", "overload", "setter"})


def test_the_medians_are_worth_a_look(written: list[Module], capsys: pytest.CaptureFixture[str]) -> None:
    modules = [module.lines for module in written if module.lines > 5]
    functions = [length(function) for module in written for _, function, _ in module.functions()]
    with capsys.disabled():
        print(
            f"\n{len(modules)} modules, median {statistics.median(modules):g} lines, largest {max(modules)}; "
            f"{len(functions)} functions, median {statistics.median(functions):g}, longest {max(functions)}"
        )
    assert statistics.median(modules) <= 250
    assert statistics.median(functions) <= 25
