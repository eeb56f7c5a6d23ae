"""Accounting in a simulated network: what an exchange used, read from bytes that nobody changed, on both ways."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio
from kit import request
from simkit import SSE, URL, Conversation, only_record, world

from canal_trio.hooks import Outcome, Usage, UsageSource
from canal_trio.settings import Ledger, Upstream
from canal_trio.testing.simstream import SimLink

EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}],"usage":null}\n\n'
CHUNK = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10}}\n\n'
DONE = b"data: [DONE]\n\n"
END = b"0\r\n\r\n"
WAYS = pytest.mark.parametrize("heartbeat", [None, 50.0], ids=["straight", "pair"])


def chat(*, stream: bool = True) -> bytes:
    """A chat request that asks for its usage, so that nothing is edited."""
    body = {"model": "m", "stream": stream, "stream_options": {"include_usage": True}, "messages": []}
    return request("POST", "/v1/chat/completions", json.dumps(body).encode(), "Content-Type: application/json")


def upstream(heartbeat: float | None) -> Upstream:
    """With heartbeats an attempt goes as a pair."""
    return Upstream("u0", URL, heartbeat=heartbeat)


@WAYS
async def test_a_stream_that_tells(autojump_clock: Any, handover: bool, heartbeat: float | None) -> None:
    """The counts of the usage chunk are the record's, and the client has every byte."""
    pieces = [EVENT, EVENT + CHUNK[:30], CHUNK[30:40], CHUNK[40:] + DONE]

    async def play(peer: Conversation) -> None:
        await peer.say(SSE)
        for piece in pieces:
            await trio.sleep(1)
            await peer.chunk(piece)
        await peer.say(END)

    async with world(play, handover=handover, upstream=upstream(heartbeat), count_tokens=True) as here:
        client = here.connect()
        await client.send(chat())
        assert (await client.response()).body == b"".join(pieces)
        record = await here.records.one()
        assert record.outcome is Outcome.COMPLETED
        assert (record.usage, record.usage_source) == (Usage(7, 3), UsageSource.UPSTREAM)


@WAYS
async def test_a_body_that_tells(autojump_clock: Any, handover: bool, heartbeat: float | None) -> None:
    """An answer in one piece, and one in two, tell as a stream does."""
    body = json.dumps({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 6}}).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=utf-8\r\nContent-Length: %d\r\n\r\n" % len(body)

    async def play(peer: Conversation) -> None:
        if peer.number == 0 and len(peer.requests) == 1:
            await peer.say(head + body)
            return
        await peer.say(head)
        await trio.sleep(1)
        await peer.say(body[:31])
        await trio.sleep(1)
        await peer.say(body[31:])

    async with world(play, handover=handover, upstream=upstream(heartbeat), count_tokens=True) as here:
        client = here.connect()
        for _ in range(2):
            await client.send(chat(stream=False))
            assert (await client.response()).body == body
        for record in await here.records.wait(2):
            assert (record.usage, record.usage_source) == (Usage(5, 6), UsageSource.UPSTREAM)


