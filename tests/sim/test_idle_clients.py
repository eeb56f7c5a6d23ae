"""Connections that ask for nothing: they go first when others need the room, and nobody who asks is touched."""

from __future__ import annotations

from typing import Any

import trio
import trio.testing
from kit import chat, request
from simkit import OK, SSE, Conversation, ended, world

GET = request("GET", "/v1/models")


async def answers(upstream: Conversation) -> None:
    """A stream for a chat that goes on for long, a whole answer to anything else."""
    if not upstream.requests[-1].startswith(b"POST"):
        await upstream.say(OK)
        return
    await upstream.say(SSE)
    for number in range(100):
        await upstream.chunk(b"data: %d\n\n" % number)
        await trio.sleep(1)
    await upstream.say(b"0\r\n\r\n")


async def test_the_longest_idle_goes_first(autojump_clock: Any, handover: bool) -> None:
    """Counted from the end of the last answer, not from the beginning of the connection; closed without an answer."""
    async with world(answers, handover=handover) as here:
        old, silent, fresh = here.connect(), here.connect(), here.connect()
        await trio.sleep(10)
        await old.send(GET)
        assert (await old.response()).status == 200
        await trio.sleep(10)
        await fresh.send(GET)
        assert (await fresh.response()).status == 200
        await trio.sleep(2)
        for client in (silent, old, fresh):
            assert here.gateway.make_room(1) == 1
            assert await ended(client) == "fin"
            await trio.testing.wait_all_tasks_blocked()
        assert here.gateway.make_room(1) == 0
        assert len(here.records.all) == 2


async def test_who_asks_is_not_touched(autojump_clock: Any, handover: bool) -> None:
    """A stream, a head or a body on its way, a request that was answered just now: none of them is idle."""
    async with world(answers, handover=handover) as here:
        streaming, head, body, just_now = (here.connect() for _ in range(4))
        await streaming.send(chat())
        response = await streaming.final_head()
        await head.send(GET[:20])
        await body.send(request("POST", "/v1/files", None, "Content-Length: 100") + b"x")
        await trio.sleep(5)
        await just_now.send(GET)
        assert (await just_now.response()).status == 200
        await trio.sleep(0.5)
        assert here.gateway.make_room() == 0
        await head.send(GET[20:])
        assert (await head.response()).status == 200
        await streaming.body(response)
        assert response.complete
        assert response.body.endswith(b"data: 99\n\n")


async def test_a_bounded_number_goes_at_once(autojump_clock: Any, handover: bool) -> None:
    """32 of them, so that a look stays cheap and one who knocks does not empty the house."""
    async with world(answers, handover=handover) as here:
        for _ in range(40):
            here.connect()
        await trio.sleep(2)
        assert here.gateway.make_room() == 32
        await trio.testing.wait_all_tasks_blocked()
        assert here.gateway.statistics().connections == 40 - 32
