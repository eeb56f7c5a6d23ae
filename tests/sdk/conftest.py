"""The gateway as its users run it, a scripted upstream behind it, and the base URL that its clients are given."""

from __future__ import annotations

import os
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Iterator

import pytest
import trustme
from sdk_programs import FOREIGN, GatewayProcess, gateway_for

from canal_trio.testing.scripts import chat_stream
from canal_trio.testing.upstreams import ScriptedUpstream

# An address that nothing else binds and no client gets as its own, so that a port stays ours between two tests.
UPSTREAM_HOST = "127.0.77.1"


@pytest.fixture(autouse=True)
def _undisturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy and no key of whoever runs the tests reaches a client in this process."""
    for name in filter(FOREIGN.fullmatch, list(os.environ)):
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> Iterator[None]:
    """A runner that was put into the background ignores SIGINT, and so would every program it starts."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def tls_contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's and a client's TLS context that trust each other."""
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(server)
    client = ssl.create_default_context()
    client.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF  # Python sets it with OpenSSL 3: a cut would look like an end
    authority.configure_trust(client)
    return server, client


@pytest.fixture(scope="session")
def upstream_port() -> int:
    """The port on which each test's scripted upstream listens: the one that the gateway was told."""
    with socket.socket() as probe:
        probe.bind((UPSTREAM_HOST, 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def gateway(upstream_port: int) -> Iterator[GatewayProcess]:
    """One gateway process for all tests with the scripted upstream."""
    with gateway_for(f"http://{UPSTREAM_HOST}:{upstream_port}/v1") as process:
        yield process


@pytest.fixture
async def upstream(upstream_port: int) -> AsyncIterator[ScriptedUpstream]:
    """A scripted upstream behind the gateway. What reaches it has to be correct HTTP in every test."""
    async with ScriptedUpstream(chat_stream(), host=UPSTREAM_HOST, port=upstream_port) as upstream:
        yield upstream
    assert upstream.complaints == []


@pytest.fixture
def base_url(gateway: GatewayProcess, upstream: ScriptedUpstream) -> str:
    """What the clients are given: the gateway, with the test's upstream behind it."""
    return gateway.base_url
