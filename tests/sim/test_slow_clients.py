"""A client that does not read: whose turn it is, when it has stalled, and that nobody else is blamed for it."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing
from kit import chat
from simkit import EXACT, OK, SSE, Conversation, ended, failed, little, only_record, since, world

from canal_trio.errors import Kind, Phase, Side
from canal_trio.hooks import Outcome
from canal_trio.policy.exchange import blames_upstream
from canal_trio.settings import Deadlines
from canal_trio.testing.simstream import SimLink


async def answer_ok(upstream: Conversation) -> None:
    """A whole answer at once."""
    await upstream.say(OK)


NARROW = SimLink(buffer=20_000)


async def floods(upstream: Conversation) -> None:
    """An endless stream."""
    await upstream.say(SSE)
    while True:
        await upstream.chunk(b"data: " + b"x" * 1000 + b"\n\n")


async def test_client_write(autojump_clock: Any, handover: bool) -> None:
    """30 s after the client's kernel took its last byte: reset, `client_stalled`, the upstream closed, not blamed."""
    async with world(floods, handover=handover) as here:
        client = here.connect(to_client=NARROW)
        await client.send(chat())
        await client.final_head()
        await trio.testing.wait_all_tasks_blocked()
        start = trio.current_time()
        record = await only_record(here)
        assert since(start) == 30
        assert record.outcome is Outcome.CLIENT_STALLED
        failed(record, Side.CLIENT, Phase.STREAM, Kind.STALLED)
        assert record.failure is not None
        assert not blames_upstream(record.failure)
        assert here.conversations[0].left == pytest.approx(start + 30, abs=EXACT)
        assert record.cancel_latency is None
        await ended(client)
        assert client.ended_by == "reset"


async def test_client_write_of_a_head(autojump_clock: Any, handover: bool) -> None:
    """A client that does not even take the head stalls as well."""
    async with world(answer_ok, handover=handover) as here:
        client = here.connect(to_client=SimLink(buffer=10))
        start = trio.current_time()
        await client.send(chat())
        record = await only_record(here)
        assert since(start) == 30
        assert record.outcome is Outcome.CLIENT_STALLED
        await ended(client)
        assert client.ended_by == "reset"


async def test_client_write_of_an_error(autojump_clock: Any, handover: bool) -> None:
    """Nor may a client hold a connection open by not taking the gateway's own answer."""
    async with world(handover=handover) as here:
        client = here.connect(to_client=SimLink(buffer=10))
        start = trio.current_time()
        await client.send(b"nonsense\r\n\r\n")
        assert (await only_record(here)).outcome is Outcome.REJECTED
        assert since(start) == 30
        await ended(client)
        assert client.ended_by == "reset"


async def test_slow_client_is_no_stalled_upstream(autojump_clock: Any, handover: bool) -> None:
    """Five minutes of a client that reads a little every 29 s: nobody is blamed, and all bytes arrive in the end."""
    events = [b"data: %d %b\n\n" % (index, b"x" * 1000) for index in range(1000)]

    async def answers(upstream: Conversation) -> None:
        await upstream.say(SSE)
        await upstream.chunk(*events)
        await upstream.say(b"0\r\n\r\n")

    async with world(answers, handover=handover, deadlines=Deadlines(upstream_idle=5, body_idle=5)) as here:
        client = here.connect(to_client=NARROW)
        await client.send(chat())
        head = await client.final_head()
        start = trio.current_time()
        while trio.current_time() < start + 300:
            await trio.sleep(29)
            before = len(client.seen)
            while len(client.seen) - before < little(handover=handover):
                assert await client.fill(500)
        await client.body(head)
        assert head.complete
        assert head.body == b"".join(events)
        record = await only_record(here)
        assert record.outcome is Outcome.COMPLETED
        assert record.failure is None
        assert record.longest_gap > 25


async def test_slow_client_that_stops_altogether(autojump_clock: Any, handover: bool) -> None:
    """After minutes of slow reading the 30 s still count from the last byte the client's kernel took."""
    async with world(floods, handover=handover) as here:
        client = here.connect(to_client=NARROW)
        await client.send(chat())
        await client.final_head()
        for _ in range(10):
            await trio.sleep(29)
            for _ in range(50):
                assert await client.fill(1000)
        await trio.testing.wait_all_tasks_blocked()
        start = trio.current_time()
        record = await only_record(here)
        assert since(start) == 30
        assert record.outcome is Outcome.CLIENT_STALLED
