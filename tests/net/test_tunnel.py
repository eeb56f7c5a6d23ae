"""`Upgrade: websocket` as a tunnel: raw bytes, an end for each direction, backpressure on both, cancellation."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest
import trio
from kit import Client, RunningGateway, eventually, request, running_gateway, scene, settings_for

from canal_trio.hooks import Outcome
from canal_trio.settings import Bounds
from canal_trio.testing.scripts import Echo, Script, Send, Stall, openai_error, reply

KEY = "dGhlIHNhbXBsZSBub25jZQ=="
UPGRADE = request(
    "GET",
    "/v1/realtime?model=m",
    None,
    "Connection: keep-alive, Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Version: 13",
    f"Sec-WebSocket-Key: {KEY}",
)
SWITCH = (
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
)


@dataclass
class FarEnd:
    """An upstream that switches protocols; then the test plays it."""

    url: str
    streams: list[trio.SocketStream] = field(default_factory=list)
    early: list[bytes] = field(default_factory=list)  # what came in one read with the request


Play = Callable[[trio.SocketStream], Awaitable[None]]


@asynccontextmanager
async def far_end(play: Play, *, with_101: bytes = b"", buffer: int | None = None) -> AsyncIterator[FarEnd]:
    """The upstream on loopback; `play` gets each stream once it has switched."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    if buffer is not None:
        listeners[0].socket.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, buffer)
        listeners[0].socket.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_SNDBUF, buffer)
    end = FarEnd(f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}")

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            data = b""
            while b"\r\n\r\n" not in data:
                data += await stream.receive_some()
            head, _, rest = data.partition(b"\r\n\r\n")
            assert b"\r\nConnection: Upgrade" in head
            assert b"\r\nUpgrade: websocket" in head
            assert f"Sec-WebSocket-Key: {KEY}".encode() in head
            end.early.append(rest)
            end.streams.append(stream)
            await stream.send_all(SWITCH + with_101)
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await play(stream)

    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, serve, listeners)
        yield end
        nursery.cancel_scope.cancel()


async def open_tunnel(gateway: RunningGateway, early: bytes = b"") -> Client:
    """A client whose handshake has succeeded."""
    client = await gateway.connect()
    await client.send(UPGRADE + early)
    head = await client.final_head()
    assert head.status == 101
    assert head.header("connection") == "Upgrade"
    assert head.header("upgrade") == "websocket"
    assert head.header("sec-websocket-accept") == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
    assert head.header("content-length") is None
    assert head.header("transfer-encoding") is None
    return client


async def drain(stream: trio.abc.ReceiveStream) -> bytes:
    """All that comes to the end."""
    data = bytearray()
    async for piece in stream:
        data += piece
    return bytes(data)


def noise(size: int) -> bytes:
    """Bytes that no parser would take for HTTP."""
    return random.Random(size).randbytes(size)


async def test_both_ways_at_once() -> None:
    """Megabytes in both directions at the same time, byte for byte."""
    up, down = noise(3_000_000), noise(2_500_000)
    arrived: list[bytes] = []

    async def play(stream: trio.SocketStream) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, down)
            arrived.append(await receive_exactly(stream, len(up)))

    async with far_end(play) as end, running_gateway(settings_for(end.url)) as gateway:
        client = await open_tunnel(gateway)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.send, up)
            received = await client.exactly(len(down))
        assert hashlib.sha256(received).digest() == hashlib.sha256(down).digest()
        assert await client.rest() == b""
        assert client.ended_by == "fin"
        client.fin()
        record = await gateway.records.one()
        assert hashlib.sha256(arrived[0]).digest() == hashlib.sha256(up).digest()
        assert record.outcome is Outcome.COMPLETED
        assert record.status == 101
        assert (record.request_bytes, record.response_bytes) == (len(up), len(down))


async def receive_exactly(stream: trio.abc.ReceiveStream, size: int) -> bytes:
    """This many bytes."""
    data = bytearray()
    while len(data) < size:
        piece = await stream.receive_some()
        assert piece, "the tunnel ended early"
        data += piece
    return bytes(data)


