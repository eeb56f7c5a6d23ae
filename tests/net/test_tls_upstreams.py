"""Upstreams behind `https`: the hot path inside of TLS, reuse, honest ends, and nothing left for the next client."""

from __future__ import annotations

import socket
import ssl

import pytest
import trio
from kit import chat, eventually, running_gateway, settings_for
from peers import Certificates

from canal_trio.errors import Failure, Kind
from canal_trio.hooks import Outcome
from canal_trio.relay.streams import TcpStream
from canal_trio.relay.tls import TlsStream
from canal_trio.settings import Bounds, Deadlines, Upstream
from canal_trio.testing.scripts import Close, Cut, Script, Send, Stall, chat_stream, cut_after, stream
from canal_trio.testing.upstreams import ScriptedUpstream
from canal_trio.upstream.dial import TcpDialer
from canal_trio.upstream.idle import is_quiet


def trusting(upstream: ScriptedUpstream, certificates: Certificates) -> Upstream:
    """The upstream as the gateway knows it."""
    return Upstream("u0", upstream.url, ca_file=certificates.ca_file)


@pytest.mark.parametrize("latest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
async def test_tls_upstreams_took_the_plain_path(certificates: Certificates, latest: ssl.TLSVersion) -> None:
    """Events go straight through, and the connection serves one exchange after the other, session tickets or not."""
    context = certificates.server("http/1.1")
    context.maximum_version = latest
    script = chat_stream(8, gap=0.01)
    async with (
        ScriptedUpstream(script, ssl_context=context) as upstream,
        running_gateway(settings_for(trusting(upstream, certificates))) as gateway,
    ):
        client = await gateway.connect()
        for _ in range(3):
            await client.send(chat())
            response = await client.response()
            assert response.complete
            assert response.body == script.payload
        for record in await gateway.records.wait(3):
            assert record.outcome is Outcome.COMPLETED
            assert record.handed_over > 0
        assert len(upstream.connections) == 1
        pool = gateway.gateway.statistics().pools["u0"]
        assert (pool.dialled, pool.reused, pool.stale) == (1, 2, 0)


@pytest.mark.parametrize("end", [Close(), Cut()], ids=["close_notify", "bare FIN"])
async def test_a_body_that_ends_with_the_connection(certificates: Certificates, end: Close | Cut) -> None:
    """It is whole with close_notify only (RFC 8446 6.1)."""
    whole = stream([b"data: 1\n\n", b"data: 2\n\n"], framing="close", gap=0.01)
    script = Script((*(step for step in whole.steps if not isinstance(step, Close)), end))
    async with (
        ScriptedUpstream(script, ssl_context=certificates.server()) as upstream,
        running_gateway(settings_for(trusting(upstream, certificates))) as gateway,
    ):
        client = await gateway.connect()
        await client.send(chat())
        response = await client.response()
        assert response.complete is isinstance(end, Close)
        assert response.body.startswith(b"data: 1\n\ndata: 2\n\n")
        expected = Outcome.COMPLETED if isinstance(end, Close) else Outcome.UPSTREAM_FAILED
        assert (await gateway.records.one()).outcome is expected


async def test_a_client_that_leaves_closes_a_tls_upstream(certificates: Certificates) -> None:
    """In the middle of a stream, at once."""
    script = cut_after(chat_stream(5), 2, Stall())
    async with (
        ScriptedUpstream(script, ssl_context=certificates.server()) as upstream,
        running_gateway(settings_for(trusting(upstream, certificates))) as gateway,
    ):
        client = await gateway.connect()
        await client.send(chat())
        await client.until(b"word1")
        client.fin()
        await upstream.until(lambda: upstream.connections[0].left is not None)
        record = await gateway.records.one()
        assert record.outcome is Outcome.CLIENT_GONE
        assert record.cancel_latency is not None


async def test_what_follows_a_response_is_nobodys_answer(certificates: Certificates) -> None:
    """A second response in the same record is not given to the next client: the connection is not reused."""
    first = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    script = Script((Send(first + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"),))
    async with (
        ScriptedUpstream(script, ssl_context=certificates.server()) as upstream,
        running_gateway(settings_for(trusting(upstream, certificates))) as gateway,
    ):
        client = await gateway.connect()
        for _ in range(3):
            await client.send(chat())
            assert (await client.response()).body == b"ok"
        assert len(upstream.connections) == 3


class Server:
    """The far end of a TLS connection, record by record: what it says leaves when it is told to."""

    def __init__(self, context: ssl.SSLContext, sock: socket.socket) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_side=True)
        self.sock = sock
        sock.setblocking(False)

    async def shake(self) -> bytes:
        """The handshake; what the server says behind it, its session tickets, is kept back."""
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                self.sock.sendall(self.outgoing.read())
                await trio.lowlevel.wait_readable(self.sock)
                self.incoming.write(self.sock.recv(65_536))
            else:
                return self.outgoing.read()

    def records(self, *texts: bytes) -> bytes:
        """Each text in a record of its own."""
        for text in texts:
            self.tls.write(text)
        return self.outgoing.read()


async def pair(certificates: Certificates) -> tuple[TlsStream, Server, bytes]:
    """A client's stream, the server, and the tickets that it kept back."""
    listener = socket.create_server(("127.0.0.1", 0))
    near = socket.create_connection(listener.getsockname())
    far, _ = listener.accept()
    listener.close()
    trusted = ssl.create_default_context(cafile=certificates.ca_file)
    client = TlsStream(TcpStream(near), trusted, server_hostname="localhost")
    server = Server(certificates.server(), far)
    tickets: list[bytes] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.do_handshake)
        tickets.append(await server.shake())
    return client, server, tickets[0]


async def seen(client: TlsStream) -> None:
    """Wait until the gateway's poller knows that something has arrived."""
    below = client.transport_stream
    await eventually(lambda: below._readable)  # type: ignore[attr-defined]  # a TcpStream; nothing else shows it


async def test_session_tickets_made_an_idle_connection_stale(certificates: Certificates) -> None:
    """Tickets that come late are no bytes of a response: the connection stays usable."""
    client, server, tickets = await pair(certificates)
    assert tickets
    assert is_quiet(client)
    server.sock.sendall(tickets)
    await seen(client)
    assert is_quiet(client)
    assert is_quiet(client)
    client.close()
    assert not is_quiet(client)
    server.sock.close()


@pytest.mark.parametrize("how", ["data", "hidden data", "close_notify", "fin", "garbage"])
async def test_an_idle_connection_that_is_not_quiet(certificates: Certificates, how: str) -> None:
    """Bytes of a response nobody asked for, decrypted already or not, an end of either kind: not to be used again."""
    client, server, said = await pair(certificates)
    if how == "hidden data":
        said += server.records(b"end", b"evil")
    elif how == "data":
        said += server.records(b"evil")
    elif how == "close_notify":
        with pytest.raises(ssl.SSLWantReadError):
            server.tls.unwrap()
        said += server.outgoing.read()
    elif how == "garbage":
        said += b"HTTP/1.1 408 Request Timeout\r\n\r\n"
    server.sock.sendall(said)
    if how == "fin":
        server.sock.close()
    await seen(client)
    if how == "hidden data":  # both records are read at once: of the second one the kernel knows nothing any more
        assert await client.receive_some() == b"end"
    assert not is_quiet(client)
    client.close()
    server.sock.close()


async def test_a_name_that_tls_cannot_ask_for(certificates: Certificates) -> None:
    """A host that is no name in TLS is a failure of dialling, not a bug."""
    async with ScriptedUpstream(chat_stream(1), ssl_context=certificates.server()) as upstream:
        dialer = TcpDialer(bounds=Bounds(), deadlines=Deadlines())
        below = await dialer.connect("127.0.0.1", upstream.port)
        assert isinstance(below, TcpStream)
        result = await dialer.secure(below, ".", ca_file=certificates.ca_file)
        assert isinstance(result, Failure)
        assert result.kind is Kind.TLS
        with pytest.raises(trio.ClosedResourceError):
            await below.receive_some()
