"""Event streams that an upstream compresses, whatever it was asked for: nobody here can read them, so nothing of ours
may stand in them."""

from __future__ import annotations

import gzip
from typing import Any

import pytest
import trio
from kit import chat
from simkit import SSE, URL, Conversation, only_record, world

from canal_trio.errors import Phase, Side
from canal_trio.hooks import Outcome
from canal_trio.settings import Balance, Upstream

CODED = SSE.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n")
DONE = b"data: 1\n\ndata: [DONE]\n\n"
BYTES = gzip.compress(DONE, mtime=0)
END = b"0\r\n\r\n"


def says(*, silence: float, whole: bool = True, thinks: float = 0.0) -> Any:
    """An upstream whose compressed stream is silent between its head and its bytes."""

    async def play(upstream: Conversation) -> None:
        await trio.sleep(thinks)
        await upstream.say(CODED)
        await trio.sleep(silence)
        if whole:
            await upstream.chunk(BYTES)
            await upstream.say(END)
        else:
            upstream.stream.close()

    return play


async def test_a_ping_stood_before_the_first_byte_of_gzip(autojump_clock: Any, handover: bool) -> None:
    """A compressed stream has no heartbeat: its bytes arrive as they are, and it is not flagged for what nobody saw."""
    beating = Upstream("u0", URL, heartbeat=5)
    async with world(says(silence=20), handover=handover, upstream=beating) as here:
        client = here.connect()
        await client.send(chat())
        response = await client.response()
        assert response.complete
        assert gzip.decompress(response.body) == DONE
        record = await only_record(here)
        assert (record.outcome, record.streamed, record.events) == (Outcome.COMPLETED, True, 0)
        assert record.flags == ()


async def test_an_error_event_stood_where_gzip_was_expected(autojump_clock: Any, handover: bool) -> None:
    """A compressed stream that is cut is left without an end, and nothing is added to it."""
    async with world(says(silence=1, whole=False), handover=handover) as here:
        client = here.connect()
        await client.send(chat())
        response = await client.response()
        assert not response.complete
        assert response.body == b""
        assert (await only_record(here)).outcome is Outcome.UPSTREAM_FAILED


async def test_a_compressed_stream_was_held_to_its_end(autojump_clock: Any, handover: bool) -> None:
    """`hold_first_event` does not wait for an event that it could not see."""

    async def play(upstream: Conversation) -> None:
        await upstream.say(CODED)
        await upstream.chunk(BYTES[:12])
        await trio.sleep(30)
        await upstream.chunk(BYTES[12:])
        await upstream.say(END)

    two = (Upstream("u0", URL), Upstream("u1", URL))
    async with world(play, handover=handover, upstreams=two, balance=Balance(hold_first_event=True)) as here:
        client, start = here.connect(), trio.current_time()
        await client.send(chat())
        await client.until(BYTES[:12])
        assert trio.current_time() - start < 1


@pytest.mark.parametrize("heartbeat", [None, 5.0])
async def test_gzip_was_relayed_behind_a_head_that_promised_none(
    autojump_clock: Any, handover: bool, heartbeat: float | None
) -> None:
    """Behind an early head, which said nothing of compression, a compressed stream is a failure of the upstream."""
    early = Upstream("u0", URL, early_head_after=2, heartbeat=heartbeat)
    async with world(says(silence=1, thinks=10), handover=handover, upstream=early) as here:
        client = here.connect()
        await client.send(chat())
        response = await client.response()
        assert (response.status, response.complete) == (200, False)
        assert BYTES[:8] not in response.body
        assert b'data: {"error":' in response.body
        failure = (await only_record(here)).failure
        assert failure is not None
        assert (failure.side, failure.phase) == (Side.UPSTREAM, Phase.FIRST_BYTE)
