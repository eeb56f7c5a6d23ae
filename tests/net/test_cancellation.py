"""Cancelled at once (design, section 1): in any phase, the step that sees the client leave closes the upstream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import trio
from kit import Client, RunningGateway, chat, data_of, eventually, request, running_gateway, settings_for

from canal_trio.errors import Failure, Kind, Phase, Side
from canal_trio.hooks import ExchangeRecord, Outcome
from canal_trio.relay.poller import HANGUP
from canal_trio.relay.streams import TcpStream
from canal_trio.settings import Settings, Upstream
from canal_trio.testing.scripts import Forever, Script, Send, Stall, chat_stream, cut_after, reply, stream
from canal_trio.testing.upstreams import ScriptedUpstream
from canal_trio.upstream.dial import TcpDialer

TOKEN = b'data: {"t":1}\n\n'


class SpyDialer:
    """The product's own dialer, remembering every socket it made."""

    def __init__(self, settings: Settings) -> None:
        self._inner = TcpDialer(bounds=settings.bounds, deadlines=settings.deadlines)
        self.streams: list[TcpStream] = []

    async def __call__(self, upstream: Upstream, *args: Any, **more: Any) -> Any:
        """As the product's."""
        stream = await self._inner(upstream, *args, **more)
        if isinstance(stream, TcpStream):
            self.streams.append(stream)
        return stream


class SpyPoller:
    """Looks right after the poller's step that reports a client's hang-up: is every upstream socket closed by then?"""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.gateway: RunningGateway | None = None
        self.dialer: SpyDialer | None = None
        self.steps: list[bool] = []
        original = TcpStream.on_ready

        def on_ready(stream: TcpStream, mask: int) -> bool:
            again = original(stream, mask)
            if mask & HANGUP and self.gateway is not None and stream in self.gateway.accepted:
                assert self.dialer is not None
                self.steps.append(all(made.socket.fileno() == -1 for made in self.dialer.streams))
            return again

        patch.setattr(TcpStream, "on_ready", on_ready)


@dataclass
class Stage:
    """One gateway before one upstream, watched."""

    upstream: ScriptedUpstream
    gateway: RunningGateway
    client: Client
    spy: SpyPoller

    async def leave(self, how: str) -> ExchangeRecord:
        """The client leaves; the one record. The upstream must have been closed in that step."""
        self.client.fin() if how == "fin" else self.client.reset()
        record = await self.gateway.records.one()
        assert record.outcome is Outcome.CLIENT_GONE, record
        assert record.failure is not None
        assert (record.failure.side, record.failure.kind) == (Side.CLIENT, Kind.GONE)
        assert record.cancel_latency is not None
        assert 0 <= record.cancel_latency < 0.05
        assert self.spy.steps, "the hang-up was not seen by the poller"
        assert self.spy.steps[0], "the upstream's socket was still open after the step that saw the client leave"
        await self.upstream.until(lambda: self.upstream.connections[-1].left is not None)
        assert self.upstream.open_connections == 0
        return record


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the stage for a script."""
    spy = SpyPoller(monkeypatch)

    @asynccontextmanager
    async def set_up(script: Script, **more: Any) -> AsyncIterator[Stage]:
        async with ScriptedUpstream(script, **more) as upstream:
            settings = settings_for(upstream.url)
            spy.dialer = SpyDialer(settings)
            async with running_gateway(settings, dialer=spy.dialer) as gateway:
                spy.gateway = gateway
                yield Stage(upstream, gateway, await gateway.connect(), spy)

    return set_up


how_it_leaves = pytest.mark.parametrize("how", ["fin", "rst"])


@how_it_leaves
async def test_during_the_upload(stage: Any, how: str) -> None:
    """While the request's body still arrives: the upstream never sees a complete request."""
    async with stage(reply({})) as it:
        body = b'{"model":"m","x":"' + b"x" * 50_000
        head = request("POST", "/v1/chat/completions", None, "Content-Type: text/plain", "Content-Length: 100000")
        await it.client.send(head + body)
        await it.upstream.until(lambda: it.upstream.requests and len(it.upstream.requests[0].body) == len(body))
        record = await it.leave(how)
        assert record.phase is Phase.UPLOAD
        assert record.status is None
        assert record.request_bytes == len(body)
        assert not it.upstream.requests[0].complete


@how_it_leaves
async def test_during_a_chunked_upload(stage: Any, how: str) -> None:
    """The same with a chunked body: no last chunk is made up."""
    async with stage(reply({})) as it:
        head = request("POST", "/v1/files", None, "Content-Type: text/plain", "Transfer-Encoding: chunked")
        await it.client.send(head + b"5\r\nhello\r\n")
        await it.upstream.until(lambda: it.upstream.requests and it.upstream.requests[0].body == b"hello")
        record = await it.leave(how)
        assert record.phase is Phase.UPLOAD
        assert not it.upstream.requests[0].complete


