"""tests/complaints.md: each complaint has a test, and each test in the table exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
ROWS = re.findall(r"^\| C(\d+) \|[^|]*\|(.*)\|$", (TESTS / "complaints.md").read_text(), re.MULTILINE)


def test_each_complaint_has_a_test():
    """All thirty, in order."""
    assert [int(number) for number, _ in ROWS] == list(range(1, 31))
    assert all(re.search(r"`\w+/\w+\.py", tests) for _, tests in ROWS)


def test_each_test_exists():
    """A test that was renamed is renamed in the table, too."""
    named = {one for _, tests in ROWS for one in re.findall(r"`([^`]+)`", tests) if ".py" in one}
    missing = []
    for one in sorted(named):
        file, _, function = one.partition("::")
        path = TESTS / file
        tree = ast.parse(path.read_text()) if path.exists() else None
        names = [getattr(node, "name", "") for node in ast.walk(tree)] if tree is not None else []
        if tree is None or (function and function not in names):
            missing.append(one)
    assert len(named) > 30
    assert missing == []
