"""The deadlines of the upstream's side and of the whole (design, section 8), exact to the second, on both paths."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing
from kit import Response, chat, request
from simkit import EXACT, SSE, Conversation, answer_ok, ended, failed, little, only_record, since, take, world

from canal_trio.errors import Kind, Phase, Side
from canal_trio.hooks import Outcome
from canal_trio.policy.exchange import blames_upstream
from canal_trio.settings import Deadlines, Upstream

EVENT = b'data: {"n":1}\n\n'


async def say_nothing(_upstream: Conversation) -> None:
    """No answer, ever."""
    await trio.sleep_forever()


async def one_event_then_silence(upstream: Conversation) -> None:
    """A head, an event, and nothing more."""
    await upstream.say(SSE)
    await upstream.chunk(EVENT)
    await trio.sleep_forever()


# -- the upstream's side -----------------------------------------------------------------------------------------------


async def test_lease(autojump_clock: Any, handover: bool) -> None:
    """10 s in the queue for a connection: 503 with retry-after, nobody is blamed."""
    only = Upstream("u0", "http://upstream.test/v1", connections=1)
    async with world(one_event_then_silence, handover=handover, upstream=only) as here:
        holder, waiter = here.connect(), here.connect()
        await holder.send(chat())
        await holder.until(EVENT)
        start = trio.current_time()
        await waiter.send(chat())
        response = await waiter.response()
        assert since(start) == 10
        assert response.status == 503
        assert int(response.header("retry-after") or 0) >= 1
        record = await only_record(here)
        assert record.outcome is Outcome.REJECTED
        failed(record, Side.GATEWAY, Phase.LEASE, Kind.UNAVAILABLE)


async def test_first_byte(autojump_clock: Any, handover: bool) -> None:
    """300 s from the end of the request: 504, no hint to retry, the upstream closed in the same moment."""
    async with world(say_nothing, handover=handover) as here:
        client = here.connect()
        body = b"x" * 100
        await client.send(request("POST", "/v1/files", None, "Content-Length: 100") + body[:50])
        await trio.sleep(20)
        await client.send(body[50:])
        start = trio.current_time()
        response = await client.response()
        assert since(start) == 300
        assert response.status == 504
        assert response.error["code"] == "upstream_timeout"
        assert response.header("x-should-retry") == "false"
        assert here.conversations[0].left == pytest.approx(start + 300, abs=EXACT)
        record = await only_record(here)
        failed(record, Side.UPSTREAM, Phase.FIRST_BYTE, Kind.TIMEOUT)
        assert record.failure is not None
        assert blames_upstream(record.failure)


@pytest.mark.parametrize("streamed", [True, False], ids=["stream", "plain-body"])
async def test_between_upstream_bytes(autojump_clock: Any, handover: bool, streamed: bool) -> None:
    """120 s without a byte in the middle of a response: told in an event where it can be, never ended cleanly."""

    async def falls_silent(upstream: Conversation) -> None:
        await upstream.say(SSE if streamed else SSE.replace(b"event-stream", b"plain"))
        for _ in range(4):
            await trio.sleep(119)
            await upstream.chunk(EVENT)
        await trio.sleep_forever()

    async with world(falls_silent, handover=handover) as here:
        client, start = here.connect(), trio.current_time()
        await client.send(chat())
        response = await client.response()
        assert since(start) == 4 * 119 + 120
        assert not response.complete
        appended = response.body.removeprefix(EVENT * 4)
        assert (b'"upstream_stalled"' in appended) == streamed
        record = await only_record(here)
        assert record.outcome is Outcome.UPSTREAM_FAILED
        failed(record, Side.UPSTREAM, Phase.STREAM, Kind.STALLED)
        assert here.conversations[0].left == pytest.approx(start + 4 * 119 + 120, abs=EXACT)


async def test_upstream_that_does_not_take_the_request(autojump_clock: Any, handover: bool) -> None:
    """120 s without a byte of the request being taken: 504; taking a little now and then is not stalling."""

    async def takes_a_little(upstream: Conversation) -> None:
        for _ in range(5):
            await take(upstream, little(handover=handover))
            await trio.sleep(100)
        await trio.sleep_forever()

    async with world(takes_a_little, handover=handover) as here:
        here.by_request = False
        client, start = here.connect(), trio.current_time()
        await client.send(request("POST", "/v1/files", b"x" * 200_000))
        response = await client.response()
        assert response.status == 504
        assert since(start) == 400 + 120
        record = await only_record(here)
        failed(record, Side.UPSTREAM, Phase.SEND, Kind.STALLED)


async def test_upstream_that_has_begun_its_head_and_takes_no_more_of_the_request(
    autojump_clock: Any, handover: bool
) -> None:
    """120 s without a byte of the request being taken, with bytes of a head in between: 504, and it says what stalled.

    A head that came byte by byte would else never be late.
    """

    async def begins_to_answer(upstream: Conversation) -> None:
        await take(upstream, little(handover=handover))
        for byte in SSE:
            await trio.sleep(50)
            await upstream.say(bytes([byte]))

    async with world(begins_to_answer, handover=handover) as here:
        here.by_request = False
        client, start = here.connect(), trio.current_time()
        await client.send(request("POST", "/v1/files", b"x" * 200_000))
        response = await client.response()
        assert response.status == 504
        assert since(start) == 120
        assert response.error["code"] == "upstream_stalled"
        assert "It took no byte of the request for 120 s." in response.error["message"]
        record = await only_record(here)
        failed(record, Side.UPSTREAM, Phase.SEND, Kind.STALLED)


@pytest.mark.parametrize(("scheme", "due"), [("http", 5), ("https", 10)])
async def test_connect(autojump_clock: Any, handover: bool, scheme: str, due: int) -> None:
    """A dial that comes to nothing is given up after 5 s, with TLS after 10 s, whatever the dialer does: 504."""
    async with world(handover=handover, upstream=Upstream("u0", f"{scheme}://upstream.test")) as here:
        cancelled = []

        async def never(_upstream: Upstream) -> Any:
            try:
                await trio.sleep_forever()
            finally:
                cancelled.append(trio.current_time())

        here.dialer = never
        client, start = here.connect(), trio.current_time()
        await client.send(chat())
        response = await client.response()
        assert since(start) == due
        assert cancelled == [pytest.approx(start + due, abs=EXACT)]
        assert response.status == 504
        assert response.header("x-should-retry") == "true"
        failed(await only_record(here), Side.UPSTREAM, Phase.DIAL, Kind.TIMEOUT)


async def test_body_end_after_the_last_event(autojump_clock: Any, handover: bool) -> None:
    """1 s after `[DONE]` the body is ended for the upstream, which is closed; the client's connection goes on."""

    async def never_ends(upstream: Conversation) -> None:
        await upstream.say(SSE)
        await upstream.chunk(EVENT, b"data: [DONE]\n\n")
        await trio.sleep_forever()

    async with world(never_ends, handover=handover) as here:
        client = here.connect()
        for _ in range(2):
            start = trio.current_time()
            await client.send(chat())
            response = await client.response()
            assert since(start) == 1
            assert response.complete
            assert response.body == EVENT + b"data: [DONE]\n\n"
        for record in here.records.all:
            assert record.outcome is Outcome.COMPLETED
            assert record.flags == ("late_body_end",)
        assert [conversation.left is not None for conversation in here.conversations] == [True, True]


