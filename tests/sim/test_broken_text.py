"""Text that is not UTF-8 where the gateway reads some: found by the fuzzer, whose decoder raises another error for it.

A client got a 500 for its own mistake, and an upstream could break an exchange that it had served.
"""

from __future__ import annotations

from typing import Any

import pytest
from kit import request
from simkit import SSE, Conversation, only_record, world

from canal_trio.errors import Kind, Phase, Side
from canal_trio.hooks import Outcome
from canal_trio.settings import Model, Target

BROKEN = b'{"model": "\xd4", "messages": []}'
USAGE = b'{"choices": [], "usage": {"prompt_tokens": 1, "\xee": 2, "note": "\xee"}}'


async def served(peer: Conversation) -> None:
    """An answer whose usage holds what is not text, as a body or as an event stream."""
    if b"/stream" in peer.requests[-1]:
        await peer.say(SSE)
        await peer.chunk(b"data: %b\n\n" % USAGE, b"data: [DONE]\n\n")
        await peer.say(b"0\r\n\r\n")
    else:
        await peer.say(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(USAGE))
        await peer.say(USAGE)


async def test_a_model_that_is_not_utf8_was_answered_with_500(autojump_clock: Any, handover: bool) -> None:
    """Where the model decides the route it is the client's mistake: 400."""
    async with world(served, handover=handover, models=(Model("m", (Target("u0"),)),)) as here:
        client = here.connect()
        await client.send(request("POST", "/v1/chat/completions", BROKEN, "Content-Type: application/json"))
        response = await client.response()
        assert response.status == 400
        assert "not UTF-8" in response.error["message"]
        record = await only_record(here)
        assert record.failure is not None
        assert (record.failure.side, record.failure.phase) == (Side.CLIENT, Phase.ROUTE)
        assert record.failure.kind is Kind.MALFORMED


async def test_a_model_that_is_not_utf8_and_is_only_for_the_log(autojump_clock: Any, handover: bool) -> None:
    """Nothing depends on it: the request is relayed as it is."""
    async with world(served, handover=handover) as here:
        client = here.connect()
        await client.send(request("POST", "/v1/chat/completions", BROKEN, "Content-Type: application/json"))
        assert (await client.response()).status == 200
        record = await only_record(here)
        assert (record.outcome, record.model) == (Outcome.COMPLETED, None)
        assert here.conversations[0].requests[0].endswith(BROKEN)


@pytest.mark.parametrize("path", ["/v1/stream", "/v1/body"])
async def test_a_usage_that_is_not_utf8_broke_the_exchange(autojump_clock: Any, handover: bool, path: str) -> None:
    """It is not counted, and passes byte for byte."""
    async with world(served, handover=handover, count_tokens=True) as here:
        client = here.connect()
        body = b'{"model": "m", "stream": true, "messages": []}'
        await client.send(request("POST", path, body, "Content-Type: application/json"))
        response = await client.response()
        assert response.complete
        assert USAGE in response.body
        record = await only_record(here)
        assert record.outcome is Outcome.COMPLETED
