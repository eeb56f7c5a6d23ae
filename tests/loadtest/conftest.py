"""An upstream of the load test in a thread of this process, and a plain socket to speak to it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from loadtest.peers import Gateway
from loadtest.promises.kit import Client
from loadtest.upstream import Upstream


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    """Serving until the end of the test."""
    server = Upstream()
    thread = threading.Thread(target=server.run)
    thread.start()
    yield server
    server.stop()
    with suppress(OSError):  # it may be gone already
        socket.create_connection((server.host, server.port)).close()  # wakes it
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture
def direct(upstream: Upstream) -> Gateway:
    """The way to it without a gateway."""
    return Gateway("direct", upstream.host, upstream.port, None)


@pytest.fixture
def client(direct: Gateway) -> Iterator[Client]:
    """A connection to it."""
    one = Client(direct)
    yield one
    one.close()
