"""The shape of the house, held by a test: who may import whom, how long a file may be, what a module exports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "canal_trio"

FLOORS = {
    "errors": 0,
    "messages": 0,
    "settings": 0,
    "hooks": 0,
    "wire": 1,
    "policy": 1,
    "relay": 1,
    "upstream": 2,
    "gateway": 3,
    "observe": 4,
    "quota": 4,
    "serve": 5,
    "config": 6,
    "cli": 6,
    "demo": 6,
    "demo_upstream": 6,
    "__main__": 6,
    "testing": 7,  # beside: it may look at everything, nothing of the product looks at it
}
MOST_LINES = 420
SIBLINGS = {"wire", "policy", "relay"}
ON_FLOOR_0 = {"errors", "messages", "settings", "hooks"}

MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    """The first part of a module's name below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """The rooms of the package that `path` imports from, lazily or not."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("canal_trio.")}
    return rooms - {"__version__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path):
    """A module imports only from lower floors, or from its own room."""
    room = room_of(path)
    if room == "__init__":
        assert imports_of(path) == set()
        return
    for other in imports_of(path) - {room}:
        assert other in FLOORS, f"{path} imports from {other}, which is on no floor"
        assert FLOORS[other] < FLOORS[room] or {room, other} <= ON_FLOOR_0 or FLOORS[other] == FLOORS[room] == 6, (
            f"{path} ({room}, floor {FLOORS[room]}) imports from {other} (floor {FLOORS[other]})"
        )
        assert not {room, other} <= SIBLINGS, f"{room} and {other} are siblings"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_fits_in_the_head(path: Path):
    """No module has grown past what one can hold in mind."""
    assert len(path.read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_says_what_it_exports(path: Path):
    """Every module that defines anything has a docstring and `__all__`, and exports what it names."""
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path} has no theory of operation"
    defined = {
        node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    if not defined:
        return
    names = [ast.unparse(node.targets[0]) for node in tree.body if isinstance(node, ast.Assign)]
    assert "__all__" in names, f"{path} has no __all__"


def test_floor_0_needs_only_the_standard_library():
    """The vocabulary can be imported without any dependency installed."""
    for name in ON_FLOOR_0:
        for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert node.module.split(".")[0] not in {"trio", "h11", "httpcore", "msgspec", "click"}
