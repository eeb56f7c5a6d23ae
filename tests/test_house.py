"""Rules of the house that a reader of the source can check: shields, generators, sizes (CONTRIBUTING)."""

from __future__ import annotations

import ast
import pathlib
from collections import Counter

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted((ROOT / "canal_trio").rglob("*.py"))
PRODUCT = [path for path in FILES if "testing" not in path.parts]
OURS = sorted(path for folder in ("tests", "loadtest") for path in (ROOT / folder).rglob("*.py"))
ALL = FILES + [path for path in OURS if ".cache" not in path.parts]  # where peers and clients are installed
DEADLINES = {"move_on_after", "move_on_at", "fail_after", "fail_at"}  # trio's scopes that have one by their name

LINES = 430  # of a file: "about 400"
SCROLLS = 70  # of a function, its docstring included


def _functions(path: pathlib.Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def _own_nodes(function: ast.AST) -> list[ast.AST]:
    """What belongs to a function and not to one inside it."""
    found: list[ast.AST] = []
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            found += [child, *_own_nodes(child)]
    return found


def _unbounded(node: ast.AST) -> bool:
    """A shield that is set apart from its deadline, or has none."""
    if isinstance(node, ast.Attribute) and node.attr == "shield":
        return isinstance(node.ctx, ast.Store)
    if isinstance(node, ast.Call) and any(keyword.arg == "shield" for keyword in node.keywords):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        return called not in DEADLINES and not any(keyword.arg == "deadline" for keyword in node.keywords)
    return False


def test_every_shield_has_a_deadline() -> None:
    """Where cancellation is held off, something else ends the wait."""
    found = [
        f"{path}:{node.lineno}"
        for path in PRODUCT
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.expr) and _unbounded(node)
    ]
    assert found == []


def test_no_async_generators() -> None:
    """None in the product: their cleanup runs where and when the garbage collector likes."""
    found = [
        f"{path}:{function.name}"
        for path in PRODUCT
        for function in _functions(path)
        if isinstance(function, ast.AsyncFunctionDef)
        and any(isinstance(node, ast.Yield | ast.YieldFrom) for node in _own_nodes(function))
    ]
    assert found == []


def test_files_fit_in_the_head() -> None:
    """About 400 lines at most, in tests and load tests too; what grows beyond has two jobs."""
    lengths = {str(path): len(path.read_text().splitlines()) for path in ALL}
    assert {path: length for path, length in lengths.items() if length > LINES} == {}


def test_no_two_test_modules_share_a_name() -> None:
    """pytest imports them by their bare names: two of one name break the whole run, though each folder passes."""
    names = Counter(path.stem for path in (ROOT / "tests").rglob("*.py") if path.stem not in ("conftest", "__init__"))
    assert [name for name, count in names.items() if count > 1] == []


def test_functions_do_not_scroll() -> None:
    """A function can be read without moving the page."""
    found = [
        f"{path}:{function.name}"
        for path in PRODUCT
        for function in _functions(path)
        if (function.end_lineno or 0) - function.lineno >= SCROLLS
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "with trio.CancelScope(shield=True): pass",
        "scope.shield = True",
        "async def f():\n    for x in (): yield x",
    ],
)
def test_the_rules_are_seen_to_be_broken(source: str) -> None:
    """These tests can fail: what they look for is found where it is."""
    tree = ast.parse(source)
    broken = any(_unbounded(node) for node in ast.walk(tree))
    assert broken or any(isinstance(node, ast.Yield) for node in _own_nodes(tree.body[0]))
