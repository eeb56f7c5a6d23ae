"""Too much to do: bounded places, a bounded wait, a ceiling of memory; then 503, when to come back, and little work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import trio
import trio.testing
from kit import Client, Response, chat, request
from simkit import OK, SSE, URL, Conversation, failed, only_record, since, world

from canal_trio.errors import Kind, Phase, Side
from canal_trio.hooks import Outcome
from canal_trio.settings import Bounds, Deadlines, Model, Target, Upstream
from canal_trio.testing.simstream import SimLink

GET = request("GET", "/v1/models")
KIB = 1024


def slow(seconds: float) -> Any:
    """An upstream that takes its time for each answer."""

    async def answers(upstream: Conversation) -> None:
        await trio.sleep(seconds)
        await upstream.say(OK)

    return answers


async def refused(client: Client, code: str = "gateway_overloaded", *, again: str = "true") -> Response:
    """The refusal, checked."""
    response = await client.response()
    assert response.status == 503
    assert response.error["code"] == code
    assert response.error["type"] == "server_error"
    assert response.header("x-should-retry") == again
    assert response.header("x-request-id")
    return response


async def test_a_bounded_number_at_work_and_in_line(autojump_clock: Any, handover: bool) -> None:
    """Two at work, three in line, the sixth is refused at once; each end lets the first of the line in."""
    bounds = Bounds(exchanges=2, waiters=3)
    async with world(slow(4), handover=handover, bounds=bounds) as here:
        clients = [here.connect() for _ in range(6)]
        start = trio.current_time()
        for client in clients:
            await client.send(GET)
            await trio.testing.wait_all_tasks_blocked()
        statistics = here.gateway.statistics()
        assert (statistics.in_flight, statistics.waiting) == (5, 3)
        assert len(here.conversations) == 2
        response = await refused(clients[5])
        assert since(start) == 0
        assert response.header("connection") == "keep-alive"
        done: list[int] = []

        async def answered(number: int) -> None:
            assert (await clients[number].response()).status == 200
            done.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(answered, number)
        assert since(start) == 12
        assert (sorted(done[:2]), sorted(done[2:4]), done[4:]) == ([0, 1], [2, 3], [4])
        record = here.records.all[0]
        assert record.outcome is Outcome.REJECTED
        assert record.attempts == 0
        failed(record, Side.GATEWAY, Phase.ROUTE, Kind.OVERLOADED)


async def test_the_wait_for_a_place_is_bounded(autojump_clock: Any, handover: bool) -> None:
    """10 s in line: 503, and the place in line is gone, so that nobody is let in who is no longer there."""
    async with world(slow(15), handover=handover, bounds=Bounds(exchanges=1)) as here:
        at_work, waiter = here.connect(), here.connect()
        await at_work.send(GET)
        await trio.testing.wait_all_tasks_blocked()
        await waiter.send(GET)
        start = trio.current_time()
        await refused(waiter)
        assert since(start) == 10
        assert here.gateway.statistics().waiting == 0
        assert (await at_work.response()).status == 200
        await waiter.send(GET)
        assert (await waiter.response()).status == 200


async def test_a_waiter_that_leaves(autojump_clock: Any, handover: bool) -> None:
    """Gone in the step that sees it, without an answer; the one behind it is the next."""
    async with world(slow(5), handover=handover, bounds=Bounds(exchanges=1)) as here:
        clients = [here.connect() for _ in range(3)]
        for client in clients:
            await client.send(GET)
            await trio.testing.wait_all_tasks_blocked()
        clients[1].stream.close()  # type: ignore[attr-defined]  # a simulated stream
        await trio.testing.wait_all_tasks_blocked()
        assert here.gateway.statistics().waiting == 1
        record = here.records.all[0]
        assert record.outcome is Outcome.CLIENT_GONE
        assert record.phase is Phase.ROUTE
        start = trio.current_time()
        assert (await clients[2].response()).status == 200
        assert since(start) == 10
        assert len(here.conversations) == 1


async def test_retry_after_is_computed(autojump_clock: Any, handover: bool) -> None:
    """Exchanges last 24 s each, 2 at work, 3 in line: the fourth in line would have its place in 48 s."""
    async with world(slow(24), handover=handover, bounds=Bounds(exchanges=2, waiters=3)) as here:
        first = here.connect()
        await first.send(GET)
        assert (await first.response()).status == 200
        others = [here.connect() for _ in range(5)]
        for client in others:
            await client.send(GET)
            await trio.testing.wait_all_tasks_blocked()
        await first.send(GET)
        assert (await refused(first)).header("retry-after") == "48"


async def test_a_refusal_reads_no_body(autojump_clock: Any, handover: bool) -> None:
    """A client that asks before it sends gets its answer instead of an invitation; nothing of a body is held."""
    async with world(slow(50), handover=handover, bounds=Bounds(exchanges=1, waiters=0)) as here:
        at_work, other = here.connect(), here.connect()
        await at_work.send(GET)
        await trio.testing.wait_all_tasks_blocked()
        await other.send(request("POST", "/v1/files", None, "Content-Length: 9000000", "Expect: 100-continue"))
        response = await refused(other)
        assert response.header("connection") == "close"
        assert here.gateway.statistics().held_bytes == 0
        assert here.records.all[0].request_bytes == 0


async def test_a_reload_lets_the_line_in(autojump_clock: Any, handover: bool) -> None:
    """A raised bound holds at once for those who wait; a lowered one cuts nobody off."""
    async with world(slow(9), handover=handover, bounds=Bounds(exchanges=1)) as here:
        clients = [here.connect() for _ in range(4)]
        for client in clients:
            await client.send(GET)
            await trio.testing.wait_all_tasks_blocked()
        settings = here.gateway.settings
        here.gateway.reload(replace(settings, bounds=replace(settings.bounds, exchanges=3)))
        await trio.testing.wait_all_tasks_blocked()
        assert (here.gateway.places.used, here.gateway.statistics().waiting) == (3, 1)
        here.gateway.reload(replace(settings, bounds=replace(settings.bounds, exchanges=1)))
        assert here.gateway.places.used == 3
        start = trio.current_time()
        for client in clients[:3]:
            assert (await client.response()).status == 200
        assert since(start) == 9
        assert (await clients[3].response()).status == 200


async def test_a_drain_ends_the_line_honestly(autojump_clock: Any, handover: bool) -> None:
    """Who waits may still be served while the gateway drains, and is told `gateway_draining` when the time is over; to
    try it again only who was not at the upstream already."""
    bounds, deadlines = Bounds(exchanges=1), Deadlines(lease=1000)
    async with world(slow(20), handover=handover, bounds=bounds, deadlines=deadlines) as here:
        clients = [here.connect() for _ in range(3)]
        for client in clients:
            await client.send(GET)
            await trio.testing.wait_all_tasks_blocked()
        start = trio.current_time()
        here.gateway.drain(start + 30)
        assert (await clients[0].response()).status == 200
        assert since(start) == 20
        await refused(clients[1], "gateway_draining", again="false")
        await refused(clients[2], "gateway_draining")
        assert since(start) == 30
        assert here.gateway.statistics().waiting == 0


# -- one upstream ------------------------------------------------------------------------------------------------------


async def test_a_crowded_upstream_refuses_before_the_body(autojump_clock: Any, handover: bool) -> None:
    """Every connection in use and the queue full: 503 for a body that would name a model, before it was sent."""
    upstream = Upstream("u0", URL, connections=2)
    bounds = Bounds(waiters=1)
    models = (Model("m", (Target("u0"),)),)
    async with world(slow(20), handover=handover, upstream=upstream, bounds=bounds, models=models) as here:
        first = here.connect()
        await first.send(chat(model="m"))
        assert (await first.response()).status == 200
        others = [here.connect() for _ in range(3)]
        for client in others:
            await client.send(chat(model="m"))
            await trio.testing.wait_all_tasks_blocked()
        await first.send(request("POST", "/v1/x", None, "Content-Type: application/json", "Content-Length: 5000"))
        response = await refused(first, "upstream_unavailable")
        assert response.header("retry-after") == "20"  # of two leases of 20 s one ends every 10 s, for the waiter first
        failed(here.records.all[1], Side.GATEWAY, Phase.LEASE, Kind.UNAVAILABLE)
        assert here.gateway.statistics().pools["u0"].refused == 1
        assert here.records.all[1].request_bytes == 0


# -- memory ------------------------------------------------------------------------------------------------------------


async def floods(upstream: Conversation) -> None:
    """An endless stream."""
    await upstream.say(SSE)
    while True:
        await upstream.chunk(b"data: " + b"x" * 8000 + b"\n\n")


@pytest.mark.parametrize("kind", ["flows", "bodies"])
async def test_the_ceiling_of_memory_sheds(autojump_clock: Any, handover: bool, kind: str) -> None:
    """Clients that never read, or bodies that are held: at the ceiling the next gets 503, until some of it is free."""
    bounds = Bounds(memory_bytes=600 * KIB)
    models = (Model("m", (Target("u0"),)),) if kind == "bodies" else ()
    async with world(floods, handover=handover, bounds=bounds, models=models) as here:
        clients: list[Client] = []
        while len(clients) < 100:
            client = here.connect(to_client=SimLink(buffer=10_000))
            if kind == "flows":
                await client.send(chat())
            else:
                head = request("POST", "/v1/x", None, "Content-Type: application/json", "Content-Length: 200000")
                await client.send(head + b" " * 150_000)
            await trio.testing.wait_all_tasks_blocked()
            statistics = here.gateway.statistics()
            clients.append(client)
            if statistics.held_bytes + statistics.flow_bytes >= statistics.memory_limit:
                break
        assert 3 < len(clients) < 60
        asker = here.connect()
        start = trio.current_time()
        await asker.send(GET)
        await refused(asker)
        assert since(start) == 0
        failed(await only_record(here), Side.GATEWAY, Phase.ROUTE, Kind.OVERLOADED)
        for client in clients[:2]:
            client.stream.close()  # type: ignore[attr-defined]  # a simulated stream
        await trio.testing.wait_all_tasks_blocked()
        await asker.send(GET)
        assert (await asker.final_head()).status == 200


async def test_streams_in_flight_go_on_at_the_ceiling(autojump_clock: Any, handover: bool) -> None:
    """Shedding is for the new: a stream that runs is neither cut nor slowed by others that swell."""
    go = trio.Event()

    async def answers(upstream: Conversation) -> None:
        if upstream.number:
            await floods(upstream)
        await upstream.say(SSE)
        await go.wait()
        await upstream.chunk(*[b"data: %d\n\n" % number for number in range(50)])
        await upstream.say(b"0\r\n\r\n")

    async with world(answers, handover=handover, bounds=Bounds(memory_bytes=30 * KIB)) as here:
        good = here.connect()
        await good.send(chat())
        head = await good.final_head()
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(3):
            await here.connect(to_client=SimLink(buffer=10_000)).send(chat())
            await trio.testing.wait_all_tasks_blocked()
        assert here.gateway.statistics().flow_bytes > 30 * KIB
        go.set()
        await good.body(head)
        assert head.complete
        assert head.body.endswith(b"data: 49\n\n")
