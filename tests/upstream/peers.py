"""Peers for the upstream floor: Hypercorn speaking HTTP/2 in this process, an HTTP/2 upstream that says exactly what a
test wrote, and certificates."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import hypercorn.config
import hypercorn.trio
import trio
import trustme

__all__ = [
    "Certificates",
    "H2Peer",
    "Http2Upstream",
    "Seen",
    "http2_upstream",
    "listening",
    "scripted_h2",
    "token",
]

HOST = "127.0.0.1"
Receive: TypeAlias = Callable[[], Awaitable[Any]]
Send: TypeAlias = Callable[[Any], Awaitable[None]]


def token(number: int) -> bytes:
    """One event of a chat stream."""
    return b'data: {"choices":[{"delta":{"content":"t%d"}}]}\n\n' % number


DONE = b"data: [DONE]\n\n"


class Certificates:
    """An authority, the file one trusts it by, and a server's context for 127.0.0.1 and localhost."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        self.ca_file = str(folder / "ca.pem")
        authority.cert_pem.write_to_path(self.ca_file)
        self.cert_file, self.key_file = str(folder / "cert.pem"), str(folder / "key.pem")
        leaf = authority.issue_cert("127.0.0.1", "localhost")
        leaf.private_key_pem.write_to_path(self.key_file)
        for blob in leaf.cert_chain_pems:
            blob.write_to_path(self.cert_file, append=True)

    def server(self, *alpn: str) -> ssl.SSLContext:
        """A server's context that offers `alpn`."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.cert_file, self.key_file)
        if alpn:
            context.set_alpn_protocols(list(alpn))
        return context


# -- Hypercorn ---------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """One request as Hypercorn's application saw it."""

    method: str
    path: str
    version: str
    headers: list[tuple[str, str]]
    body: bytes = b""
    tokens: int = 0
    complete: bool = False  # the body
    answered: bool = False
    left: trio.Event = field(default_factory=trio.Event)

    def all(self, name: str) -> list[str]:
        """Every value of a field."""
        return [value for key, value in self.headers if key == name]


class Http2Upstream:
    """Hypercorn with an application that streams chats: `{"tokens": n, "gap": seconds, "stall_at": n}` in the body."""

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[Seen] = []

    async def app(self, scope: Any, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] == "lifespan":
            for step in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{step}.complete"})
            return
        fields = [(name.decode(), value.decode()) for name, value in scope["headers"]]
        seen = Seen(scope["method"], scope["path"], scope["http_version"], fields)
        self.requests.append(seen)
        while not seen.complete:
            message = await receive()
            if message["type"] == "http.disconnect":
                seen.left.set()
                return
            seen.body += message.get("body", b"")
            seen.complete = not message.get("more_body", False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, seen, receive, nursery.cancel_scope)
            await self._answer(seen, send)
            nursery.cancel_scope.cancel()

    async def _watch(self, seen: Seen, receive: Receive, scope: trio.CancelScope) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        if not seen.answered:
            seen.left.set()
            scope.cancel()

    async def _answer(self, seen: Seen, send: Send) -> None:
        wish = json.loads(seen.body) if seen.body.startswith(b"{") else {}
        if wish.get("head_gap"):
            await trio.sleep(wish["head_gap"])
        if "tokens" not in wish:
            fields = [(b"content-type", b"text/plain"), (b"x-method", seen.method.encode())]
            await send({"type": "http.response.start", "status": wish.get("status", 200), "headers": fields})
            body = b"" if seen.method == "HEAD" else b"%d bytes" % len(seen.body)
            seen.answered = True  # before the last message: after it a disconnect is no news
            await send({"type": "http.response.body", "body": body})
            return
        fields = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": fields})
        for number in range(wish["tokens"]):
            await send({"type": "http.response.body", "body": token(number), "more_body": True})
            seen.tokens += 1
            await trio.sleep(wish.get("gap", 0))
        if wish.get("stall"):
            await trio.sleep_forever()
        seen.answered = True
        await send({"type": "http.response.body", "body": DONE})


