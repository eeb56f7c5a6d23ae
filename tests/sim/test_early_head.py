"""`early_head_after`: a head and pings while the upstream thinks; then its stream, or an error in it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio
from kit import chat, request
from simkit import SSE, URL, Conversation, only_record, since, world

from canal_trio.errors import Failure, Kind, Phase, Side
from canal_trio.hooks import Outcome, Usage, UsageSource
from canal_trio.settings import Deadlines, Upstream
from canal_trio.testing.simstream import SimLink

EARLY = Upstream("u0", URL, early_head_after=20.0, heartbeat=15.0)
PING = b": ping\n"
EVENT = b'data: {"choices":[{}]}\n\n'
CHUNK = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}\n\n'
DONE = b"data: [DONE]\n\n"
END = b"0\r\n\r\n"


def thinking(seconds: float, then: bytes = SSE) -> Any:
    """An upstream that answers after so long."""

    async def play(peer: Conversation) -> None:
        await trio.sleep(seconds)
        await peer.say(then)
        if then is SSE:
            await peer.chunk(EVENT, CHUNK, DONE)
            await peer.say(END)

    return play


async def test_no_bytes_during_long_thinking_cut_healthy_streams(autojump_clock: Any, handover: bool) -> None:
    """litellm 31877, openclaw 70739: the head comes in time, pings between, and then the whole stream."""
    async with world(thinking(60), handover=handover, upstream=EARLY) as here:
        client, start = here.connect(), trio.current_time()
        await client.send(chat())
        head = await client.final_head()
        assert since(start) == 20
        assert (head.status, head.header("content-type")) == (200, "text/event-stream; charset=utf-8")
        assert (head.header("cache-control"), head.header("x-accel-buffering")) == ("no-cache", "no")
        await client.body(head)
        assert since(start) == 60
        assert head.complete
        assert head.body == PING * 2 + EVENT + CHUNK + DONE
        record = await here.records.one()
        assert (record.outcome, record.status, record.events, record.attempts) == (Outcome.COMPLETED, 200, 3, 1)
        assert record.first_byte == pytest.approx(60, abs=0.01)
        await client.send(chat())  # the connection goes on
        again = await client.response()
        assert again.complete


@pytest.mark.parametrize("case", ["soon", "off", "no-stream", "1.0", "get"])
async def test_not_where_it_does_not_belong(autojump_clock: Any, handover: bool, case: str) -> None:
    """An answer that comes in time is relayed as ever; so is what asks for no stream."""
    upstream = Upstream("u0", URL) if case == "off" else EARLY
    seconds = 19.9 if case == "soon" else 60.0
    async with world(thinking(seconds), handover=handover, upstream=upstream) as here:
        client, start = here.connect(), trio.current_time()
        version = "1.0" if case == "1.0" else "1.1"
        data = chat(stream=case != "no-stream", version=version)
        await client.send(request("GET", "/v1/x") if case == "get" else data)
        head = await client.final_head()
        assert since(start) == seconds
        await client.body(head)
        assert head.body == EVENT + CHUNK + DONE


ERROR = {"error": {"message": "too long", "type": "invalid_request_error", "param": "messages", "code": "ctx"}}


def answer(status: int, body: bytes) -> bytes:
    """A whole JSON answer."""
    head = b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % (status, len(body)) + body


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
async def test_a_refusal_behind_it_is_in_band(autojump_clock: Any, handover: bool, path: str) -> None:
    """The upstream's own error is told in the stream, in the form of its API, and the body is left unterminated."""
    body = json.dumps(ERROR, indent=2).encode()
    async with world(thinking(40, answer(400, body)), handover=handover, upstream=EARLY) as here:
        client = here.connect()
        await client.send(chat(path=path))
        response = await client.response()
        assert (response.status, response.complete) == (200, False)
        event = response.body.removeprefix(PING)
        if path.endswith("responses"):
            name, data = event.splitlines()[:2]
            assert name == b"event: error"
            assert json.loads(data[6:]) == {
                "type": "error",
                "code": "ctx",
                "message": "too long",
                "param": "messages",
                "sequence_number": 0,
            }
        else:
            assert event.endswith(b"\n\n")
            assert json.loads(event[6:]) == ERROR
        record = await only_record(here)
        assert record.outcome is Outcome.UPSTREAM_FAILED


