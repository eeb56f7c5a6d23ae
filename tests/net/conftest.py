"""The tests over real sockets share the kit of the gateway's tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "gateway"))
sys.path.insert(0, str(Path(__file__).parent.parent / "upstream"))

from kit import open_sockets  # found by the lines above
from peers import Certificates


@pytest.fixture(autouse=True)
def no_socket_left() -> Iterator[None]:
    """No test may leave a socket open. (Tasks: every block of the kit counts those of its gateway.)"""
    before = open_sockets()
    yield
    assert not open_sockets() - before


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """One authority for the tests of a module."""
    return Certificates(tmp_path_factory.mktemp("certificates"))
