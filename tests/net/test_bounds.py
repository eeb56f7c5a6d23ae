"""Each bound of the gateway (design, section 4), with its default: what just fits passes, one more is refused.

The bound of a flow is reached in `tests/sim/test_flow_bound.py`, memory in `test_memory.py`, the queue for a lease in
`test_retries.py`.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest
from kit import RunningGateway, chunked, eventually, request, running_gateway, scene, settings_for
from strict import OK, strict_upstream

from canal_trio.errors import Kind, Side
from canal_trio.hooks import Outcome
from canal_trio.settings import Bounds, Model, Target
from canal_trio.testing.scripts import Script, Send, reply
from canal_trio.testing.upstreams import ScriptedUpstream

KIB = 1024
JSON = "Content-Type: application/json"
GET = request("GET", "/")


def padded(size: int) -> bytes:
    """A request whose head has exactly this many bytes."""
    short = request("GET", "/", None, "X-Pad: ")
    return request("GET", "/", None, "X-Pad: " + "x" * (size - len(short)))


def with_fields(count: int) -> bytes:
    """A request with this many fields, Host among them."""
    return request("GET", "/", None, *[f"X-{index}: y" for index in range(count - 1)])


HEADS = {
    "bytes": (padded(32 * KIB), padded(32 * KIB + 1), 431),
    "fields": (with_fields(100), with_fields(101), 431),
    "target": (request("GET", "/" + "t" * (8 * KIB - 1)), request("GET", "/" + "t" * (8 * KIB)), 414),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("cut", [1 << 20, 1000], ids=["whole", "cut"])
async def test_request_head(name: str, cut: int) -> None:
    """32 KiB, 100 fields, a target of 8 KiB: however the bytes arrive."""
    fits, exceeds, status = HEADS[name]
    async with strict_upstream() as upstream, running_gateway(settings_for(upstream.url)) as gateway:
        for raw, expected in ((fits, 200), (exceeds, status)):
            client = await gateway.connect()
            for at in range(0, len(raw), cut):
                await client.send(raw[at : at + cut])
            assert (await client.response()).status == expected
        assert len(upstream.requests) == 1
        assert upstream.garbage == []


async def test_head_that_never_ends() -> None:
    """What is no head after 32 KiB is refused then, not when it ends."""
    async with strict_upstream() as upstream, running_gateway(settings_for(upstream.url)) as gateway:
        client = await gateway.connect()
        await client.send(b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 40 * KIB)
        assert (await client.response()).status == 431


async def body_of(gateway: RunningGateway, size: int, framing: str, *fields: str) -> int:
    """The status that a body of this size gets."""
    body = b" " * size
    if framing == "length":
        raw = request("POST", "/v1/x", body, *fields)
    else:
        raw = request("POST", "/v1/x", None, *fields, "Transfer-Encoding: chunked") + chunked(body)
    return (await gateway.ask(raw)).status


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_request_body(framing: str) -> None:
    """`body_bytes`: one byte more is 413, announced or not, and never reaches the upstream whole."""
    bounds = Bounds(body_bytes=50_000)
    async with strict_upstream() as upstream, running_gateway(settings_for(upstream.url, bounds=bounds)) as gateway:
        assert await body_of(gateway, 50_000, framing) == 200
        assert await body_of(gateway, 50_001, framing) == 413
        assert [seen.complete for seen in upstream.requests] in ([True], [True, False])
        record = (await gateway.records.wait(2))[1]
        assert record.failure is not None
        assert (record.failure.side, record.failure.kind) == (Side.CLIENT, Kind.BODY_TOO_LARGE)


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_held_body(framing: str) -> None:
    """A body that is held for routing: `held_body_bytes`, beyond 413; nothing stays held."""
    async with strict_upstream() as upstream:
        settings = settings_for(upstream.url, bounds=Bounds(held_body_bytes=50_000))
        settings = replace(settings, models=(Model("*", (Target("u0"),)),))
        async with running_gateway(settings) as gateway:
            # Blanks are no JSON: that it is judged at all shows that it was held whole.
            assert await body_of(gateway, 50_000, framing, JSON) == 400
            assert await body_of(gateway, 50_001, framing, JSON) == 413
            await eventually(lambda: gateway.gateway.statistics().held_bytes == 0)
            assert upstream.requests == []


async def test_held_bodies_of_all_exchanges() -> None:
    """`held_total_bytes`: what goes beyond is 503 `overloaded` with retry-after; the others are not disturbed."""
    async with strict_upstream() as upstream:
        settings = settings_for(upstream.url, bounds=Bounds(held_total_bytes=50_000))
        settings = replace(settings, models=(Model("*", (Target("u0"),)),))
        async with running_gateway(settings) as gateway:
            body = b'{"model":"m"}'.ljust(30_000)
            head = request("POST", "/v1/x", None, JSON, f"Content-Length: {len(body)}")
            holder = await gateway.connect()
            await holder.send(head + body[:-1])
            await eventually(lambda: gateway.gateway.statistics().held_bytes == len(body) - 1)
            refused = await gateway.ask(head + body)
            assert refused.status == 503
            assert refused.error["code"] == "overloaded"
            assert int(refused.header("retry-after") or 0) >= 1
            assert refused.header("x-should-retry") == "true"
            await holder.send(body[-1:])
            assert (await holder.response()).status == 200
            await eventually(lambda: gateway.gateway.statistics().held_bytes == 0)
            assert (await gateway.ask(head + body)).status == 200


@pytest.mark.parametrize("bound", [{"held_body_bytes": 20_000}, {"held_total_bytes": 20_000}], ids=["each", "all"])
async def test_body_beyond_what_may_be_held_for_replay(bound: dict[str, Any]) -> None:
    """Without models nothing must be held: a larger body streams through, and only its replay is given up."""
    settings = {"bounds": Bounds(**bound)}
    async with strict_upstream() as upstream, running_gateway(settings_for(upstream.url, **settings)) as gateway:
        body = bytes(range(256)) * 2000
        assert (await gateway.ask(request("POST", "/", body))).status == 200
        assert hashlib.sha256(upstream.requests[0].body).digest() == hashlib.sha256(body).digest()
        await eventually(lambda: gateway.gateway.statistics().held_bytes == 0)


def response_head(size: int) -> bytes:
    """A response whose head has exactly this many bytes."""
    short = OK.replace(b"\r\n\r\n", b"\r\nX-Pad: \r\n\r\n")
    return short.replace(b"X-Pad: ", b"X-Pad: " + b"x" * (size - len(short) + len(b"ok")))


def response_fields(count: int) -> bytes:
    """A response with this many fields."""
    return OK.replace(b"\r\n\r\n", b"".join(b"\r\nX-%d: y" % index for index in range(count - 2)) + b"\r\n\r\n")


def informational(count: int) -> bytes:
    """This many 1xx heads before the final one."""
    return b"HTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\n" * count + OK


RESPONSES = {
    "bytes": (response_head(32 * KIB), response_head(32 * KIB + 1)),
    "fields": (response_fields(100), response_fields(101)),
    "informational": (informational(16), informational(17)),
}


@pytest.mark.parametrize("name", RESPONSES)
async def test_response_head(name: str) -> None:
    """32 KiB, 100 fields, 16 informational heads: beyond, the response is malformed, 502, and that connection ends."""
    fits, exceeds = RESPONSES[name]
    async with scene(Script((Send(fits),))) as (upstream, gateway):
        response = await gateway.ask(GET)
        assert response.status == 200
        assert response.body == b"ok"
        upstream.answer = Script((Send(exceeds),))
        refused = await gateway.ask(GET)
        assert refused.status == 502
        assert refused.error["code"] == "upstream_malformed"
        record = (await gateway.records.wait(2))[1]
        assert record.outcome is Outcome.UPSTREAM_FAILED
        await upstream.until(lambda: upstream.open_connections == 0)


async def test_many_keep_alive_requests_leave_nothing_behind() -> None:
    """The hundredth request of a connection costs what the first did: no watch, exchange or byte is kept."""
    async with ScriptedUpstream(reply({})) as upstream, running_gateway(settings_for(upstream.url)) as gateway:
        client = await gateway.connect()
        watched = []
        for _ in range(100):
            await client.send(request("POST", "/", b"x" * 100))
            assert (await client.response()).status == 200
            watched.append(gateway.gateway.reaper.statistics().watched)
        assert len(set(watched[10:])) == 1, watched
        await eventually(lambda: gateway.gateway.exchanges() == [])
