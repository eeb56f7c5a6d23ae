"""The usage chunk that only the gateway asked for: asked for, read, and taken out of this client's stream."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio
from kit import chat, request
from simkit import SSE, URL, Conversation, only_record, world

from canal_trio.hooks import Outcome, Usage, UsageSource
from canal_trio.settings import Bounds, Route, Target, Upstream
from canal_trio.testing.simstream import SimLink

EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}],"usage":null}\n\n'
CHUNK = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10}}\n\n'
DONE = b"data: [DONE]\n\n"
END = b"0\r\n\r\n"
WAYS = pytest.mark.parametrize("heartbeat", [None, 50.0], ids=["straight", "pair"])


def accounting(heartbeat: float | None = None, **more: Any) -> dict[str, Any]:
    """Settings with accounting on; with heartbeats an attempt goes as a pair."""
    return {"upstream": Upstream("u0", URL, heartbeat=heartbeat), "count_tokens": True} | more


def asking(options: object, *, path: str = "/v1/chat/completions", stream: bool = True) -> bytes:
    """A request with these `stream_options`; none if they are None."""
    body: dict[str, Any] = {"model": "m", "stream": stream, "messages": []}
    if options is not None:
        body["stream_options"] = options
    return request("POST", path, json.dumps(body).encode(), "Content-Type: application/json")


def asked(peer: Conversation) -> bool | None:
    """What the upstream was told of `include_usage`."""
    body = json.loads(peer.requests[-1].partition(b"\r\n\r\n")[2])
    options = body.get("stream_options")
    return None if options is None else options.get("include_usage")


class Server:
    """Sends its usage if it is asked to, in these pieces."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces

    async def __call__(self, peer: Conversation) -> None:
        """As a real one."""
        await peer.say(SSE)
        for piece in self.pieces:
            await trio.sleep(1)
            said = piece if asked(peer) else piece.replace(CHUNK, b"")
            if said:
                await peer.chunk(said)
        await peer.say(END)


@WAYS
@pytest.mark.parametrize(
    "pieces",
    [
        (EVENT, EVENT, CHUNK, DONE),
        (EVENT + EVENT + CHUNK + DONE,),
        (EVENT, EVENT + CHUNK[:9], CHUNK[9:60], CHUNK[60:] + DONE),
        (EVENT, EVENT, CHUNK + DONE),
    ],
    ids=["events", "one", "cut", "last"],
)
async def test_an_injected_usage_chunk_breaks_choices_0(
    autojump_clock: Any, handover: bool, heartbeat: float | None, pieces: tuple[bytes, ...]
) -> None:
    """Portkey 1627, headroom 2026: who did not ask for usage gets the stream as if nobody had; the record has it."""
    async with world(Server(*pieces), handover=handover, **accounting(heartbeat)) as here:
        client = here.connect()
        await client.send(asking(None))
        response = await client.response()
        assert response.complete
        assert response.body == EVENT + EVENT + DONE
        record = await here.records.one()
        assert (record.usage, record.usage_source) == (Usage(7, 3), UsageSource.UPSTREAM)
        assert (record.outcome, record.events, record.response_bytes) == (Outcome.COMPLETED, 3, len(response.body))
        assert asked(here.conversations[0]) is True


@WAYS
async def test_explicit_include_usage_false_overridden(
    autojump_clock: Any, handover: bool, heartbeat: float | None
) -> None:
    """gittensor 1750: who says no is not asked for, and the count is an estimate."""
    async with world(Server(EVENT, CHUNK, DONE), handover=handover, **accounting(heartbeat)) as here:
        client = here.connect()
        await client.send(asking({"include_usage": False}))
        assert (await client.response()).body == EVENT + DONE
        assert asked(here.conversations[0]) is False
        assert (await here.records.one()).usage_source is UsageSource.ESTIMATED


@WAYS
async def test_who_asked_gets_it(autojump_clock: Any, handover: bool, heartbeat: float | None) -> None:
    """A client that asks for usage has every byte of the upstream's, and its own request goes on as it is."""
    data = asking({"include_usage": True})
    async with world(Server(EVENT, CHUNK, DONE), handover=handover, **accounting(heartbeat)) as here:
        client = here.connect()
        await client.send(data)
        assert (await client.response()).body == EVENT + CHUNK + DONE
        assert here.conversations[0].requests[0].endswith(data.partition(b"\r\n\r\n")[2])
        assert (await here.records.one()).usage == Usage(7, 3)


