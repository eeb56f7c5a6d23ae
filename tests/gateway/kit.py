"""The kit of the gateway's tests: a gateway in this process, raw clients, and a watch on what is left.

Everything here reads and judges HTTP by code of its own (or h11), never by `canal_trio.wire`: a test that shares the
product's parser shares its mistakes.
"""

from __future__ import annotations

import json
import os
import re
import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import trio

from canal_trio.gateway import Gateway
from canal_trio.hooks import ExchangeRecord
from canal_trio.relay.streams import TcpStream
from canal_trio.settings import Bounds, Deadlines, Settings, Upstream
from canal_trio.testing.upstreams import Answer, ScriptedUpstream

__all__ = [
    "Client",
    "Records",
    "Response",
    "RunningGateway",
    "chat",
    "eventually",
    "open_sockets",
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


# -- requests ----------------------------------------------------------------------------------------------------------


def request(
    method: str = "POST",
    path: str = "/v1/chat/completions",
    body: bytes | None = None,
    *fields: str,
    version: str = "1.1",
) -> bytes:
    """A request as bytes, with a content-length if there is a body."""
    lines = [f"{method} {path} HTTP/{version}", "Host: gw.test", *fields]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


def chat(
    *fields: str, model: str = "m", stream: bool = True, version: str = "1.1", path: str = "/v1/chat/completions"
) -> bytes:
    """A chat completion request."""
    body = json.dumps({"model": model, "stream": stream, "messages": []}).encode()
    return request("POST", path, body, "Content-Type: application/json", *fields, version=version)


# -- responses ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Response:
    """One response as the client saw it. `complete`: by its framing the message looks finished."""

    status: int
    version: str
    headers: list[tuple[str, str]]
    raw_head: bytes
    informational: list[Response] = field(default_factory=list)
    body: bytes = b""
    complete: bool = False
    framing: str = ""
    trailers: list[tuple[str, str]] = field(default_factory=list)
    ended_by: str | None = None  # "fin" or "reset" when the connection ended it

    def header(self, name: str) -> str | None:
        """The first value of a field by its lower-case name."""
        return next((value for key, value in self.headers if key == name), None)

    def all(self, name: str) -> list[str]:
        """Every value of a field."""
        return [value for key, value in self.headers if key == name]

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error of a local answer, its shape checked: OpenAI's, whole, as JSON."""
        assert self.header("content-type") == "application/json", self.headers
        value = self.json
        assert set(value) == {"error"}, value
        assert set(value["error"]) == {"message", "type", "param", "code"}, value
        assert isinstance(value["error"]["message"], str)
        assert value["error"]["message"]
        assert isinstance(value["error"]["type"], str)
        return value["error"]


class Ended(Exception):
    """The connection ended before the message did."""


class Client:
    """A raw client over any Trio stream. Reads by rules of its own, strictly."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.buffer = bytearray()
        self.ended_by: str | None = None
        self.seen = bytearray()  # every byte that arrived

    async def send(self, data: bytes) -> None:
        """Send; a gateway that closed already is no trouble, what it answered is what counts."""
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self.stream.send_all(data)

    async def fill(self, size: int = 65536) -> bool:
        """Read once. False: the connection has ended, see `ended_by`."""
        if self.ended_by is not None:
            return False
        try:
            data = await self.stream.receive_some(size)
        except trio.BrokenResourceError:
            self.ended_by = "reset"
            return False
        if not data:
            self.ended_by = "fin"
            return False
        self.buffer += data
        self.seen += data
        return True

    async def until(self, mark: bytes) -> bytes:
        """Bytes up to and with `mark`; `Ended` if the connection ends before."""
        while mark not in self.buffer:
            if not await self.fill():
                raise Ended(self.ended_by)
        end = self.buffer.index(mark) + len(mark)
        data = bytes(self.buffer[:end])
        del self.buffer[:end]
        return data

    async def exactly(self, size: int) -> bytes:
        """This many bytes."""
        while len(self.buffer) < size:
            if not await self.fill():
                raise Ended(self.ended_by)
        data = bytes(self.buffer[:size])
        del self.buffer[:size]
        return data

    async def rest(self) -> bytes:
        """All that comes until the connection ends."""
        while await self.fill():
            pass
        data = bytes(self.buffer)
        self.buffer.clear()
        return data

    async def head(self) -> Response:
        """The next response head."""
        raw = await self.until(b"\r\n\r\n")
        lines = raw[:-4].decode("latin-1").split("\r\n")
        match = re.fullmatch(r"HTTP/(1\.[01]) ([1-9][0-9]{2}) ([^\r\n\x00]*)", lines[0])
        assert match, f"not a status line: {lines[0]!r}"
        headers = []
        for line in lines[1:]:
            name, colon, value = line.partition(":")
            assert colon, f"not a field: {line!r}"
            assert re.fullmatch(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+", name), f"not a field name: {name!r}"
            assert not re.search(r"[\x00\r\n]", value), f"not a field value: {value!r}"
            headers.append((name.lower(), value.strip(" \t")))
        return Response(int(match[2]), match[1], headers, raw)

    async def final_head(self) -> Response:
        """The next final head, the informational ones before it in `informational`."""
        heads: list[Response] = []
        while True:
            head = await self.head()
            if head.status >= 200 or head.status == 101:
                return replace(head, informational=heads)
            heads.append(head)

    async def response(self, method: str = "GET", version: str = "1.1") -> Response:
        """A whole response; `Ended` if not even its head came. A body that breaks off leaves `complete` False."""
        head = await self.final_head()
        await self.body(head, method)
        return head

    async def body(self, head: Response, method: str = "GET") -> None:
        """Read the body of `head`, to its end or the connection's."""
        coding, length = head.all("transfer-encoding"), head.all("content-length")
        assert not (coding and length), head.headers
        if method == "HEAD" or head.status in (204, 304) or head.status < 200:
            head.framing, head.complete = "none", True
            return
        body = bytearray()
        try:
            if coding:
                assert coding == ["chunked"], coding
                head.framing = "chunked"
                await self._chunked(head, body)
            elif length:
                assert len(length) == 1, length
                head.framing = "length"
                await self._length(int(length[0]), body)
            else:
                head.framing = "close"
                body += await self.rest()
            head.complete = head.framing != "close" or self.ended_by == "fin"
        except Ended:
            pass
        finally:
            head.body = bytes(body)
        head.ended_by = self.ended_by

    async def _length(self, left: int, body: bytearray) -> None:
        while left:
            if not self.buffer and not await self.fill():
                raise Ended
            taken = self.buffer[:left]
            del self.buffer[: len(taken)]
            body += taken
            left -= len(taken)

    async def _chunked(self, head: Response, body: bytearray) -> None:
        while True:
            line = await self.until(b"\r\n")
            assert re.fullmatch(rb"[0-9a-fA-F]{1,16}\r\n", line), f"not a chunk size: {line!r}"
            size = int(line, 16)
            if size == 0:
                break
            await self._length(size, body)
            assert await self.exactly(2) == b"\r\n"
        while (line := await self.until(b"\r\n")) != b"\r\n":
            name, colon, value = line[:-2].decode("latin-1").partition(":")
            assert colon, line
            head.trailers.append((name.lower(), value.strip()))

    def fin(self) -> None:
        """Close in the usual way: FIN. (With unread input the kernel makes it a reset.)"""
        self._socket.close()

    def reset(self) -> None:
        """Close with a reset."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def shutdown(self) -> None:
        """Half-close: our side only."""
        self._socket.shutdown(socket.SHUT_WR)

    @property
    def _socket(self) -> Any:
        assert isinstance(self.stream, trio.SocketStream)
        return self.stream.socket


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
