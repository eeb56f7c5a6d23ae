"""What is tried again and what never is (design, sections 6 and 7), over real sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from kit import RunningGateway, chat, chunked, eventually, request, running_gateway, scene, settings_for

from canal_trio.errors import Kind
from canal_trio.hooks import Outcome
from canal_trio.settings import Bounds, Deadlines, Model, Target, Upstream
from canal_trio.testing.scripts import Cut, Reset, Script, Send, Stall, chat_stream, cut_after, openai_error, reply
from canal_trio.testing.upstreams import Answer, ScriptedUpstream, SeenRequest, in_order

GOOD = reply({"ok": True})
CUT = Script((Cut(),))
BUSY = openai_error(429, "busy", headers=[("retry-after", "7")])
DEAD = "http://127.0.0.1:1"


@asynccontextmanager
async def pair(
    first: Answer, second: Answer, *, options: dict[str, Any] | None = None, **settings: Any
) -> AsyncIterator[tuple[ScriptedUpstream, ScriptedUpstream, RunningGateway]]:
    """Two upstreams, u0 (with these options) and u1, and a gateway before them."""
    async with ScriptedUpstream(first) as u0, ScriptedUpstream(second) as u1:
        upstream = Upstream("u0", u0.url, **(options or {}))
        async with running_gateway(settings_for(upstream, u1.url, **settings)) as gateway:
            yield u0, u1, gateway


def dies_when_reused(how: Script) -> Callable[[SeenRequest], Script]:
    """The first request of a connection is answered; the second meets a connection that dies, without being idle-dead.

    It cannot be seen by looking at the idle connection: it dies on the request's arrival.
    """
    return lambda seen: GOOD if len(seen.connection.requests) == 1 else how


@pytest.mark.parametrize("how", [CUT, Script((Reset(),))], ids=["fin", "rst"])
@pytest.mark.parametrize("raw", [chat(), request("GET", "/v1/models")], ids=["post", "get"])
async def test_reused_connection_died(raw: bytes, how: Script) -> None:
    """Without a response byte the request is repeated once, on a fresh connection; a POST too, its body whole."""
    async with scene(dies_when_reused(how)) as (upstream, gateway):
        assert (await gateway.ask(raw)).status == 200
        assert (await gateway.ask(raw)).status == 200
        first, second = await gateway.records.wait(2)
        assert (first.attempts, second.attempts) == (1, 2)
        assert second.outcome is Outcome.COMPLETED
        assert second.failure is None
        assert [seen.connection.number for seen in upstream.requests] == [0, 0, 1]
        assert len({seen.body for seen in upstream.requests}) == 1


async def test_chunked_body_is_replayed_whole() -> None:
    """A body of unknown length that was held is sent again from its beginning."""
    body = [b"a" * 20_000, b"b" * 20_000, b"c"]
    raw = request("POST", "/v1/files", None, "Transfer-Encoding: chunked") + chunked(*body)
    async with scene(dies_when_reused(CUT)) as (upstream, gateway):
        assert (await gateway.ask(raw)).status == 200
        assert (await gateway.ask(raw)).status == 200
        assert upstream.requests[2].body == b"".join(body)
        assert (await gateway.records.wait(2))[1].attempts == 2


async def test_the_fresh_connection_is_the_last_try() -> None:
    """The repetition is made once: when the fresh connection dies as well, that is the answer."""
    answers = in_order(GOOD, CUT, CUT, GOOD)
    async with scene(answers) as (upstream, gateway):
        assert (await gateway.ask(chat())).status == 200
        response = await gateway.ask(chat())
        assert response.status == 502
        assert response.header("x-should-retry") == "false"
        assert len(upstream.requests) == 3
        record = (await gateway.records.wait(2))[1]
        assert record.attempts == 2
        assert record.failure is not None
        assert record.failure.kind is Kind.CUT


async def test_idle_connection_that_was_closed_is_not_used() -> None:
    """A connection whose peer hung up while it was idle is never tried: no attempt is lost on it."""
    answers = in_order(replace(GOOD, steps=(*GOOD.steps, Cut())), GOOD)
    async with scene(answers) as (upstream, gateway):
        assert (await gateway.ask(chat())).status == 200
        await upstream.until(lambda: upstream.connections[0].closed)
        assert (await gateway.ask(chat())).status == 200
        assert [record.attempts for record in await gateway.records.wait(2)] == [1, 1]


async def test_body_beyond_the_hold_limit_is_not_replayed() -> None:
    """What is no longer held cannot be sent again: the stale connection is 502."""
    raw = request("POST", "/v1/files", b"x" * 50_000)
    async with scene(dies_when_reused(CUT), bounds=Bounds(held_body_bytes=10_000)) as (upstream, gateway):
        assert (await gateway.ask(request("GET", "/"))).status == 200
        response = await gateway.ask(raw)
        assert response.status == 502
        assert len(upstream.requests) == 2
        assert (await gateway.records.wait(2))[1].attempts == 1


async def test_fresh_connection_that_died_is_no_retry_of_a_post() -> None:
    """Request bytes left on a fresh connection: a second generation might be paid for, so the answer is 502."""
    async with pair(CUT, GOOD) as (_, second, gateway):
        response = await gateway.ask(chat())
        assert response.status == 502
        assert response.header("x-should-retry") == "false"
        assert second.requests == []
        assert (await gateway.records.one()).attempts == 1


@pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 200 OK\r\nContent-"], ids=["nothing", "half-a-head"])
async def test_fresh_connection_that_died_is_retried_where_the_route_says_so(begun: bytes) -> None:
    """With `retry_sent` the next upstream is asked, however far the head had come: nothing of it was relayed."""
    async with pair(Script((Send(begun), Cut())), GOOD, options={"retry_sent": True}) as (first, second, gateway):
        assert (await gateway.ask(chat())).status == 200
        record = await gateway.records.one()
        assert (record.attempts, record.upstream) == (2, "u1")
        assert second.requests[0].body == first.requests[0].body


async def test_refused_goes_to_the_next_upstream() -> None:
    """Nothing was sent, so another upstream is asked; the record names the one that answered."""
    async with ScriptedUpstream(GOOD) as second, running_gateway(settings_for(DEAD, second.url)) as gateway:
        assert (await gateway.ask(chat())).status == 200
        record = await gateway.records.one()
        assert (record.attempts, record.upstream, record.outcome) == (2, "u1", Outcome.COMPLETED)
        assert record.failure is None


@pytest.mark.parametrize("status", [429, 503])
async def test_busy_goes_to_the_next_upstream(status: int) -> None:
    """429 and 503 say that nothing was generated: another upstream is asked, whatever `retry_sent` says."""
    async with pair(openai_error(status), chat_stream(2)) as (first, second, gateway):
        response = await gateway.ask(chat())
        assert response.status == 200
        assert response.complete
        assert (await gateway.records.one()).attempts == 2
        assert len(first.requests) == len(second.requests) == 1


async def test_busy_without_another_upstream_is_relayed() -> None:
    """The last upstream's 429 is the client's answer: verbatim, `retry-after` included."""
    async with pair(BUSY, BUSY) as (_, _, gateway):
        response = await gateway.ask(chat())
        assert response.status == 429
        assert response.body == BUSY.payload
        assert response.header("retry-after") == "7"
        record = await gateway.records.one()
        assert (record.attempts, record.upstream, record.outcome) == (2, "u1", Outcome.COMPLETED)


@pytest.mark.parametrize("retry_sent", [False, True])
async def test_other_5xx(retry_sent: bool) -> None:
    """A 500 is relayed, and only where the route says so another upstream is asked."""
    async with pair(openai_error(500), GOOD, options={"retry_sent": retry_sent}) as (_, second, gateway):
        response = await gateway.ask(chat())
        assert response.status == (200 if retry_sent else 500)
        assert len(second.requests) == int(retry_sent)


@pytest.mark.parametrize("retry_sent", [False, True])
async def test_first_byte_timeout(retry_sent: bool) -> None:
    """A silent upstream may be generating: only `retry_sent` asks another one; the silent one is closed."""
    async with pair(
        Script((Stall(),)), GOOD, options={"retry_sent": retry_sent}, deadlines=Deadlines(first_byte=0.2)
    ) as (first, second, gateway):
        response = await gateway.ask(chat())
        assert response.status == (200 if retry_sent else 504)
        assert len(second.requests) == int(retry_sent)
        await first.until(lambda: first.connections[0].left is not None)


async def test_never_after_the_first_relayed_byte() -> None:
    """Once a head was relayed no upstream is asked again, whatever the route allows."""
    async with pair(cut_after(chat_stream(3), 1), GOOD, options={"retry_sent": True}) as (_, second, gateway):
        response = await gateway.ask(chat())
        assert response.status == 200
        assert not response.complete
        assert second.requests == []
        assert (await gateway.records.one()).attempts == 1


async def test_no_lease_in_time_goes_to_the_next_upstream() -> None:
    """An upstream with no free connection is passed over for another one; alone it is 503 with retry-after."""
    async with pair(
        cut_after(chat_stream(3), 1, Stall()), GOOD, options={"connections": 1}, deadlines=Deadlines(lease=0.1)
    ) as (_, _, gateway):
        holder = await gateway.connect()
        await holder.send(chat())
        await holder.final_head()
        assert (await gateway.ask(chat())).status == 200
        assert (await gateway.records.one()).upstream == "u1"


async def test_no_lease_in_time() -> None:
    """With nobody else to ask, no lease in time is 503 with retry-after, and nobody is blamed."""
    async with ScriptedUpstream(cut_after(chat_stream(3), 1, Stall())) as first:
        settings = settings_for(Upstream("u0", first.url, connections=1), deadlines=Deadlines(lease=0.1))
        async with running_gateway(settings) as gateway:
            holder = await gateway.connect()
            await holder.send(chat())
            await holder.final_head()
            response = await gateway.ask(chat())
            assert response.status == 503
            assert response.error["code"] == "upstream_unavailable"
            assert response.header("retry-after") is not None
            assert response.header("x-should-retry") == "true"
            record = await gateway.records.one()
            assert record.outcome is Outcome.REJECTED
            assert len(first.requests) == 1


async def test_too_many_waiters() -> None:
    """The queue for a lease is bounded: beyond it the answer is 503 at once."""
    async with ScriptedUpstream(cut_after(chat_stream(3), 1, Stall())) as first:
        settings = settings_for(Upstream("u0", first.url, connections=1), bounds=Bounds(waiters=1))
        async with running_gateway(settings) as gateway:
            holder, waiter = await gateway.connect(), await gateway.connect()
            await holder.send(chat())
            await holder.final_head()
            await waiter.send(chat())
            await eventually(lambda: gateway.gateway.statistics().pools["u0"].waiting == 1)
            assert (await gateway.ask(chat())).status == 503


async def test_failover_keeps_to_the_models_order() -> None:
    """A model's upstreams are asked in its own order; others never."""
    scripts = (GOOD, GOOD, openai_error(503))
    async with AsyncExitStack() as stack:
        other, good, busy = [await stack.enter_async_context(ScriptedUpstream(script)) for script in scripts]
        models = (Model("m", (Target("u2"), Target("u1"))), Model("x", (Target("u0"),)))
        settings = replace(settings_for(other.url, good.url, busy.url), models=models)
        async with running_gateway(settings) as gateway:
            assert (await gateway.ask(chat())).status == 200
            record = await gateway.records.one()
            assert (record.attempts, record.upstream, record.model) == (2, "u1", "m")
            assert len(busy.requests) == len(good.requests) == 1
            assert other.requests == []


async def test_early_refusal_during_the_upload_is_not_repeated_half() -> None:
    """An upstream's 503 while the client still uploads: what was held goes whole to the next upstream."""
    busy = replace(openai_error(503), body="never")
    async with pair(busy, GOOD) as (_, second, gateway):
        client = await gateway.connect()
        await client.send(request("POST", "/v1/files", None, "Content-Length: 200000") + b"x" * 50_000)
        await second.until(lambda: second.requests and len(second.requests[0].body) >= 50_000)
        await client.send(b"y" * 150_000)
        assert (await client.response()).status == 200
        assert second.requests[0].body == b"x" * 50_000 + b"y" * 150_000
        assert (await gateway.records.one()).attempts == 2