async def test_early_bytes_of_both_sides() -> None:
    """Bytes in the same segment as the handshake, and as the 101, are the tunnel's first ones."""
    arrived = trio.Event()

    async def play(stream: trio.SocketStream) -> None:
        assert await receive_exactly(stream, 11) == b"early birds"
        arrived.set()
        await stream.receive_some()

    async with far_end(play, with_101=b"at once") as end, running_gateway(settings_for(end.url)) as gateway:
        client = await open_tunnel(gateway, early=b"early birds")
        assert await client.exactly(7) == b"at once"
        await arrived.wait()
        assert end.early == [b""], "the client's bytes left before the upstream had agreed"


async def test_half_close_of_the_client() -> None:
    """A client's end is the upstream's end of reading; what the upstream says afterwards still arrives, all of it."""
    answer = noise(700_000)
    seen: list[bytes] = []

    async def play(stream: trio.SocketStream) -> None:
        seen.append(await drain(stream))
        await stream.send_all(answer)

    async with far_end(play) as end, running_gateway(settings_for(end.url)) as gateway:
        client = await open_tunnel(gateway)
        question = noise(300_000)
        await client.send(question)
        client.shutdown()
        assert await client.rest() == answer
        assert client.ended_by == "fin"
        assert seen == [question]
        assert (await gateway.records.one()).outcome is Outcome.COMPLETED


async def test_half_close_of_the_upstream() -> None:
    """An upstream's end is the client's end of reading; what the client says afterwards still arrives, all of it."""
    seen: list[bytes] = []

    async def play(stream: trio.SocketStream) -> None:
        await stream.send_all(b"good-bye")
        await stream.send_eof()
        seen.append(await drain(stream))

    async with far_end(play) as end, running_gateway(settings_for(end.url)) as gateway:
        client = await open_tunnel(gateway)
        assert await client.rest() == b"good-bye"
        assert client.ended_by == "fin"
        last_words = noise(500_000)
        await client.send(last_words)
        client.shutdown()
        record = await gateway.records.one()
        await eventually(lambda: seen == [last_words])
        assert record.outcome is Outcome.COMPLETED
        assert record.request_bytes == len(last_words)


async def test_last_words_and_end_in_one_segment() -> None:
    """A close frame followed by FIN at once reaches the upstream: the FIN does not overtake it."""
    seen: list[bytes] = []

    async def play(stream: trio.SocketStream) -> None:
        seen.append(await drain(stream))

    async with far_end(play) as end, running_gateway(settings_for(end.url)) as gateway:
        for _ in range(10):
            client = await open_tunnel(gateway)
            await client.send(b"\x88\x80\x00\x00\x00\x00")
            client.shutdown()
            assert await client.rest() == b""
        assert seen == [b"\x88\x80\x00\x00\x00\x00"] * 10


@pytest.mark.parametrize("silent", [True, False], ids=["silent", "flooding"])
async def test_client_that_breaks_the_connection(silent: bool) -> None:
    """A reset closes the upstream at once, even while neither side takes anything."""

    async def play(stream: trio.SocketStream) -> None:
        while not silent:
            await stream.send_all(b"x" * 65_536)
        await trio.sleep_forever()

    async with far_end(play, buffer=65_536) as end, running_gateway(settings_for(end.url)) as gateway:
        client = await open_tunnel(gateway)
        with trio.move_on_after(0.5):  # until every buffer on the way up is full
            await client.send(b"y" * 20_000_000)
        client.reset()
        record = await gateway.records.one()
        assert record.outcome is Outcome.CLIENT_GONE
        assert record.cancel_latency is not None


async def test_client_that_breaks_the_connection_after_its_end() -> None:
    """A reset behind the client's end closes the upstream at once: nobody reads that direction any more."""
    ended = trio.Event()

    async def play(stream: trio.SocketStream) -> None:
        assert await drain(stream) == b"last words"
        ended.set()
        await trio.sleep_forever()

    async with far_end(play) as end, running_gateway(settings_for(end.url)) as gateway:
        client = await open_tunnel(gateway)
        await client.send(b"last words")
        client.shutdown()
        await ended.wait()
        client.reset()
        record = await gateway.records.one()
        assert record.outcome is Outcome.CLIENT_GONE
        assert record.cancel_latency is not None