@WAYS
async def test_aborted_streams_are_not_billed_nothing(
    autojump_clock: Any, handover: bool, heartbeat: float | None
) -> None:
    """litellm 14457, new-api 5235: leaving just before the usage chunk leaves an estimate, said to be one."""

    async def play(peer: Conversation) -> None:
        await peer.say(SSE)
        await peer.chunk(EVENT, EVENT, EVENT)
        await trio.sleep_forever()

    async with world(play, handover=handover, upstream=upstream(heartbeat), count_tokens=True) as here:
        client = here.connect()
        await client.send(chat())
        await client.until(EVENT)
        await trio.sleep(1)
        client.stream.close()  # type: ignore[attr-defined]
        record = await only_record(here)
        assert record.outcome is Outcome.CLIENT_GONE
        assert record.usage_source is UsageSource.ESTIMATED
        assert record.usage == Usage(-(-record.request_bytes // 4), 3)


async def test_not_billed_for_what_never_ran(autojump_clock: Any, handover: bool) -> None:
    """An upstream that cannot be reached, an error, and a request for no generation used nothing."""

    async def play(peer: Conversation) -> None:
        head = b"HTTP/1.1 400 No\r\nContent-Type: application/json\r\nContent-Length: 12\r\n\r\n"
        await peer.say(head + b'{"error":{}}')

    async with world(play, handover=handover, count_tokens=True) as here:
        client = here.connect()
        await client.send(chat(stream=False))
        await client.response()
        await client.send(request("GET", "/v1/models"))
        await client.response()
        for record in await here.records.wait(2):
            assert (record.usage, record.usage_source) == (None, UsageSource.NONE)


async def test_a_stream_that_tells_nothing_is_estimated(autojump_clock: Any, handover: bool) -> None:
    """A whole stream without usage has an estimate: as many tokens as events, `[DONE]` not counted."""

    async def play(peer: Conversation) -> None:
        await peer.say(SSE)
        await peer.chunk(EVENT, EVENT, DONE)
        await peer.say(END)

    async with world(play, handover=handover, count_tokens=True) as here:
        client = here.connect()
        await client.send(chat())
        await client.response()
        record = await here.records.one()
        assert record.usage is not None
        assert (record.usage.completion, record.usage_source) == (2, UsageSource.ESTIMATED)


@pytest.mark.parametrize("leaves", [True, False])
async def test_leaving_while_a_body_is_generated(autojump_clock: Any, handover: bool, leaves: bool) -> None:
    """Without streaming, nobody saw how far a generation had come: its prompt is estimated, if it was sent at all."""

    async def play(peer: Conversation) -> None:
        await trio.sleep_forever()

    async with world(play, handover=handover, count_tokens=True) as here:
        client = here.connect()
        if not leaves:
            here.dialer = _never
        await client.send(chat(stream=False))
        await trio.sleep(1)
        client.stream.close()  # type: ignore[attr-defined]
        record = await only_record(here)
        assert record.usage_source is (UsageSource.ESTIMATED if leaves else UsageSource.NONE)
        assert (record.usage is not None and record.usage.completion == 0) is leaves


async def _never(_upstream: Upstream) -> None:
    await trio.sleep_forever()


async def test_off_unless_configured(autojump_clock: Any, handover: bool) -> None:
    """Without accounting nothing is looked at: no usage, and no guess."""

    async def play(peer: Conversation) -> None:
        await peer.say(SSE)
        await peer.chunk(CHUNK, DONE)
        await peer.say(END)

    async with world(play, handover=handover) as here:
        client = here.connect()
        await client.send(chat())
        assert (await client.response()).body == CHUNK + DONE
        record = await here.records.one()
        assert (record.usage, record.usage_source) == (None, UsageSource.NONE)


async def test_a_compressed_answer_is_left_alone(autojump_clock: Any, handover: bool) -> None:
    """gateways.md C16: what comes compressed although identity was asked for passes, and is not read."""
    head = SSE.replace(b"Transfer", b"Content-Encoding: gzip\r\nTransfer")

    async def play(peer: Conversation) -> None:
        await peer.say(head)
        await peer.chunk(CHUNK)
        await peer.say(END)

    async with world(play, handover=handover, count_tokens=True) as here:
        client = here.connect()
        await client.send(chat())
        assert (await client.response()).body == CHUNK
        assert (await here.records.one()).usage_source is UsageSource.ESTIMATED
        assert b"accept-encoding: identity" in here.conversations[0].requests[0].lower()


async def test_a_slow_client_is_accounted_as_any(autojump_clock: Any, handover: bool) -> None:
    """A client that blocks, so that the rest comes through a flow, changes nothing of what was used."""
    events = [b'data: {"n":%d,"x":"%b"}\n\n' % (index, b"y" * 3000) for index in range(60)]

    async def play(peer: Conversation) -> None:
        await peer.say(SSE)
        await peer.chunk(*events, CHUNK[:20], CHUNK[20:] + DONE)
        await peer.say(END)

    async with world(play, handover=handover, count_tokens=True) as here:
        client = here.connect(to_client=SimLink(buffer=2000))
        await client.send(chat())
        head = await client.final_head()
        for _ in range(20):
            await trio.sleep(1)
            assert await client.fill(1000)
        await client.body(head)
        assert head.body == b"".join(events) + CHUNK + DONE
        record = await here.records.one()
        assert (record.usage, record.usage_source) == (Usage(7, 3), UsageSource.UPSTREAM)


@WAYS
async def test_closing_after_the_terminal_event_logged_as_cancelled(
    autojump_clock: Any, handover: bool, heartbeat: float | None
) -> None:
    """new-api 6649, 7062: a client that closes at [DONE], before the upstream has ended, completed, with its usage."""

    async def play(peer: Conversation) -> None:
        await peer.say(SSE)
        await peer.chunk(EVENT, CHUNK, DONE)
        await trio.sleep(0.25)
        await peer.say(END)

    async with world(play, handover=handover, upstream=upstream(heartbeat), count_tokens=True) as here:
        client = here.connect()
        await client.send(chat())
        await client.until(DONE)
        client.stream.close()  # type: ignore[attr-defined]
        record = await only_record(here)
        assert record.outcome is Outcome.COMPLETED
        assert (record.usage, record.usage_source) == (Usage(7, 3), UsageSource.UPSTREAM)


async def test_utf_8_character_cut_between_chunks(autojump_clock: Any, handover: bool) -> None:
    """litellm 18842: a character in two pieces is neither lost nor replaced, and what follows is counted."""
    event = 'data: {"choices":[{"delta":{"content":"🚢é"}}]}\n\n'.encode()

    async def play(peer: Conversation) -> None:
        await peer.say(SSE)
        for at in range(0, len(event), 1):
            await peer.chunk(event[at : at + 1])
            await trio.sleep(0.1)
        await peer.chunk(CHUNK, DONE)
        await peer.say(END)

    async with world(play, handover=handover, count_tokens=True) as here:
        client = here.connect()
        await client.send(chat())
        assert (await client.response()).body == event + CHUNK + DONE
        assert (await here.records.one()).usage == Usage(7, 3)


@pytest.mark.parametrize("body", [b'[{"model":"m"}]', b'{"model":["m"]}', b"{"])
async def test_counting_tokens_refused_bodies_that_it_cannot_read(
    autojump_clock: Any, handover: bool, body: bytes
) -> None:
    """Who only wants to know how many tokens were used loses no request for it; what a ledger is to bill is judged."""

    async def play(peer: Conversation) -> None:
        await peer.say(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    settings: list[dict[str, Any]] = [{"count_tokens": True}, {"ledger": Ledger(file="ledger.db")}]
    for more, status in zip(settings, (200, 400), strict=True):
        async with world(play, handover=handover, **more) as here:
            client = here.connect()
            await client.send(request("POST", "/v1/chat/completions", body, "Content-Type: application/json"))
            assert (await client.response()).status == status