@asynccontextmanager
async def http2_upstream(certificates: Certificates | None = None) -> AsyncIterator[Http2Upstream]:
    """Hypercorn on loopback for the block; with certificates it speaks TLS and offers h2 and http/1.1."""
    upstream = Http2Upstream()
    config = hypercorn.config.Config()
    config.bind = [f"{HOST}:0"]
    config.errorlog = config.accesslog = None
    config.graceful_timeout = 0.1
    config.keep_alive_timeout = 60
    if certificates is not None:
        config.certfile, config.keyfile = certificates.cert_file, certificates.key_file
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        serve: Any = hypercorn.trio.serve
        binds = await nursery.start(_serve, serve, upstream.app, config, stop)
        upstream.url = binds[0]
        try:
            yield upstream
        finally:
            stop.set()
            nursery.cancel_scope.deadline = trio.current_time() + 2


async def _serve(serve: Any, app: Any, config: Any, stop: trio.Event, *, task_status: Any) -> None:
    await serve(app, config, shutdown_trigger=stop.wait, task_status=task_status)


# -- an HTTP/2 upstream that says what a test wrote --------------------------------------------------------------------


class H2Peer:
    """One accepted connection, by the `h2` library. `requests` are stream ids whose request is complete."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding=None))
        self.heads: dict[int, list[tuple[bytes, bytes]]] = {}
        self.bodies: dict[int, bytes] = {}
        self.complete: list[int] = []
        self.ended = False

    async def flush(self) -> None:
        """Send what h2 has to say."""
        await self.stream.send_all(self.h2.data_to_send())

    async def more(self) -> bool:
        """Read once. False: the gateway closed or reset the connection."""
        try:
            data = await self.stream.receive_some(65536)
        except trio.BrokenResourceError:
            data = b""
        if not data:
            self.ended = True
            return False
        try:
            events = self.h2.receive_data(data)
        except h2.exceptions.ProtocolError:
            return True  # after a GOAWAY of ours h2 hears nothing any more
        for event in events:
            if isinstance(event, h2.events.RequestReceived):
                self.heads[event.stream_id] = event.headers
                self.bodies[event.stream_id] = b""
            elif isinstance(event, h2.events.DataReceived):
                self.bodies[event.stream_id] += event.data
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, h2.events.StreamEnded):
                self.complete.append(event.stream_id)
        with suppress(trio.BrokenResourceError):
            await self.flush()
        return True

    async def request(self) -> int:
        """The stream id of the next complete request."""
        known = len(self.complete)
        while len(self.complete) == known:
            assert await self.more(), "the gateway left without a request"
        return self.complete[-1]

    async def gone(self) -> None:
        """Until the gateway has closed the connection."""
        while await self.more():
            pass

    async def head(self, stream_id: int, *fields: tuple[str | bytes, str | bytes], status: str = "200") -> None:
        """A response head."""
        self.h2.send_headers(stream_id, [(":status", status), *fields])
        await self.flush()

    async def data(self, stream_id: int, data: bytes, *, end: bool = False) -> None:
        """Body bytes."""
        self.h2.send_data(stream_id, data, end_stream=end)
        await self.flush()

    def reset(self) -> None:
        """Close with a TCP reset."""
        assert isinstance(self.stream, trio.SocketStream)
        self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.stream.socket.close()


@asynccontextmanager
async def scripted_h2(
    play: Callable[[H2Peer], Awaitable[None]], context: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[str, list[H2Peer]]]:
    """An HTTP/2 upstream that plays `play` on each connection, then closes it; its URL, and the connections so far."""
    peers: list[H2Peer] = []

    async def serve(stream: trio.SocketStream) -> None:
        inner: Any = stream
        if context is not None:
            inner = trio.SSLStream(stream, context, server_side=True, https_compatible=True)
        peer = H2Peer(inner)
        peers.append(peer)
        try:
            peer.h2.initiate_connection()
            await peer.flush()
            await play(peer)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            stream.socket.close()

    async with listening(serve) as port:
        yield f"{'https' if context else 'http'}://{HOST}:{port}", peers


@asynccontextmanager
async def listening(serve: Callable[[trio.SocketStream], Awaitable[None]]) -> AsyncIterator[int]:
    """The port of a listener whose connections `serve` gets."""
    listeners = await trio.open_tcp_listeners(0, host=HOST)
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, serve, listeners)
        try:
            yield listeners[0].socket.getsockname()[1]
        finally:
            nursery.cancel_scope.cancel()