@pytest.mark.parametrize("silent", [True, False], ids=["silent", "flooding"])
async def test_upstream_that_breaks_the_connection(silent: bool) -> None:
    """A reset of the upstream ends the tunnel for the client, and is the upstream's failure."""
    go = trio.Event()

    async def play(stream: trio.SocketStream) -> None:
        await go.wait()
        stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        stream.socket.close()

    async with far_end(play, buffer=65_536) as end, running_gateway(settings_for(end.url)) as gateway:
        client = await open_tunnel(gateway)
        if not silent:
            with trio.move_on_after(0.3):
                await client.send(b"y" * 20_000_000)
        go.set()
        await client.rest()
        record = await gateway.records.one()
        assert record.outcome is Outcome.UPSTREAM_FAILED


BOUNDS = Bounds(piece_bytes=4096, capacity=2, handover_bytes=4096, upstream_receive_bytes=65_536)
KERNEL = 600_000  # bytes: more than the kernels of one direction hold with the buffers below


@pytest.mark.parametrize("direction", ["up", "down"])
async def test_backpressure(direction: str) -> None:
    """Whoever does not read stops the other side, whose direction only holds what the kernels and one flow hold."""
    go = trio.Event()
    size = 8_000_000
    sent = [0]

    async def pour(stream: trio.abc.SendStream) -> None:
        for _ in range(size // 4000):
            await stream.send_all(b"z" * 4000)
            sent[0] += 4000

    async def play(stream: trio.SocketStream) -> None:
        if direction == "down":
            await pour(stream)
            return
        await go.wait()
        assert len(await receive_exactly(stream, size)) == size

    async with (
        far_end(play, buffer=32_768) as end,
        running_gateway(settings_for(end.url, bounds=BOUNDS), send_buffer=32_768) as gateway,
    ):
        client = await gateway.connect(receive_buffer=32_768)
        await client.send(UPGRADE)
        assert (await client.final_head()).status == 101
        async with trio.open_nursery() as nursery:
            if direction == "up":
                nursery.start_soon(pour, client.stream)
            stood_still = -1
            while stood_still != sent[0]:
                stood_still = sent[0]
                await trio.sleep(0.2)
            assert 0 < stood_still < (KERNEL if direction == "down" else KERNEL + 4_000_000)
            go.set()
            if direction == "down":
                assert len(await client.exactly(size)) == size
        client.shutdown()
        record = await gateway.records.one()
        assert record.outcome is Outcome.COMPLETED
        assert size in (record.request_bytes, record.response_bytes)


@pytest.mark.parametrize("status", [200, 400])
async def test_refused_upgrade(status: int) -> None:
    """An upstream that stays with HTTP answers as to any request; the connection goes on, early bytes or not."""
    script = reply({"no": "websocket"}) if status == 200 else openai_error(status, "no websocket")
    async with scene(script) as (_, gateway):
        client = await gateway.connect()
        await client.send(UPGRADE)
        response = await client.response()
        assert response.status == status
        assert response.body == script.payload
        await client.send(request("GET", "/v1/models"))
        assert (await client.response()).status == status
        first, second = await gateway.records.wait(2)
        assert first.outcome is second.outcome is Outcome.COMPLETED


async def test_bytes_after_a_refused_upgrade_are_the_next_request() -> None:
    """What came behind the handshake is HTTP again, and is judged as such."""
    async with scene(openai_error(400)) as (upstream, gateway):
        client = await gateway.connect()
        await client.send(UPGRADE + b"\x81\x85garbage\r\n\r\n")
        assert (await client.response()).status == 400
        refused = await client.response()
        assert refused.error["code"] == "malformed_request"
        assert len(upstream.requests) == 1


async def test_switch_that_nobody_asked_for() -> None:
    """A 101 to a plain request is a malformed response: 502, never a tunnel."""
    async with scene(Script((Send(SWITCH), Stall()))) as (_, gateway):
        response = await gateway.ask(request("GET", "/"))
        assert response.status == 502
        assert response.error["code"] == "upstream_malformed"


async def test_echo() -> None:
    """Ping-pong, one small piece at a time: nothing is held for more."""
    async with scene(Script((Send(SWITCH), Echo()))) as (_, gateway):
        client = await open_tunnel(gateway)
        for index in range(50):
            word = b"word %d" % index
            await client.send(word)
            assert await client.exactly(len(word)) == word
