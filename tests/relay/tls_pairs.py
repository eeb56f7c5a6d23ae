"""Connected pairs of TLS streams, over anything."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache

import trio
import trustme

from canal_trio.relay.tls import TlsStream
from canal_trio.testing.simstream import sim_stream_pair


@cache
def contexts(latest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A client's and a server's context that trust each other."""
    authority = trustme.CA()
    client, server = ssl.create_default_context(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.configure_trust(client)
    authority.issue_cert("gw.test").configure_cert(server)
    client.maximum_version = latest
    server.num_tickets = 0  # sent after the handshake, they would wait for a reader where a link is narrow
    server.set_alpn_protocols(["http/1.1"])
    client.set_alpn_protocols(["h2", "http/1.1"])
    return client, server


def wrapped(below, *, latest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> tuple[TlsStream, TlsStream]:
    """Client and server over two connected transports, before the handshake."""
    client, server = contexts(latest)
    return TlsStream(below[0], client, server_hostname="gw.test"), TlsStream(below[1], server, server_side=True)


async def shaken(below, *, latest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> tuple[TlsStream, TlsStream]:
    """The same, after the handshake."""
    client, server = wrapped(below, latest=latest)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.do_handshake)
        await server.do_handshake()
    return client, server


@asynccontextmanager
async def sim_tls(**links) -> AsyncIterator[tuple[TlsStream, TlsStream]]:
    """A TLS connection over a simulated one, closed at the end."""
    client, server = await shaken(sim_stream_pair(**links))
    try:
        yield client, server
    finally:
        client.close()
        server.close()


async def read_all(stream: TlsStream, step: int = 1000) -> bytes:
    """Everything up to the peer's end."""
    found = b""
    while data := await stream.receive_some(step):
        found += data
    return found
