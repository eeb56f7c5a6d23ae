"""Pipelined requests: how much of them is read, and that the client is seen to leave meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing
from kit import chat, request
from simkit import SSE, Conversation, World, world

from canal_trio.hooks import Outcome
from canal_trio.settings import Upstream
from canal_trio.testing.simstream import SimLink

WIDE = SimLink(buffer=1_000_000)
EVENT = b"data: 1\n\n"
GET = request("GET", "/next")
FINISHES = Upstream("u0", "http://upstream.test/v1", on_client_eof="finish")


async def talks(upstream: Conversation) -> None:
    """An event each second for a while, or a short answer."""
    if upstream.requests[-1].startswith(b"GET"):
        await upstream.say(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        return
    await upstream.say(SSE)
    for _ in range(20):
        await trio.sleep(1)
        await upstream.chunk(EVENT)
    await upstream.say(b"0\r\n\r\n")


def was_read(here: World) -> int:
    """Bytes the gateway has read from its client."""
    stream = here.streams[0]
    return stream.incoming._sent - stream.unread


async def test_what_is_read_ahead(autojump_clock: Any, handover: bool) -> None:
    """One read where a hang-up can be watched; up to 64 KiB where it cannot, and the rest is served in its turn."""
    async with world(talks, handover=handover) as here:
        client = here.connect(to_gateway=WIDE)
        count = 60_000 // len(GET)
        first = chat()
        await client.send(first + GET * count)
        head = await client.final_head()
        await trio.sleep(5)
        assert was_read(here) == (16_384 if handover else len(first) + len(GET) * count)
        await client.body(head)
        assert head.complete
        for _ in range(count):
            assert (await client.response()).body == b"ok"
        assert len(await here.records.wait(count + 1)) == count + 1


async def test_more_than_is_read_ahead(autojump_clock: Any) -> None:
    """Where reading is the only way to see a client leave, more than 64 KiB closes the connection."""
    async with world(talks, handover=False) as here:
        client = here.connect(to_gateway=WIDE)
        await client.send(chat())
        await client.until(EVENT)
        await client.send(GET * 3000)
        await client.rest()
        assert client.ended_by is not None
        assert 65_536 < was_read(here) <= 65_536 + 16_384 + 1000 or here.streams[0].closed
        record = await here.records.one()
        assert record.outcome is Outcome.CLIENT_GONE
        assert record.failure is not None
        assert "pipelined more" in record.failure.detail
        assert here.conversations[0].left is not None


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_leaving_while_a_pipelined_request_waits(autojump_clock: Any, handover: bool, how: str) -> None:
    """The hang-up is seen behind the pipelined bytes: the upstream is closed at once, the waiting request not begun."""
    async with world(talks, handover=handover) as here:
        client = here.connect(to_gateway=WIDE)
        await client.send(chat() + GET)
        await client.until(EVENT)
        start = trio.current_time()
        getattr(client.stream, how)()
        await trio.testing.wait_all_tasks_blocked()
        assert trio.current_time() == start
        record = await here.records.one()
        assert record.outcome is Outcome.CLIENT_GONE
        assert record.cancel_latency is not None
        assert here.conversations[0].left == start
        assert len(here.conversations[0].requests) == 1


async def test_half_closing_behind_pipelined_requests(autojump_clock: Any, handover: bool) -> None:
    """With `on_client_eof = "finish"` a client may close its side behind its requests: each gets its whole answer."""
    async with world(talks, handover=handover, upstream=FINISHES) as here:
        client = here.connect(to_gateway=WIDE)
        await client.send(chat() + GET + GET)
        await client.stream.send_eof()  # type: ignore[attr-defined]  # a simulated stream
        response = await client.response()
        assert response.complete
        assert response.body == EVENT * 20
        for _ in range(2):
            assert (await client.response()).body == b"ok"
        assert await client.rest() == b""
        assert client.ended_by == "fin"
        assert {record.outcome for record in await here.records.wait(3)} == {Outcome.COMPLETED}


async def test_half_closing_in_the_middle_of_a_request(autojump_clock: Any, handover: bool) -> None:
    """That is leaving whatever the route says: the request can never become complete."""
    async with world(talks, handover=handover, upstream=FINISHES) as here:
        client = here.connect()
        await client.send(request("POST", "/", None, "Content-Length: 100") + b"x" * 50)
        await client.stream.send_eof()  # type: ignore[attr-defined]  # a simulated stream
        assert await client.rest() == b""
        record = await here.records.one()
        assert record.outcome is Outcome.CLIENT_GONE
        assert record.request_bytes == 50


@pytest.mark.parametrize("eof", [False, True], ids=["at-once", "after-its-end"])
async def test_reset_of_a_client_that_may_half_close(autojump_clock: Any, handover: bool, eof: bool) -> None:
    """With "finish" an end is no leaving, but a reset always is, before an end and behind it."""
    async with world(talks, handover=handover, upstream=FINISHES) as here:
        client = here.connect()
        await client.send(chat())
        await client.until(EVENT)
        if eof:
            await client.stream.send_eof()  # type: ignore[attr-defined]  # a simulated stream
            await client.until(EVENT)
        client.stream.reset()  # type: ignore[attr-defined]  # the same
        await here.records.wait(seconds=30)
        assert (await here.records.one()).outcome is Outcome.CLIENT_GONE
        assert here.conversations[0].left is not None
