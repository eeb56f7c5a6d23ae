"""The tests of the upstream floor share the kit of the gateway's tests, and leave no socket open."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "gateway"))

from kit import open_sockets  # found by the line above
from peers import Certificates


@pytest.fixture(autouse=True)
def no_socket_left() -> Iterator[None]:
    """No test may leave a socket open."""
    before = open_sockets()
    yield
    assert not open_sockets() - before


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """One authority for the tests of a module."""
    return Certificates(tmp_path_factory.mktemp("certificates"))