async def test_idle_upstream_connection(autojump_clock: Any, handover: bool) -> None:
    """An idle connection to an upstream is used again within 60 s and closed after them."""
    async with world(answer_ok, handover=handover) as here:
        for wait, connections in ((0, 1), (59, 1), (61, 2)):
            await trio.sleep(wait)
            client = here.connect()
            await client.send(request("GET", "/"))
            assert (await client.response()).status == 200
            assert len(here.conversations) == connections
        assert here.conversations[0].left is not None


# -- the whole ---------------------------------------------------------------------------------------------------------


async def test_exchange_before_the_head(autojump_clock: Any, handover: bool) -> None:
    """Where the whole exchange has a deadline: 504, the upstream closed and not blamed."""
    async with world(say_nothing, handover=handover, deadlines=Deadlines(exchange=42)) as here:
        client, start = here.connect(), trio.current_time()
        await client.send(chat())
        response = await client.response()
        assert since(start) == 42
        assert response.status == 504
        assert response.error["code"] == "deadline_exceeded"
        assert here.conversations[0].left == pytest.approx(start + 42, abs=EXACT)
        failed(await only_record(here), Side.GATEWAY, Phase.FIRST_BYTE, Kind.TIMEOUT)


@pytest.mark.parametrize("last", [EVENT, b'data: {"ha'], ids=["between-events", "inside-an-event"])
async def test_exchange_in_mid_stream(autojump_clock: Any, handover: bool, last: bytes) -> None:
    """The same in mid-stream: an event says so where it can, and the body is left unterminated."""

    async def ticks(upstream: Conversation) -> None:
        await upstream.say(SSE)
        await upstream.chunk(EVENT, last)
        await trio.sleep_forever()

    async with world(ticks, handover=handover, deadlines=Deadlines(exchange=42)) as here:
        client, start = here.connect(), trio.current_time()
        await client.send(chat())
        response: Response = await client.response()
        assert since(start) == 42
        assert not response.complete
        appended = response.body.removeprefix(EVENT + last)
        assert (b'"deadline_exceeded"' in appended) == (last == EVENT)
        assert b"[DONE]" not in response.body
        record = await only_record(here)
        assert record.status == 200
        failed(record, Side.GATEWAY, Phase.STREAM, Kind.TIMEOUT)
        assert record.failure is not None
        assert record.failure.detail.endswith("."), "a sentence, as of any failure"
        assert here.conversations[0].left == pytest.approx(start + 42, abs=EXACT)


