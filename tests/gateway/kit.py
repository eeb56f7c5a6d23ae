"""The kit of the gateway's tests: a gateway in this process, raw clients, and a watch on what is left.

Everything here reads and judges HTTP by code of its own (or h11), never by `canal_trio.wire`: a test that shares the
product's parser shares its mistakes.
"""

from __future__ import annotations

import contextvars
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio
from rawclient import Client, Ended, Response, ask, chat, request

from canal_trio.gateway import Gateway
from canal_trio.hooks import ExchangeRecord
from canal_trio.relay.course import Course, Held, hold_back
from canal_trio.relay.streams import TcpStream
from canal_trio.settings import Bounds, Deadlines, Settings, Upstream
from canal_trio.testing.upstreams import Answer, ScriptedUpstream

__all__ = [
    "Client",
    "Ended",
    "Records",
    "Response",
    "RunningGateway",
    "ask",
    "chat",
    "eventually",
    "open_sockets",
    "request",
    "running_gateway",
    "scene",
    "settings_for",
]

TERMINATOR = b"0\r\n\r\n"


async def eventually(condition: Callable[[], object], what: str = "", *, seconds: float = 8.0) -> None:
    """Wait until `condition()` holds; AssertionError after `seconds`. For real sockets: nothing can be awaited."""
    with trio.move_on_after(seconds):
        while not condition():  # noqa: ASYNC110  # what it asks about has no event
            await trio.sleep(0.002)
    assert condition(), what or f"not seen in {seconds} s"


def open_sockets() -> set[str]:
    """The sockets of this process, by inode, so that a reused descriptor number counts as another one."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found


# -- the gateway -------------------------------------------------------------------------------------------------------


class Records:
    """A recorder that can be waited for."""

    def __init__(self) -> None:
        self.all: list[ExchangeRecord] = []
        self._lot = trio.lowlevel.ParkingLot()

    def finished(self, record: ExchangeRecord) -> None:
        """Keep it."""
        self.all.append(record)
        self._lot.unpark_all()

    async def wait(self, count: int = 1, *, seconds: float = 8.0) -> list[ExchangeRecord]:
        """At least `count` records; AssertionError after `seconds`."""
        with trio.move_on_after(seconds):
            while len(self.all) < count:
                await self._lot.park()
        assert len(self.all) >= count, f"{len(self.all)} records after {seconds} s: {self.all}"
        return self.all

    async def one(self) -> ExchangeRecord:
        """The one record there is."""
        records = await self.wait(1)
        assert len(records) == 1, records
        return records[0]


def settings_for(
    *urls: str | Upstream, deadlines: Deadlines | None = None, bounds: Bounds | None = None, **more: Any
) -> Settings:
    """Settings for upstreams at these URLs (named u0, u1, …)."""
    upstreams = tuple(
        url if isinstance(url, Upstream) else Upstream(f"u{index}", url) for index, url in enumerate(urls)
    )
    return Settings(upstreams=upstreams, deadlines=deadlines or Deadlines(), bounds=bounds or Bounds(), **more)


class RunningGateway:
    """A gateway in this process behind a listener on loopback."""

    def __init__(self, gateway: Gateway, records: Records, port: int, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self.gateway = gateway
        self.scopes: list[trio.CancelScope] = []  # of the connections
        self.records = records
        self.port = port
        self.clients: list[Client] = []
        self.accepted: list[TcpStream] = []  # the gateway's ends

    async def connect(self, *, receive_buffer: int | None = None) -> Client:
        """A raw client; closed at the end of the block at the latest."""
        sock = trio.socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await sock.connect(("127.0.0.1", self.port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client = Client(trio.SocketStream(sock))
        self.clients.append(client)
        return client

    async def ask(self, data: bytes, method: str | None = None) -> Response:
        """One request on a connection of its own, and its response; then the client leaves."""
        client = await self.connect()
        await client.send(data)
        response = await client.response(method or data.partition(b" ")[0].decode())
        client.fin()
        return response

    def stop(self) -> None:
        """Cancel the connections, as a second SIGTERM does."""
        for scope in self.scopes:
            scope.cancel()

    async def settle(self) -> None:
        """Close the clients and see that nothing is left in the gateway."""
        for client in self.clients:
            client.fin()
        gateway = self.gateway
        await eventually(lambda: gateway.statistics().connections == 0, "a client connection is still served")
        statistics = gateway.statistics()
        assert statistics.in_flight == 0, gateway.exchanges()
        assert statistics.held_bytes == 0, f"{statistics.held_bytes} bytes of bodies are still held"
        assert statistics.flow_bytes == 0, f"{statistics.flow_bytes} bytes of flows are still counted"
        assert gateway.places.used == 0, f"{gateway.places.used} places are not given back"
        for name, pool in statistics.pools.items():
            assert pool.used == 0, f"{name}: {pool}"
            assert pool.waiting == 0, f"{name}: {pool}"
        assert len(self._nursery.child_tasks) == 2, self._nursery.child_tasks  # the gateway's own and the listener's


@asynccontextmanager
async def running_gateway(
    settings: Settings, *, dialer: Any = None, send_buffer: int | None = None, settle: bool = True
) -> AsyncIterator[RunningGateway]:
    """A gateway on loopback for the block. At its end nothing may be left: no connection, lease, byte, socket, task."""
    records = Records()
    gateway = Gateway(settings, recorders=[records], dialer=dialer)
    listener = trio.socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if send_buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    await listener.bind(("127.0.0.1", 0))
    listener.listen(256)
    bound = settings.bounds.client_unsent_bytes

    async def serve(connections: trio.Nursery) -> None:
        while True:
            accepted, address = await listener.accept()
            raw = socket.socket(fileno=accepted.detach())
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, bound)
            stream = TcpStream(raw)
            running.accepted.append(stream)
            connections.start_soon(_handle, running, stream, address[0])

    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(gateway.run)
            running = RunningGateway(gateway, records, listener.getsockname()[1], nursery)
            nursery.start_soon(serve, nursery)
            try:
                yield running
                if settle:
                    await running.settle()
            finally:
                nursery.cancel_scope.cancel()
    finally:
        listener.close()
        for client in running.clients:
            client.fin()


@asynccontextmanager
async def scene(answer: Answer, **settings: Any) -> AsyncIterator[tuple[ScriptedUpstream, RunningGateway]]:
    """A scripted upstream, and a gateway with these settings before it."""
    async with ScriptedUpstream(answer) as upstream, running_gateway(settings_for(upstream.url, **settings)) as gateway:
        yield upstream, gateway


async def _handle(running: RunningGateway, stream: TcpStream, peer: str) -> None:
    with trio.CancelScope() as scope:
        running.scopes.append(scope)
        await running.gateway.handle(stream, peer=peer)


def sse(*payloads: str) -> list[bytes]:
    """Events as bytes."""
    return [f"data: {payload}\n\n".encode() for payload in payloads]


def chunked(*pieces: bytes, end: bool = True) -> bytes:
    """Pieces as chunks."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + (TERMINATOR if end else b"")


def data_of(events: bytes) -> Sequence[str]:
    """The payloads of the `data:` lines."""
    return [line[5:].strip().decode() for line in events.splitlines() if line.startswith(b"data:")]


def waiting_to_send(steps: Coroutine[Any, Any, None]) -> tuple[Held, Course[None]]:
    """A course that has begun `steps`, and waits with its send for the end of the poller's round; who is held there."""
    held = Held()
    hold_back(held)
    course = Course(steps, lambda: None, contextvars.copy_context())
    try:
        assert not course.begin()
    finally:
        hold_back(None)
    return held, course