@how_it_leaves
@pytest.mark.parametrize("streamed", [True, False], ids=["stream", "plain"])
async def test_while_the_head_is_awaited(stage: Any, how: str, streamed: bool) -> None:
    """The request is with the upstream, which thinks; `"stream": false` is the long case of it."""
    async with stage(Script((Stall(),))) as it:
        await it.client.send(chat(stream=streamed))
        await it.upstream.until(lambda: it.upstream.requests and it.upstream.requests[0].complete)
        record = await it.leave(how)
        assert record.phase is Phase.FIRST_BYTE
        assert record.status is None
        assert record.attempts == 1
        assert record.response_bytes == record.events == 0


@how_it_leaves
async def test_between_head_and_first_token(stage: Any, how: str) -> None:
    """The head was relayed, no event yet."""
    async with stage(Script((stream([TOKEN]).steps[0], Stall()))) as it:
        await it.client.send(chat())
        assert (await it.client.final_head()).status == 200
        record = await it.leave(how)
        assert record.phase is Phase.FIRST_EVENT
        assert record.status == 200
        assert record.streamed
        assert record.events == 0


@how_it_leaves
async def test_in_the_middle_of_the_stream(stage: Any, how: str) -> None:
    """Between two events: the record knows how many were delivered."""
    script = cut_after(chat_stream(9), 3, Stall())
    async with stage(script) as it:
        await it.client.send(chat())
        await it.client.final_head()
        await eventually_read(it.client, 4)
        record = await it.leave(how)
        assert record.phase is Phase.STREAM
        assert record.events == 4  # the role, and three tokens
        assert record.response_bytes == len(script.payload)
        assert it.upstream.requests[0].tokens == 3


@how_it_leaves
async def test_in_the_middle_of_an_event(stage: Any, how: str) -> None:
    """Inside an event: what was begun does not count."""
    half = b'data: {"half":'
    pieces = stream([TOKEN, half]).wire.removesuffix(b"0\r\n\r\n")
    async with stage(Script((Send(pieces), Stall()))) as it:
        await it.client.send(chat())
        await it.client.until(half)
        record = await it.leave(how)
        assert record.phase is Phase.STREAM
        assert record.events == 1
        assert record.response_bytes == len(TOKEN + half)


@how_it_leaves
async def test_in_the_middle_of_a_plain_body(stage: Any, how: str) -> None:
    """`"stream": false`, the answer on its way."""
    whole = reply(b"x" * 1000)
    async with stage(Script((Send(whole.wire[:-400]), Stall()))) as it:
        await it.client.send(chat(stream=False))
        await it.client.until(b"x" * 600)
        record = await it.leave(how)
        assert record.phase is Phase.STREAM
        assert not record.streamed
        assert record.response_bytes == 600


async def test_while_it_does_not_read(stage: Any) -> None:
    """A client that stopped reading and then leaves: the hang-up is seen although its bytes are unsent."""
    flood = Forever((Send(b"%x\r\n%b\r\n" % (len(TOKEN) * 500, TOKEN * 500)),))
    async with stage(Script((stream([TOKEN]).steps[0], flood)), send_buffer=65536) as it:
        await it.client.send(chat())
        await it.client.final_head()
        await stands_still(it.upstream)
        record = await it.leave("rst")
        assert record.phase is Phase.STREAM


async def test_tunnel(stage: Any) -> None:
    """Inside a tunnel a client's reset closes the upstream, too."""
    switch = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    async with stage(Script((Send(switch), Stall()))) as it:
        await it.client.send(request("GET", "/ws", None, "Connection: Upgrade", "Upgrade: websocket"))
        assert (await it.client.final_head()).status == 101
        it.client.reset()
        await it.upstream.until(lambda: it.upstream.connections[-1].left is not None)
        record = await it.gateway.records.one()
        assert record.outcome is Outcome.CLIENT_GONE
        assert record.status == 101