async def test_drain(autojump_clock: Any, handover: bool) -> None:
    """What is in flight has 30 s to finish; then it is told `gateway_draining` and left unterminated."""

    async def ticks(upstream: Conversation) -> None:
        await upstream.say(SSE)
        for _ in range(100):
            await trio.sleep(1)
            await upstream.chunk(EVENT)

    async with world(ticks, handover=handover) as here:
        client, idle = here.connect(), here.connect()
        await client.send(chat())
        await client.until(EVENT)
        start = trio.current_time()
        assert [view.deadline for view in here.gateway.exchanges()] == [None]
        here.gateway.drain(start + 30)
        assert [view.deadline for view in here.gateway.exchanges()] == [30]
        assert await idle.rest() == b""
        assert since(start) == 0
        rest = await client.rest()
        assert since(start) == 30
        assert client.ended_by == "fin"
        assert rest.count(EVENT) in (29, 30)  # the last one is due in the very same moment
        assert b'"gateway_draining"' in rest
        assert not rest.endswith(b"0\r\n\r\n")
        record = await only_record(here)
        assert record.outcome is Outcome.DRAINED
        assert here.conversations[0].left == pytest.approx(start + 30, abs=EXACT)


SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
UPGRADE = request("GET", "/v1/realtime", None, "Connection: Upgrade", "Upgrade: websocket")


@pytest.mark.parametrize("talker", ["client", "upstream"])
async def test_tunnel_idle(autojump_clock: Any, handover: bool, talker: str) -> None:
    """300 s without a byte in either direction end a tunnel; a byte in one direction is enough. Nobody is blamed."""

    async def switches(upstream: Conversation) -> None:
        await upstream.say(SWITCH)
        for _ in range(3 if talker == "upstream" else 0):
            await trio.sleep(299)
            await upstream.say(b"x")
        async for _ in upstream.stream:
            pass

    async with world(switches, handover=handover) as here:
        client, start = here.connect(), trio.current_time()
        await client.send(UPGRADE)
        assert (await client.final_head()).status == 101
        for _ in range(3 if talker == "client" else 0):
            await trio.sleep(299)
            await client.send(b"x")
        await ended(client)
        assert since(start) == 3 * 299 + 300
        record = await only_record(here)
        assert record.failure is not None
        assert not blames_upstream(record.failure)
        assert record.failure.kind is Kind.TIMEOUT
