"""Upstreams that fail: at any byte, too slowly, too often, too early; the exact answer of the design's section 7."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio
from kit import Response, chat, request
from simkit import Conversation, failed, only_record, since, world

from canal_trio.errors import Kind, Phase, Side
from canal_trio.hooks import Outcome
from canal_trio.policy.exchange import blames_upstream
from canal_trio.settings import Deadlines
from canal_trio.testing.simstream import Fault, FaultKind, SimLink

EVENTS = b'data: {"a":1}\n\ndata: [DONE]\n\n'
RESPONSES = {
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "events": b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    + b"%x\r\n%b\r\n0\r\n\r\n" % (len(EVENTS), EVENTS),
    "informed": b"HTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
}
BODIES = {"length": b"hello", "chunked": b"hello", "events": EVENTS, "informed": b"hello"}


def says(data: bytes) -> Any:
    """An upstream that answers so, and stays."""

    async def play(upstream: Conversation) -> None:
        await upstream.say(data)
        await trio.sleep_forever()

    return play


def refused(response: Response, status: int, code: str, *, retry: bool) -> None:
    """The gateway's own answer."""
    assert (response.status, response.complete) == (status, True)
    assert (response.error["type"], response.error["code"]) == ("upstream_error", code)
    assert response.header("x-should-retry") == json.dumps(retry)


@pytest.mark.parametrize("end", [FaultKind.RESET, FaultKind.HALF_CLOSE], ids=["reset", "fin"])
@pytest.mark.parametrize("kind", RESPONSES)
async def test_broken_at_any_byte(autojump_clock: Any, handover: bool, kind: str, end: FaultKind) -> None:
    """Before the head is whole: 502. Inside the body: its prefix, never an end. Behind the last byte: as if nothing."""
    wire, body = RESPONSES[kind], BODIES[kind]
    final = wire.index(b"HTTP/1.1 200")
    head = wire.index(b"\r\n\r\n", final) + 4
    seen: set[Outcome] = set()
    for at in range(len(wire) + 1):
        async with world(says(wire), handover=handover) as here:
            here.upstream_link = SimLink(faults=(Fault(end, at),))
            client = here.connect()
            await client.send(chat())
            response = await client.final_head()
            await client.body(response)
            record = await only_record(here)
            seen.add(record.outcome)
            if at < head:
                refused(response, 502, "upstream_disconnected", retry=False)
                assert record.outcome is Outcome.UPSTREAM_FAILED
                failed(record, Side.UPSTREAM, Phase.FIRST_BYTE, Kind.CUT)
            elif at < len(wire):
                assert response.status == 200
                assert not response.complete, at
                relayed, _, event = response.body.partition(b'data: {"error"')
                assert body.startswith(relayed)
                told = kind == "events" and relayed in (b"", EVENTS[:15])  # between two events it can be told
                assert (b"upstream_disconnected" in event) == told
                all_said = kind == "events" and b"[DONE]\n" in relayed
                assert record.outcome is (Outcome.COMPLETED if all_said else Outcome.UPSTREAM_FAILED)
            else:
                assert response.complete
                assert response.body == body
                assert record.outcome is Outcome.COMPLETED
            assert record.attempts == 1
            if record.failure is not None:
                assert blames_upstream(record.failure)
            assert len(here.conversations) == 1
    assert Outcome.UPSTREAM_FAILED in seen
    assert Outcome.COMPLETED in seen


async def test_a_head_that_trickles(autojump_clock: Any, handover: bool) -> None:
    """A byte of the head every 100 s is no response: 504 after the 300 s of the first response byte, not for ever."""

    async def trickles(upstream: Conversation) -> None:
        for byte in RESPONSES["length"]:
            await upstream.say(bytes([byte]))
            await trio.sleep(100)

    async with world(trickles, handover=handover) as here:
        client, start = here.connect(), trio.current_time()
        await client.send(chat())
        refused(await client.response(), 504, "upstream_timeout", retry=False)
        assert since(start) == 300
        failed(await only_record(here), Side.UPSTREAM, Phase.FIRST_BYTE, Kind.TIMEOUT)
        assert here.conversations[0].left == pytest.approx(start + 300, abs=0.01)