@how_it_leaves
async def test_while_a_lease_is_awaited(how: str) -> None:
    """A waiter that leaves gives its place in the queue back; the next one is not skipped."""
    script = cut_after(chat_stream(3), 1, Stall())
    async with ScriptedUpstream(script) as upstream:
        settings = settings_for(Upstream("u0", upstream.url, connections=1))
        async with running_gateway(settings) as gateway:
            holder, waiter = await gateway.connect(), await gateway.connect()
            await holder.send(chat())
            await holder.final_head()
            await waiter.send(chat())
            await eventually(lambda: gateway.gateway.statistics().pools["u0"].waiting == 1)
            waiter.fin() if how == "fin" else waiter.reset()
            record = (await gateway.records.wait(1))[0]
            assert record.outcome is Outcome.CLIENT_GONE
            assert record.phase is Phase.LEASE
            assert record.cancel_latency is None, "there was no upstream to close"
            assert gateway.gateway.statistics().pools["u0"].waiting == 0
            upstream.answer = chat_stream(1)
            third = await gateway.connect()
            await third.send(chat())
            await eventually(lambda: gateway.gateway.statistics().pools["u0"].waiting == 1)
            holder.fin()
            assert (await third.response()).complete
            assert len(upstream.requests) == 2


@how_it_leaves
async def test_while_dialling(how: str) -> None:
    """The dial is cancelled; nothing is left of it."""
    cancelled = trio.Event()
    dialling = trio.Event()

    async def dialer(_upstream: Upstream, *_: Any, **__: Any) -> Failure:
        dialling.set()
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    async with running_gateway(settings_for("http://127.0.0.1:9"), dialer=dialer) as gateway:
        client = await gateway.connect()
        await client.send(chat())
        await dialling.wait()
        client.fin() if how == "fin" else client.reset()
        record = await gateway.records.one()
        assert cancelled.is_set()
        assert record.outcome is Outcome.CLIENT_GONE
        assert record.phase in (Phase.LEASE, Phase.DIAL)
        assert record.status is None


async def test_between_two_attempts() -> None:
    """Failing over is no shelter: a client that leaves during the second attempt ends it."""
    async with ScriptedUpstream(Script((Stall(),))) as second:
        settings = settings_for("http://127.0.0.1:1", second.url)
        async with running_gateway(settings) as gateway:
            client = await gateway.connect()
            await client.send(chat())
            await second.until(lambda: second.requests and second.requests[0].complete)
            client.reset()
            record = await gateway.records.one()
            assert record.outcome is Outcome.CLIENT_GONE
            assert record.attempts == 2
            assert record.upstream == "u1"
            await second.until(lambda: second.connections[0].left is not None)


async def test_route_that_finishes_still_sees_a_reset() -> None:
    """With `on_client_eof = "finish"` a FIN is no leaving, a reset still is."""
    script = cut_after(chat_stream(1), 1, Stall())
    async with ScriptedUpstream(script) as upstream:
        settings = settings_for(Upstream("u0", upstream.url, on_client_eof="finish"))
        async with running_gateway(settings) as gateway:
            client = await gateway.connect()
            await client.send(chat())
            await client.until(b"word0")
            client.reset()
            assert (await gateway.records.one()).outcome is Outcome.CLIENT_GONE
            await upstream.until(lambda: upstream.connections[0].left is not None)


async def test_half_closed_client_that_finishes_gets_its_answer() -> None:
    """`on_client_eof = "finish"`: a client that closed its side after the request gets the whole answer."""
    script = chat_stream(3, gap=0.02)
    async with ScriptedUpstream(script) as upstream:
        settings = settings_for(Upstream("u0", upstream.url, on_client_eof="finish"))
        async with running_gateway(settings) as gateway:
            client = await gateway.connect()
            await client.send(chat())
            client.shutdown()
            response = await client.response()
            assert response.complete
            assert response.body == script.payload
            assert (await gateway.records.one()).outcome is Outcome.COMPLETED


async def test_gateway_that_is_stopped_records_what_it_cuts() -> None:
    """Cancelling the gateway itself ends each exchange with its one record, and resets nobody into a clean end."""
    script = cut_after(chat_stream(5), 2, Stall())
    async with ScriptedUpstream(script) as upstream:
        async with running_gateway(settings_for(upstream.url), settle=False) as gateway:
            client = await gateway.connect()
            await client.send(chat())
            await client.until(b"word1")
        record = await gateway.records.one()
        assert record.outcome is Outcome.DRAINED
        assert record.failure is not None
        assert record.failure.kind is Kind.DRAINING
        await upstream.until(lambda: upstream.connections[0].left is not None)


async def eventually_read(client: Client, events: int) -> None:
    """Read until this many events are here."""
    while len(data_of(bytes(client.buffer))) < events or not client.buffer.endswith(b"\n\n\r\n"):
        assert await client.fill()


async def stands_still(upstream: ScriptedUpstream) -> None:
    """Wait until the upstream has sent nothing for a while: every buffer on the way is full."""
    before = -1
    while before != upstream.requests[0].sent:
        before = upstream.requests[0].sent
        await trio.sleep(0.15)
    assert before > 0
