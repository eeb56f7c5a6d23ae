"""Every deadline of the design, section 8, exact to the second, under virtual time, on both paths."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing
from kit import Client, Response, chat, request
from simkit import EXACT, OK, SSE, Conversation, ended, failed, little, only_record, since, world

from canal_trio.errors import Kind, Phase, Side
from canal_trio.hooks import Outcome
from canal_trio.policy.exchange import blames_upstream
from canal_trio.settings import Deadlines, Upstream

EVENT = b'data: {"n":1}\n\n'


async def answer_ok(upstream: Conversation) -> None:
    """A whole answer at once."""
    await upstream.say(OK)


async def say_nothing(_upstream: Conversation) -> None:
    """No answer, ever."""
    await trio.sleep_forever()


async def take(upstream: Conversation, size: int) -> bytes:
    """The next `size` bytes, or up to the end of what came with the last of them."""
    data = b""
    while len(data) < size and not data.endswith(b"!"):
        data += await upstream.stream.receive_some(1000)
    return data


async def one_event_then_silence(upstream: Conversation) -> None:
    """A head, an event, and nothing more."""
    await upstream.say(SSE)
    await upstream.chunk(EVENT)
    await trio.sleep_forever()


# -- the client's side -------------------------------------------------------------------------------------------------


async def test_request_head(autojump_clock: Any, handover: bool) -> None:
    """15 s from its first byte; a byte per second does not extend it; the answer is 408, then the end."""
    async with world(handover=handover) as here:
        client = here.connect()
        await trio.sleep(40)  # before the first byte nothing of it runs
        start = trio.current_time()

        async def dribble() -> None:
            for byte in request("GET", "/" + "a" * 600):
                await client.send(bytes([byte]))
                await trio.sleep(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(dribble)
            response = await client.response()
            assert since(start) == 15
            nursery.cancel_scope.cancel()
        assert response.status == 408
        assert response.error["code"] == "request_timeout"
        assert response.header("connection") == "close"
        assert await ended(client) == "fin"
        record = await only_record(here)
        assert record.outcome is Outcome.REJECTED
        failed(record, Side.CLIENT, Phase.HEAD, Kind.TIMEOUT)


async def test_keep_alive_before_the_first_request(autojump_clock: Any, handover: bool) -> None:
    """A connection that never says anything is closed after 75 s, without an answer and without a record."""
    async with world(handover=handover) as here:
        client, start = here.connect(), trio.current_time()
        assert await client.rest() == b""
        assert client.ended_by == "fin"
        assert since(start) == 75
        assert here.records.all == []


async def test_keep_alive_between_requests(autojump_clock: Any, handover: bool) -> None:
    """75 s from the end of the response, not from the request."""

    async def slow(upstream: Conversation) -> None:
        await trio.sleep(50)
        await upstream.say(OK)

    async with world(slow, handover=handover) as here:
        client = here.connect()
        for _ in range(3):
            await client.send(request("GET", "/"))
            assert (await client.response()).status == 200
            await trio.sleep(74)
        start = trio.current_time() - 74
        assert await client.rest() == b""
        assert since(start) == 75
        assert len(here.records.all) == 3


UPLOAD = request("POST", "/v1/files", None, "Content-Length: 1000000")


async def test_body_idle(autojump_clock: Any, handover: bool) -> None:
    """30 s without a body byte: 408, and the upstream is closed in the same moment."""
    async with world(answer_ok, handover=handover) as here:
        client = here.connect()
        await client.send(UPLOAD)
        for _ in range(5):
            await trio.sleep(29)
            await client.send(b"x" * 40_000)
        start = trio.current_time()
        response = await client.response()
        assert since(start) == 30
        assert response.status == 408
        record = await only_record(here)
        assert record.outcome is Outcome.REJECTED
        failed(record, Side.CLIENT, Phase.UPLOAD, Kind.TIMEOUT)
        assert here.conversations[0].left == pytest.approx(start + 30, abs=EXACT)
        assert here.conversations[0].requests == []


async def trickle(client: Client, rate: int) -> None:
    """Send this many bytes each second."""
    for _ in range(1000):
        await trio.sleep(1)
        await client.send(b"x" * rate)


@pytest.mark.parametrize(("first", "rate", "due"), [(0, 100, 30), (0, 499, 30), (30_000, 10, 61), (16_000, 250, 64)])
async def test_body_rate(autojump_clock: Any, handover: bool, first: int, rate: int, due: int) -> None:
    """500 B/s on average once 30 s were waited: 408 in the second in which the average falls below."""
    async with world(answer_ok, handover=handover) as here:
        client = here.connect()
        await client.send(UPLOAD)
        await trio.testing.wait_all_tasks_blocked()
        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            await client.send(b"x" * first)
            nursery.start_soon(trickle, client, rate)
            response = await client.response()
            assert trio.current_time() - start == pytest.approx(due, abs=1)
            nursery.cancel_scope.cancel()
        assert response.status == 408
        failed(await only_record(here), Side.CLIENT, Phase.UPLOAD, Kind.TIMEOUT)


async def test_body_rate_is_an_average(autojump_clock: Any, handover: bool) -> None:
    """A client that keeps to 500 B/s may upload for as long as it likes."""
    async with world(answer_ok, handover=handover) as here:
        client = here.connect()
        await client.send(request("POST", "/v1/files", None, "Content-Length: 520000"))
        await trickle(client, 520)
        assert (await client.response()).status == 200
        assert (await only_record(here)).outcome is Outcome.COMPLETED


async def test_no_body_deadline_while_the_client_is_throttled(autojump_clock: Any, handover: bool) -> None:
    """While the upstream does not take the upload the client has no turn: no idle and no rate deadline runs."""

    async def lazy(upstream: Conversation) -> None:
        while not (await take(upstream, little(handover=handover))).endswith(b"!"):  # noqa: ASYNC110  # the pause is the point
            await trio.sleep(100)  # less than 500 B/s, and less than its own deadline of 120 s
        await upstream.say(OK)
        await trio.sleep_forever()

    async with world(lazy, handover=handover, deadlines=Deadlines(first_byte=1000)) as here:
        here.by_request = False
        client = here.connect()
        await client.send(request("POST", "/v1/files", b"x" * 299_999 + b"!"))
        assert (await client.response()).status == 200
        assert trio.current_time() > 1000
        assert (await only_record(here)).outcome is Outcome.COMPLETED


async def test_linger(autojump_clock: Any, handover: bool) -> None:
    """After an answer that refuses a body the gateway reads and drops for 2 s, then closes on whoever goes on."""
    async with world(handover=handover) as here:
        client = here.connect()
        await client.send(request("POST", "/", None, "Content-Length: -1") + b"x")
        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trickle, client, 10)
            response = await client.response()
            assert response.status == 400
            assert since(start) == 0
            assert await ended(client) == "fin"
            await here.gateway_closes(0)
            assert since(start) == 2
            nursery.cancel_scope.cancel()


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
