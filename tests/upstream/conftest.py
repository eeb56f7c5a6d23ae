"""The tests of the upstream floor share the kit of the gateway's tests, and leave no socket open."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "gateway"))

from kit import open_sockets  # found by the line above


@pytest.fixture(autouse=True)
def no_socket_left() -> Iterator[None]:
    """No test may leave a socket open."""
    before = open_sockets()
    yield
    assert not open_sockets() - before
