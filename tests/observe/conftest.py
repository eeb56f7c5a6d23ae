"""One PostgreSQL server for all tests of the observers, started with the first that wants it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pgserver import PostgresServer


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """It runs."""
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.close()