@pytest.mark.parametrize("body", [b"<html>", b"[1]", b'{"error": "text"}', b"x" * 100_000])
@pytest.mark.parametrize("status", [200, 500])
async def test_an_answer_that_is_no_stream(autojump_clock: Any, handover: bool, status: int, body: bytes) -> None:
    """What cannot be told in a stream, or is no error in the usual shape, is an error of our own."""
    async with world(thinking(40, answer(status, body)), handover=handover, upstream=EARLY) as here:
        client = here.connect()
        await client.send(chat())
        response = await client.response()
        assert not response.complete
        told = json.loads(response.body.removeprefix(PING)[6:])
        assert told["error"]["message"] == f"The upstream gave no stream. It answered {status}."  # it was reached


async def test_failures_behind_it_are_in_band(autojump_clock: Any, handover: bool) -> None:
    """A deadline that passes without an answer is told in the stream."""
    async with world(thinking(1000), handover=handover, upstream=EARLY, deadlines=Deadlines(first_byte=50)) as here:
        client, start = here.connect(), trio.current_time()
        await client.send(chat())
        response = await client.response()
        assert since(start) == 50
        assert response.body.startswith(PING * 2 + b'data: {"error":{"message":"The upstream did not answer in time.')
        assert b'"upstream_timeout"' in response.body
        assert not response.complete
        assert DONE not in response.body


async def test_it_does_not_end_the_attempts(autojump_clock: Any, handover: bool) -> None:
    """No byte of an answer was relayed: another upstream may still be asked, and its stream follows the pings."""
    dialled: list[str] = []
    upstreams = (EARLY, Upstream("u1", "http://other.test/v1"))

    async with world(thinking(1), handover=handover, upstreams=upstreams) as here:
        inner = here._dial

        async def dial(upstream: Upstream) -> Any:
            dialled.append(upstream.name)
            if upstream.name == "u0":
                await trio.sleep(30)
                return Failure(Side.UPSTREAM, Phase.DIAL, Kind.REFUSED, "Refused.")
            here.dialer = None
            return await inner(upstream)

        here.dialer = dial
        client = here.connect()
        await client.send(chat())
        response = await client.response()
        assert response.complete
        assert response.body == EVENT + CHUNK + DONE
        record = await here.records.one()
        assert (record.attempts, record.outcome) == (2, Outcome.COMPLETED)


@pytest.mark.parametrize("after", [10.0, 30.0])
async def test_a_client_that_leaves(autojump_clock: Any, handover: bool, after: float) -> None:
    """Before it and behind it the upstream is closed at once when the client leaves."""
    async with world(thinking(1000), handover=handover, upstream=EARLY) as here:
        client, start = here.connect(), trio.current_time()
        await client.send(chat())
        await trio.sleep(after)
        client.stream.close()  # type: ignore[attr-defined]
        record = await only_record(here)
        assert since(start) == after
        assert (record.outcome, record.phase) == (Outcome.CLIENT_GONE, Phase.FIRST_BYTE)
        assert here.conversations[0].left is not None


async def test_a_client_that_does_not_read(autojump_clock: Any, handover: bool) -> None:
    """Its early head has to be taken as any other write, or it has stalled."""
    async with world(thinking(1000), handover=handover, upstream=EARLY) as here:
        client = here.connect(to_client=SimLink(buffer=50))
        await client.send(chat())
        record = await only_record(here)
        assert record.outcome is Outcome.CLIENT_STALLED
        assert record.duration == pytest.approx(50, abs=0.1)


async def test_accounted_for_as_any(autojump_clock: Any, handover: bool) -> None:
    """Usage is asked for, read, and taken out behind an early head too; a failure before it cost nothing known."""
    async with world(thinking(60), handover=handover, upstream=EARLY, count_tokens=True) as here:
        client = here.connect()
        await client.send(chat())
        response = await client.response()
        assert response.body == PING * 2 + EVENT + DONE
        record = await here.records.one()
        assert (record.usage, record.usage_source) == (Usage(7, 3), UsageSource.UPSTREAM)


async def test_the_gateway_stops(autojump_clock: Any, handover: bool) -> None:
    """The drain's end is told in the stream that has begun."""
    async with world(thinking(1000), handover=handover, upstream=EARLY) as here:
        client = here.connect()
        await client.send(chat())
        await trio.sleep(30)
        here.gateway.drain(trio.current_time() + 3)
        response = await client.response()
        assert b'"gateway_draining"' in response.body
        assert not response.complete


async def test_hints_do_not_hinder_it(autojump_clock: Any, handover: bool) -> None:
    """An upstream that says 103 and thinks on gets its early head all the same."""

    async def play(peer: Conversation) -> None:
        await peer.say(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n")
        await thinking(60)(peer)

    async with world(play, handover=handover, upstream=EARLY) as here:
        client, start = here.connect(), trio.current_time()
        await client.send(chat())
        head = await client.final_head()
        assert since(start) == 20
        await client.body(head)
        assert head.complete