@pytest.mark.parametrize("case", ["responses", "no-stream", "off"])
async def test_where_nothing_is_asked(autojump_clock: Any, handover: bool, case: str) -> None:
    """The Responses API tells it unasked, a JSON answer has it, and without accounting no request is touched."""
    data = asking(None, path="/v1/responses" if case == "responses" else "/v1/completions", stream=case != "no-stream")

    async def play(peer: Conversation) -> None:
        await peer.say(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    async with world(play, handover=handover, **accounting(count_tokens=case != "off")) as here:
        client = here.connect()
        await client.send(data)
        await client.response()
        assert here.conversations[0].requests[0].endswith(data.partition(b"\r\n\r\n")[2])


@WAYS
@pytest.mark.parametrize("stops", ["cut", "drain", "stall"])
async def test_what_is_held_goes_out_before_any_ending(
    autojump_clock: Any, handover: bool, heartbeat: float | None, stops: str
) -> None:
    """A stream that stops inside an event that was held: the client has its bytes, and nothing is appended to them."""
    half = b'data: {"id":"x","cho'

    async def play(peer: Conversation) -> None:
        await peer.say(SSE)
        await peer.chunk(EVENT, half)
        await trio.sleep(5)
        if stops == "cut":
            peer.stream.close()
        await trio.sleep_forever()

    async with world(play, handover=handover, **accounting(heartbeat)) as here:
        client = here.connect()
        await client.send(asking(None))
        await trio.sleep(3)
        if stops == "drain":
            here.gateway.drain(trio.current_time() + 2)
        response = await client.response()
        assert not response.complete
        assert response.body.replace(b": ping\n", b"") == EVENT + half, "pings may go between what was passed on"
        record = await only_record(here)
        assert record.outcome is (Outcome.DRAINED if stops == "drain" else Outcome.UPSTREAM_FAILED)


@WAYS
async def test_an_event_longer_than_is_held(autojump_clock: Any, handover: bool, heartbeat: float | None) -> None:
    """Beyond the bound an event is not held back: it arrives while its end has not been said yet."""
    begun = b'data: {"x":"' + b"y" * 600

    async def play(peer: Conversation) -> None:
        await peer.say(SSE)
        await peer.chunk(begun)
        await trio.sleep(100)
        await peer.chunk(b'"}\n\n', CHUNK, DONE)
        await peer.say(END)

    bounds = Bounds(usage_event_bytes=512)
    async with world(play, handover=handover, **accounting(heartbeat, bounds=bounds)) as here:
        client, start = here.connect(), trio.current_time()
        await client.send(asking(None))
        await client.until(begun)
        assert trio.current_time() - start < 1
        await client.until(DONE)
        assert b"usage" not in client.seen


@WAYS
async def test_events_are_flushed_at_once_all_the_same(
    autojump_clock: Any, handover: bool, heartbeat: float | None
) -> None:
    """gateways.md C17: with the edit on, a whole event is with the client before the next one is said."""

    async def play(peer: Conversation) -> None:
        await peer.say(SSE)
        for number in range(5):
            await peer.chunk(b'data: {"choices":[{}],"n":%d}\n\n' % number)
            await trio.sleep(10)
        await peer.chunk(CHUNK, DONE)
        await peer.say(END)

    async with world(play, handover=handover, **accounting(heartbeat)) as here:
        client, start = here.connect(), trio.current_time()
        await client.send(asking(None))
        for number in range(5):
            await client.until(b'"n":%d}\n\n' % number)
            assert trio.current_time() - start == pytest.approx(10 * number, abs=0.01)
        await client.until(DONE)


async def test_a_slow_client(autojump_clock: Any, handover: bool) -> None:
    """A client that blocks has its stream edited in the flow as well."""
    events = [b'data: {"choices":[{}],"x":"%b"}\n\n' % (b"y" * 3000) for _ in range(60)]

    async def play(peer: Conversation) -> None:
        await peer.say(SSE)
        await peer.chunk(*events, CHUNK[:20], CHUNK[20:] + DONE)
        await peer.say(END)

    async with world(play, handover=handover, **accounting()) as here:
        client = here.connect(to_client=SimLink(buffer=2000))
        await client.send(asking(None))
        head = await client.final_head()
        for _ in range(20):
            await trio.sleep(1)
            assert await client.fill(1000)
        await client.body(head)
        assert head.body == b"".join(events) + DONE
        assert (await here.records.one()).usage == Usage(7, 3)


async def test_to_a_client_of_http_1_0(autojump_clock: Any, handover: bool) -> None:
    """The same where the end of the connection is the end of the body."""
    async with world(Server(EVENT, CHUNK, DONE), handover=handover, **accounting()) as here:
        client = here.connect()
        await client.send(chat(version="1.0"))
        response = await client.response()
        assert response.complete
        assert response.body == EVENT + DONE


async def test_behind_a_path_route(autojump_clock: Any, handover: bool) -> None:
    """A route looks at no model, and its answers are accounted for as any: their usage is asked for, too."""
    routes = (Route("chat", "/v1/chat/*", (Target("u0"),)),)
    async with world(Server(EVENT, CHUNK, DONE), handover=handover, **accounting(routes=routes)) as here:
        client = here.connect()
        await client.send(asking(None))
        assert (await client.response()).body == EVENT + DONE
        record = await here.records.one()
        assert (record.usage, record.model) == (Usage(7, 3), "m")


async def test_a_body_of_any_size_behind_a_path_route(autojump_clock: Any, handover: bool) -> None:
    """What is larger than may be held passes a route as before: its usage is not asked for, that is all."""
    routes = (Route("chat", "/v1/chat/*", (Target("u0"),)),)
    bounds = Bounds(held_body_bytes=100)
    async with world(Server(EVENT, DONE), handover=handover, **accounting(routes=routes, bounds=bounds)) as here:
        client = here.connect()
        body = json.dumps({"stream": True, "messages": ["x" * 500]}).encode()
        await client.send(request("POST", "/v1/chat/completions", body, "Content-Type: application/json"))
        response = await client.response()
        assert (response.status, response.body) == (200, EVENT + DONE)
        assert here.conversations[0].requests[0].endswith(body)
        assert (await here.records.one()).usage_source is UsageSource.ESTIMATED