async def test_a_body_that_trickles(autojump_clock: Any, handover: bool) -> None:
    """A byte every 100 s is a slow upstream and no stalled one: all of it arrives."""

    async def trickles(upstream: Conversation) -> None:
        await upstream.say(b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n")
        for _ in range(20):
            await trio.sleep(100)
            await upstream.say(b"x")

    async with world(trickles, handover=handover) as here:
        client, start = here.connect(), trio.current_time()
        await client.send(request("GET", "/"))
        response = await client.response()
        assert since(start) == 2000
        assert (response.body, response.complete) == (b"x" * 20, True)
        assert (await only_record(here)).outcome is Outcome.COMPLETED


async def test_signs_of_life(autojump_clock: Any, handover: bool) -> None:
    """A 1xx head every 200 s reaches the client and gives the upstream 300 s more; the seventeenth is one too many."""

    async def informs(upstream: Conversation) -> None:
        for _ in range(20):
            await trio.sleep(200)
            await upstream.say(b"HTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\n")

    async with world(informs, handover=handover) as here:
        client, start = here.connect(), trio.current_time()
        await client.send(chat())
        response = await client.final_head()
        await client.body(response)
        refused(response, 502, "upstream_malformed", retry=False)
        assert since(start) == 17 * 200
        failed(await only_record(here), Side.UPSTREAM, Phase.FIRST_BYTE, Kind.MALFORMED)


async def test_an_informational_head_in_the_middle_of_an_upload(autojump_clock: Any, handover: bool) -> None:
    """It is passed on at once, and the time to answer still begins with the end of the request."""

    async def play(upstream: Conversation) -> None:
        data = await upstream.stream.receive_some()
        await upstream.say(b"HTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\n")
        while not data.endswith(b"0\r\n\r\n"):
            data += await upstream.stream.receive_some()
        await trio.sleep(4)
        await upstream.say(RESPONSES["length"])
        await trio.sleep_forever()

    async with world(play, handover=handover, deadlines=Deadlines(first_byte=5, body_idle=30)) as here:
        here.by_request = False
        client, start = here.connect(), trio.current_time()
        await client.send(request("POST", "/v1/files", None, "Transfer-Encoding: chunked"))
        assert (await client.head()).status == 103
        assert since(start) == 0
        await trio.sleep(20)
        await client.send(b"5\r\nhello\r\n0\r\n\r\n")
        assert (await client.response()).body == b"hello"
        assert since(start) == 24
        assert (await only_record(here)).outcome is Outcome.COMPLETED


async def test_a_storm_of_informational_heads(autojump_clock: Any, handover: bool) -> None:
    """Thousands in one breath: 502 after sixteen, and the connection is closed instead of read to its end."""
    storm = b"HTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\n" * 5000
    async with world(says(storm), handover=handover) as here:
        client = here.connect()
        await client.send(chat())
        response = await client.final_head()
        await client.body(response)
        refused(response, 502, "upstream_malformed", retry=False)
        await only_record(here)
        assert here.conversations[0].left is not None


@pytest.mark.parametrize("framing", ["Content-Length: 400000", "Transfer-Encoding: chunked"])
async def test_an_answer_before_the_request_is_complete(autojump_clock: Any, handover: bool, framing: str) -> None:
    """It is relayed whole; the rest of the upload goes nowhere, and neither connection is used again."""

    async def answers_early(upstream: Conversation) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += await upstream.stream.receive_some()
        await upstream.say(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno")
        await trio.sleep_forever()

    async with world(answers_early, handover=handover) as here:
        here.by_request = False
        client = here.connect()
        await client.send(request("POST", "/v1/files", None, framing))
        response = await client.response()
        assert (response.status, response.body, response.complete) == (403, b"no", True)
        assert response.header("connection") == "close"
        assert (await only_record(here)).outcome is Outcome.COMPLETED
        assert here.conversations[0].left is not None
        assert here.gateway.statistics().pools["u0"].idle == 0


async def test_a_dead_connection_is_found_before_it_is_used(autojump_clock: Any, handover: bool) -> None:
    """The upstream hangs up on an idle connection: the next request dials, and nobody hears of it."""

    async def once(upstream: Conversation) -> None:
        await upstream.say(RESPONSES["length"])
        await trio.sleep(5)
        upstream.stream.close()

    async with world(once, handover=handover, deadlines=Deadlines(upstream_keep_alive=60)) as here:
        client = here.connect()
        for number in range(3):
            await client.send(request("POST", "/", b"x"))
            assert (await client.response()).body == b"hello"
            assert len(here.conversations) == number + 1
            await trio.sleep(10)
        assert [record.attempts for record in here.records.all] == [1, 1, 1]
        assert here.gateway.statistics().pools["u0"].stale == 3
