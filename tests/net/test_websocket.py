"""A real WebSocket inside a tunnel: both ends are wsproto's and check the rules."""

from __future__ import annotations

import base64
import random

import trio
from kit import running_gateway, settings_for
from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Event,
    Message,
    Ping,
    Pong,
    Request,
    TextMessage,
)

from canal_trio.hooks import Outcome


class Socket:
    """A WebSocket end: wsproto's protocol over a Trio stream."""

    def __init__(self, stream: trio.abc.Stream, kind: ConnectionType) -> None:
        self.stream = stream
        self.protocol = WSConnection(kind)
        self.events: list[Event] = []

    async def send(self, event: Event) -> None:
        """Send an event."""
        await self.stream.send_all(self.protocol.send(event))

    async def next(self) -> Event:
        """The next event; pings are answered."""
        while True:
            while not self.events:
                self.protocol.receive_data(await self.stream.receive_some() or None)
                self.events += self.protocol.events()
            event = self.events.pop(0)
            if not isinstance(event, Ping):
                return event
            await self.send(event.response())

    async def message(self) -> str | bytes:
        """The next whole message."""
        parts: list[str | bytes] = []
        while True:
            event = await self.next()
            if isinstance(event, Pong):
                continue
            assert isinstance(event, Message), event
            parts.append(event.data if isinstance(event, TextMessage) else bytes(event.data))
            if event.message_finished:
                return "".join(parts) if isinstance(parts[0], str) else b"".join(parts)  # type: ignore[arg-type]


async def test_real_websocket() -> None:
    """Handshake, text, a megabyte of bytes, ping, and the closing handshake between two ends that check the rules."""
    big = base64.b64encode(random.Random(5).randbytes(800_000))

    async def play(stream: trio.SocketStream) -> None:
        end = Socket(stream, ConnectionType.SERVER)
        async with stream:
            assert isinstance(await end.next(), Request)
            await end.send(AcceptConnection())
            while True:
                event = await end.next()
                if isinstance(event, CloseConnection):
                    await end.send(event.response())
                    return
                assert isinstance(event, Message)
                await end.send(event)

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, play, listeners)
        async with running_gateway(settings_for(f"http://127.0.0.1:{port}/v1")) as gateway:
            client = await gateway.connect()
            end = Socket(client.stream, ConnectionType.CLIENT)
            await end.send(Request(host="gw.test", target="/v1/realtime?model=m"))
            assert isinstance(await end.next(), AcceptConnection)
            await end.send(TextMessage("naïve"))
            assert await end.message() == "naïve"
            async with trio.open_nursery() as sending:
                sending.start_soon(end.send, BytesMessage(big))
                assert await end.message() == big
            await end.send(CloseConnection(1000, "done"))
            closed = await end.next()
            assert isinstance(closed, CloseConnection)
            assert closed.code == 1000
            assert await client.rest() == b""
            client.fin()
            record = await gateway.records.one()
            assert record.outcome is Outcome.COMPLETED
            assert record.status == 101
        nursery.cancel_scope.cancel()
