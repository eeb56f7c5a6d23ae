"""Dialling TLS: trust, names, deadlines, and no socket left."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from dial_kit import V4, dialer, listening, refused, told
from kit import eventually, open_sockets
from peers import Certificates

from canal_trio.errors import Failure, Kind, Side
from canal_trio.relay.streams import handover_end
from canal_trio.settings import Upstream


@asynccontextmanager
async def tls_listening(
    context: ssl.SSLContext, after: Callable[[trio.SSLStream[trio.SocketStream]], Any] | None = None
) -> AsyncIterator[int]:
    """A TLS server that shakes hands and waits."""

    async def serve(stream: trio.SocketStream) -> None:
        secured = trio.SSLStream(stream, context, server_side=True)
        try:
            await secured.do_handshake()
            if after is not None:
                await after(secured)
            await stream.receive_some(1)
        except trio.BrokenResourceError:
            pass
        finally:
            stream.socket.close()

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, serve, listeners)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


def asks_for(context: ssl.SSLContext) -> list[str | None]:
    """The names that clients ask `context` for."""
    names: list[str | None] = []
    context.sni_callback = lambda _connection, name, _context: names.append(name)
    return names


async def test_tls_with_the_authority_one_trusts(certificates: Certificates) -> None:
    """ca_file instead of the system's store; SNI without the trailing dot; ALPN as the upstream's settings say."""
    context = certificates.server("h2", "http/1.1")
    names = asks_for(context)
    async with tls_listening(context) as port:
        connect = dialer(resolver=told((V4, ("127.0.0.1", port))))
        for http2, chosen in ((False, "http/1.1"), (True, "h2"), (True, "h2")):
            upstream = Upstream("u", f"https://localhost.:{port}", http2=http2, ca_file=certificates.ca_file)
            stream: Any = await connect(upstream)
            assert not isinstance(stream, Failure), stream
            assert stream.selected_alpn_protocol() == chosen
            raw = handover_end(stream)
            assert raw is not None
            raw.close()
        assert names == ["localhost"] * 3
        assert len(connect._contexts) == 2, "the trust store is read once per kind"


async def test_an_authority_one_does_not_trust(certificates: Certificates) -> None:
    """The system's store does not know it: TLS, with the reason, and the socket closed."""
    async with tls_listening(certificates.server()) as port:
        failure = refused(await dialer()(Upstream("u", f"https://127.0.0.1:{port}")))
    assert (failure.side, failure.kind) == (Side.UPSTREAM, Kind.TLS)
    assert failure.detail.startswith("127.0.0.1: its certificate is not trusted: ")


async def test_another_name_than_the_certificates(certificates: Certificates) -> None:
    """A trusted authority is not enough."""
    async with tls_listening(certificates.server()) as port:
        connect = dialer(resolver=told((V4, ("127.0.0.1", port))))
        upstream = Upstream("u", f"https://other.test:{port}", ca_file=certificates.ca_file)
        failure = refused(await connect(upstream))
    assert failure.kind is Kind.TLS
    assert "other.test" in failure.detail


async def test_a_peer_that_speaks_no_tls(certificates: Certificates) -> None:
    """Plain text comes back: a TLS failure in a sentence."""

    async def shout(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, shout, listeners)
        port = listeners[0].socket.getsockname()[1]
        upstream = Upstream("u", f"https://127.0.0.1:{port}", ca_file=certificates.ca_file)
        failure = refused(await dialer()(upstream))
        nursery.cancel_scope.cancel()
    assert failure.kind is Kind.TLS


async def test_a_peer_that_leaves_during_the_handshake(certificates: Certificates) -> None:
    """TLS: the connection was closed."""

    async def leave(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some(1)

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, leave, listeners)
        port = listeners[0].socket.getsockname()[1]
        upstream = Upstream("u", f"https://127.0.0.1:{port}", ca_file=certificates.ca_file)
        failure = refused(await dialer()(upstream))
        nursery.cancel_scope.cancel()
    assert failure.kind is Kind.TLS
    assert "closed during the TLS handshake" in failure.detail


async def test_the_handshake_has_a_deadline(certificates: Certificates) -> None:
    """A peer that accepts and says nothing: `connect_tls` more than `connect`, then a timeout; no socket left."""
    before = open_sockets()
    async with listening() as (port, accepted):
        upstream = Upstream("u", f"https://127.0.0.1:{port}", ca_file=certificates.ca_file)
        start = trio.current_time()
        failure = refused(await dialer(connect=0.2, connect_tls=0.1)(upstream))
        assert failure.kind is Kind.TIMEOUT
        assert "TLS handshake" in failure.detail
        assert trio.current_time() - start >= 0.3
        with trio.fail_after(2):
            assert await accepted[0].receive_some() != b""  # the ClientHello
            assert await accepted[0].receive_some() == b""
    assert not open_sockets() - before


async def test_cancelled_in_the_handshake_it_leaves_no_socket(certificates: Certificates) -> None:
    """The stream is closed at once."""
    async with listening() as (port, accepted):
        before = open_sockets()
        upstream = Upstream("u", f"https://127.0.0.1:{port}", ca_file=certificates.ca_file)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(dialer(), upstream)
            await eventually(lambda: accepted)
            await accepted[0].receive_some()
            nursery.cancel_scope.cancel()
        accepted.pop().socket.close()
        assert not open_sockets() - before


async def test_a_trust_store_that_cannot_be_read_is_our_fault(
    certificates: Certificates, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """The log names the file, the client's answer does not."""
    broken = tmp_path / "broken.pem"
    broken.write_text("not a certificate")
    async with tls_listening(certificates.server()) as port:
        for path in (str(broken), str(tmp_path / "missing.pem")):
            failure = refused(await dialer()(Upstream("u", f"https://127.0.0.1:{port}", ca_file=path)))
            assert (failure.side, failure.kind) == (Side.GATEWAY, Kind.UNAVAILABLE)
            assert path not in failure.detail
            assert path in caplog.text


async def test_a_bare_fin_is_not_an_end(certificates: Certificates) -> None:
    """Whoever cuts the connection below TLS must not look as if the body had ended."""

    async def cut(stream: trio.SSLStream[trio.SocketStream]) -> None:
        await stream.send_all(b"half")
        await stream.transport_stream.send_eof()

    async with tls_listening(certificates.server(), cut) as port:
        upstream = Upstream("u", f"https://127.0.0.1:{port}", ca_file=certificates.ca_file)
        stream = await dialer()(upstream)
        assert not isinstance(stream, Failure)
        assert await stream.receive_some(100) == b"half"
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some(100)
        raw = handover_end(stream)
        assert raw is not None
        raw.close()
