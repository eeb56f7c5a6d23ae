"""Clients that speak TLS, over the gateway's own TLS stream and over Trio's, which takes the plain path.

The listeners, their certificates and handshakes are `tests/serve`'s; here is what TLS changes for an exchange: a
hang-up is seen below it, an end has to be said, a cut must not be.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trustme
from kit import Client, RunningGateway, chat, request, running_gateway, settings_for

from canal_trio.hooks import Outcome
from canal_trio.relay.streams import TcpStream
from canal_trio.relay.tls import TlsStream
from canal_trio.settings import Deadlines
from canal_trio.testing.scripts import Cut, Forever, Script, Send, Stall, chat_stream, cut_after, reply
from canal_trio.testing.upstreams import ScriptedUpstream

AUTHORITY = trustme.CA()
SERVER = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
AUTHORITY.issue_cert("localhost").configure_cert(SERVER)
CLIENT = ssl.create_default_context()
CLIENT.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF  # Python sets it with OpenSSL 3: a cut would look like an end
AUTHORITY.configure_trust(CLIENT)

Wrap = Callable[[TcpStream], Any]
KINDS: dict[str, Wrap] = {
    "ours": lambda stream: TlsStream(stream, SERVER, server_side=True),
    "trio": lambda stream: trio.SSLStream(stream, SERVER, server_side=True),
}


class Front:
    """Serves TLS connections with a gateway."""

    def __init__(self, gateway: RunningGateway, port: int) -> None:
        self.gateway = gateway
        self.records = gateway.records
        self.port = port

    async def connect(self) -> Client:
        """A client inside TLS that insists on close_notify."""
        raw = await trio.open_tcp_stream("127.0.0.1", self.port)
        stream = trio.SSLStream(raw, CLIENT, server_hostname="localhost", https_compatible=False)
        await stream.do_handshake()
        client = TlsClient(stream)
        self.gateway.clients.append(client)
        return client


class TlsClient(Client):
    """Its socket lies below."""

    @property
    def _socket(self) -> Any:
        assert isinstance(self.stream, trio.SSLStream)
        return self.stream.transport_stream.socket


@pytest.fixture(params=KINDS)
def front(request: pytest.FixtureRequest) -> Any:
    """Opens a front before an upstream that plays a script."""
    wrap = KINDS[request.param]

    @asynccontextmanager
    async def open_front(script: Script, **settings: Any) -> AsyncIterator[tuple[ScriptedUpstream, Front]]:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with (
            ScriptedUpstream(script) as upstream,
            running_gateway(settings_for(upstream.url, **settings), settle=False) as gateway,
            trio.open_nursery() as nursery,
        ):

            async def serve(accepted: trio.SocketStream) -> None:
                stream = wrap(TcpStream.adopt(accepted))
                await stream.do_handshake()
                await gateway.gateway.handle(stream, peer="127.0.0.1", scheme="https")

            await nursery.start(trio.serve_listeners, serve, listeners)
            yield upstream, Front(gateway, listeners[0].socket.getsockname()[1])
            nursery.cancel_scope.cancel()

    return open_front


async def test_exchanges(front: Any) -> None:
    """Streams and plain bodies, one after the other on one connection; the upstream hears that it was https."""
    script = chat_stream(20)
    async with front(script) as (upstream, gateway):
        client = await gateway.connect()
        for _ in range(3):
            await client.send(chat())
            response = await client.response()
            assert response.complete
            assert response.body == script.payload
        assert upstream.requests[0].header("x-forwarded-proto") == "https"
        assert {record.outcome for record in await gateway.records.wait(3)} == {Outcome.COMPLETED}


async def test_upload(front: Any) -> None:
    """Megabytes up."""
    async with front(reply({"ok": True})) as (upstream, gateway):
        body = bytes(range(256)) * 10_000
        client = await gateway.connect()
        await client.send(request("POST", "/", body))
        assert (await client.response()).status == 200
        assert upstream.requests[0].body == body


async def test_end_of_a_close_delimited_body_was_taken_for_a_cut(front: Any) -> None:
    """To an HTTP/1.0 client the connection's end is the body's: it is said with close_notify."""
    script = chat_stream(3)
    async with front(script) as (_, gateway):
        client = await gateway.connect()
        await client.send(chat(version="1.0"))
        response = await client.response()
        assert response.framing == "close"
        assert response.complete, "the end was not said"
        assert response.body == script.payload


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_cut(front: Any, version: str) -> None:
    """A cut stream ends without close_notify, by a reset where nothing else can tell it."""
    async with front(cut_after(chat_stream(5, gap=0.01), 2, Cut())) as (_, gateway):
        client = await gateway.connect()
        await client.send(chat(version=version))
        response = await client.response()
        assert response.status == 200
        assert not response.complete
        assert client.ended_by == "reset", "the cut looks like an end"
        assert (await gateway.records.one()).outcome is Outcome.UPSTREAM_FAILED


@pytest.mark.parametrize("how", ["fin", "reset"])
async def test_client_that_leaves(front: Any, how: str) -> None:
    """Its FIN and its reset are seen below TLS, with or without close_notify: the upstream is closed at once."""
    script = cut_after(chat_stream(5), 2, Stall())
    async with front(script) as (upstream, gateway):
        client = await gateway.connect()
        await client.send(chat())
        await client.until(b"word1")
        getattr(client, how)()
        record = await gateway.records.one()
        assert record.outcome is Outcome.CLIENT_GONE
        assert record.cancel_latency is not None
        await upstream.until(lambda: upstream.connections[0].left is not None)


async def test_stalled_client_was_not_reset(front: Any) -> None:
    """A client inside TLS that takes nothing is reset like any other: its unsent bytes must not outlive it."""
    flood = Script((chat_stream(1).steps[0], Forever((Send(b"1000\r\n" + b"x" * 4096 + b"\r\n"),))))
    async with front(flood, deadlines=Deadlines(client_write=0.5)) as (upstream, gateway):
        client = await gateway.connect()
        await client.send(chat())
        record = await gateway.records.one()
        assert record.outcome is Outcome.CLIENT_STALLED
        await upstream.until(lambda: upstream.connections[0].left is not None)
        raw = client.stream.transport_stream.socket  # type: ignore[attr-defined]  # TLS over a socket
        with trio.fail_after(5), pytest.raises(ConnectionResetError):  # noqa: PT012  # what arrived comes first
            while await raw.recv(1 << 20):
                pass


async def test_refused_body(front: Any) -> None:
    """An answer that comes before the upload's end arrives although the client goes on sending."""
    async with front(reply({})) as (_, gateway):
        client = await gateway.connect()
        await client.send(request("POST", "/", None, "Content-Length: x") + b"x" * 200_000)
        response = await client.response()
        assert response.status == 400
        assert response.error["code"] == "malformed_request"
