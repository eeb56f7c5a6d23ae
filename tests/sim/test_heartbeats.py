"""Heartbeats: `: ping` and one newline, after silence, only between events, only after the head, only where asked."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing
from kit import chat, chunked, request
from simkit import SSE, Conversation, world

from canal_trio.hooks import Outcome
from canal_trio.settings import Upstream
from canal_trio.testing.simstream import SimLink

PING = b": ping\n"
EVENT = b"data: 1\n\n"
DONE = b"data: [DONE]\n\n"
END = b"0\r\n\r\n"
BEATING = Upstream("u0", "http://upstream.test/v1", heartbeat=10)


async def test_after_each_silence(autojump_clock: Any, handover: bool) -> None:
    """A ping every 10 s of silence, counted from the last event; each in a chunk of its own, not among the events."""

    async def slow(upstream: Conversation) -> None:
        await upstream.say(SSE)
        for silence in (35, 9, 9, 10.5, 0):
            await trio.sleep(silence)
            await upstream.chunk(EVENT)
        await upstream.say(END)

    async with world(slow, handover=handover, upstream=BEATING) as here:
        client, start = here.connect(), trio.current_time()
        await client.send(chat())
        head = await client.final_head()
        arrivals = []
        while len(arrivals) < 4:
            await client.until(chunked(PING, end=False))
            arrivals.append(trio.current_time() - start)
        assert arrivals == pytest.approx([10, 20, 30, 63], abs=0.01)
        await client.body(head)
        assert head.complete
        assert PING not in head.body
        record = await here.records.one()
        assert record.events == 5
        assert record.response_bytes == 5 * len(EVENT), "what is ours is not counted as the upstream's"
        assert record.outcome is Outcome.COMPLETED


@pytest.mark.parametrize("begun", [b"data: ha", b"data: half\n", b": comment", b"event: e\n"])
async def test_never_inside_an_event(autojump_clock: Any, handover: bool, begun: bytes) -> None:
    """While an event, or a line of any kind, is incomplete there is no ping, however long the silence."""

    async def halts(upstream: Conversation) -> None:
        await upstream.say(SSE)
        await upstream.chunk(EVENT, begun)
        await trio.sleep(100)
        await upstream.chunk(b"\n\n")
        await trio.sleep(15)
        await upstream.say(END)

    async with world(halts, handover=handover, upstream=BEATING) as here:
        client = here.connect()
        await client.send(chat())
        response = await client.response()
        assert response.body == EVENT + begun + b"\n\n" + PING


async def test_never_before_the_head(autojump_clock: Any, handover: bool) -> None:
    """While the upstream thinks, nothing is sent: its status is not known."""

    async def thinks(upstream: Conversation) -> None:
        await trio.sleep(200)
        await upstream.say(SSE)
        await upstream.chunk(EVENT, DONE)
        await upstream.say(END)

    async with world(thinks, handover=handover, upstream=BEATING) as here:
        client = here.connect()
        await client.send(chat())
        response = await client.response()
        assert response.informational == []
        assert response.body == EVENT + DONE


@pytest.mark.parametrize("case", ["off", "not-a-stream", "after-the-last-event", "head"])
async def test_not_where_it_does_not_belong(autojump_clock: Any, handover: bool, case: str) -> None:
    """Off by default; never in a body that is no event stream, behind the last event, or in an answer to HEAD."""

    async def slow(upstream: Conversation) -> None:
        await upstream.say(SSE.replace(b"event-stream", b"plain") if case == "not-a-stream" else SSE)
        if case == "head":
            return
        await upstream.chunk(EVENT, DONE if case == "after-the-last-event" else EVENT)
        await trio.sleep(0.9 if case == "after-the-last-event" else 100)
        await upstream.chunk(b": bye\n\n")
        await upstream.say(END)

    beat = {"off": None, "after-the-last-event": 0.2}.get(case, 10.0)
    async with world(slow, handover=handover, upstream=Upstream("u0", BEATING.base_url, heartbeat=beat)) as here:
        client = here.connect()
        await client.send(request("HEAD", "/") if case == "head" else chat())
        response = await client.response("HEAD" if case == "head" else "POST")
        assert response.complete
        assert PING not in client.seen


async def test_to_a_slow_client(autojump_clock: Any, handover: bool) -> None:
    """A client that lags behind gets no ping between bytes it still has to get; its pings never tear an event."""
    events = [b"data: %d %b\n\n" % (index, b"x" * 3000) for index in range(60)]

    async def floods(upstream: Conversation) -> None:
        await upstream.say(SSE)
        await upstream.chunk(*events)
        await trio.sleep(50)
        await upstream.chunk(DONE)
        await upstream.say(END)

    async with world(floods, handover=handover, upstream=BEATING) as here:
        client = here.connect(to_client=SimLink(buffer=2000))
        await client.send(chat())
        head = await client.final_head()
        while b"data: 30 " not in client.seen:
            await trio.sleep(1)
            for _ in range(10):
                assert await client.fill(1000)
        await client.body(head)
        assert head.complete
        whole = b"".join(events)
        assert head.body.replace(PING, b"") == whole + DONE
        assert head.body.startswith(whole)
        assert head.body.count(PING) >= 4


async def test_to_a_client_of_http_1_0(autojump_clock: Any, handover: bool) -> None:
    """To an HTTP/1.0 client a ping is bare bytes."""

    async def slow(upstream: Conversation) -> None:
        await upstream.say(SSE)
        await upstream.chunk(EVENT)
        await trio.sleep(15)
        await upstream.chunk(DONE)
        await upstream.say(END)

    async with world(slow, handover=handover, upstream=BEATING) as here:
        client = here.connect()
        await client.send(chat(version="1.0"))
        response = await client.response()
        assert response.complete
        assert response.body == EVENT + PING + DONE


async def test_does_not_keep_a_silent_upstream_alive(autojump_clock: Any, handover: bool) -> None:
    """Our own pings are no sign of life of the upstream: after 120 s it has stalled all the same."""

    async def silent(upstream: Conversation) -> None:
        await upstream.say(SSE)
        await upstream.chunk(EVENT)
        await trio.sleep_forever()

    async with world(silent, handover=handover, upstream=BEATING) as here:
        client, start = here.connect(), trio.current_time()
        await client.send(chat())
        response = await client.response()
        assert trio.current_time() - start == pytest.approx(120, abs=0.01)
        assert response.body.count(PING) in (11, 12)  # the last one is due in the same moment
        assert b'"upstream_stalled"' in response.body
        assert (await here.records.one()).outcome is Outcome.UPSTREAM_FAILED
