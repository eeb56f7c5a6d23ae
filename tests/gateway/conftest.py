"""No test of the gateway leaves anything behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kit import open_sockets


@pytest.fixture(autouse=True)
def no_socket_left() -> Iterator[None]:
    """No test may leave a socket open. (Tasks: every block of the kit counts those of its gateway.)"""
    before = open_sockets()
    yield
    assert not open_sockets() - before
