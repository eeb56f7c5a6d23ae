"""The deadlines of a client's side (design, section 8), exact to the second, under virtual time, on both paths."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing
from kit import Client, request
from simkit import EXACT, OK, Conversation, answer_ok, ended, failed, little, only_record, since, take, world

from canal_trio.errors import Kind, Phase, Side
from canal_trio.hooks import Outcome
from canal_trio.settings import Deadlines


async def test_request_head(autojump_clock: Any, handover: bool) -> None:
    """15 s from its first byte; a byte per second does not extend it; the answer is 408, then the end."""
    async with world(handover=handover) as here:
        client = here.connect()
        await trio.sleep(40)  # before the first byte nothing of it runs
        start = trio.current_time()

        async def dribble() -> None:
            for byte in request("GET", "/" + "a" * 600):
                await client.send(bytes([byte]))
                await trio.sleep(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(dribble)
            response = await client.response()
            assert since(start) == 15
            nursery.cancel_scope.cancel()
        assert response.status == 408
        assert response.error["code"] == "request_timeout"
        assert response.header("connection") == "close"
        assert await ended(client) == "fin"
        record = await only_record(here)
        assert record.outcome is Outcome.REJECTED
        failed(record, Side.CLIENT, Phase.HEAD, Kind.TIMEOUT)


class ReaderSteps(trio.abc.Instrument):
    """Counts how often a client's reader is woken."""

    def __init__(self) -> None:
        self.count = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """One step of any task."""
        self.count += task.name.endswith("ClientReader.run")


async def test_every_byte_of_a_slow_head_woke_a_task(autojump_clock: Any) -> None:
    """A head in drips is put together in the poller's step: the reader sleeps until it is whole, then it is relayed."""
    async with world(answer_ok, handover=True) as here:
        client, steps = here.connect(), ReaderSteps()
        head = request("GET", "/" + "a" * 300)
        await client.send(head[:1])
        await trio.testing.wait_all_tasks_blocked()
        trio.lowlevel.add_instrument(steps)
        for byte in head[1:-1]:
            await client.send(bytes([byte]))
            await trio.testing.wait_all_tasks_blocked()
        assert steps.count <= 2
        trio.lowlevel.remove_instrument(steps)
        await client.send(head[-1:])
        assert (await client.response()).status == 200


@pytest.mark.parametrize("rest", ["bytes", "nothing"])
async def test_a_slow_head_that_breaks_off(autojump_clock: Any, handover: bool, rest: str) -> None:
    """What is wrong behind the first drips of a head, or its end, is refused with 400 as in one piece."""
    async with world(handover=handover) as here:
        client = here.connect()
        for drip in (b"GE", b"T /", b"v1"):
            await client.send(drip)
            await trio.sleep(1)
        if rest == "bytes":
            await client.send(b" \x00")
        else:
            await client.stream.send_eof()  # type: ignore[attr-defined]  # a simulated stream
        assert (await client.response()).status == 400
        assert await ended(client) == "fin"
        record = await only_record(here)
        failed(record, Side.CLIENT, Phase.HEAD, Kind.MALFORMED)


async def test_keep_alive_before_the_first_request(autojump_clock: Any, handover: bool) -> None:
    """A connection that never says anything is closed after 75 s, without an answer and without a record."""
    async with world(handover=handover) as here:
        client, start = here.connect(), trio.current_time()
        assert await client.rest() == b""
        assert client.ended_by == "fin"
        assert since(start) == 75
        assert here.records.all == []


async def test_keep_alive_between_requests(autojump_clock: Any, handover: bool) -> None:
    """75 s from the end of the response, not from the request."""

    async def slow(upstream: Conversation) -> None:
        await trio.sleep(50)
        await upstream.say(OK)

    async with world(slow, handover=handover) as here:
        client = here.connect()
        for _ in range(3):
            await client.send(request("GET", "/"))
            assert (await client.response()).status == 200
            await trio.sleep(74)
        start = trio.current_time() - 74
        assert await client.rest() == b""
        assert since(start) == 75
        assert len(here.records.all) == 3


UPLOAD = request("POST", "/v1/files", None, "Content-Length: 1000000")


async def test_body_idle(autojump_clock: Any, handover: bool) -> None:
    """30 s without a body byte: 408, and the upstream is closed in the same moment."""
    async with world(answer_ok, handover=handover) as here:
        client = here.connect()
        await client.send(UPLOAD)
        for _ in range(5):
            await trio.sleep(29)
            await client.send(b"x" * 40_000)
        start = trio.current_time()
        response = await client.response()
        assert since(start) == 30
        assert response.status == 408
        record = await only_record(here)
        assert record.outcome is Outcome.REJECTED
        failed(record, Side.CLIENT, Phase.UPLOAD, Kind.TIMEOUT)
        assert here.conversations[0].left == pytest.approx(start + 30, abs=EXACT)
        assert here.conversations[0].requests == []


async def trickle(client: Client, rate: int) -> None:
    """Send this many bytes each second."""
    for _ in range(1000):
        await trio.sleep(1)
        await client.send(b"x" * rate)


@pytest.mark.parametrize(("first", "rate", "due"), [(0, 100, 30), (0, 499, 30), (30_000, 10, 61), (16_000, 250, 64)])
async def test_body_rate(autojump_clock: Any, handover: bool, first: int, rate: int, due: int) -> None:
    """500 B/s on average once 30 s were waited: 408 in the second in which the average falls below."""
    async with world(answer_ok, handover=handover) as here:
        client = here.connect()
        await client.send(UPLOAD)
        await trio.testing.wait_all_tasks_blocked()
        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            await client.send(b"x" * first)
            nursery.start_soon(trickle, client, rate)
            response = await client.response()
            assert trio.current_time() - start == pytest.approx(due, abs=1)
            nursery.cancel_scope.cancel()
        assert response.status == 408
        failed(await only_record(here), Side.CLIENT, Phase.UPLOAD, Kind.TIMEOUT)


async def test_body_rate_is_an_average(autojump_clock: Any, handover: bool) -> None:
    """A client that keeps to 500 B/s may upload for as long as it likes."""
    async with world(answer_ok, handover=handover) as here:
        client = here.connect()
        await client.send(request("POST", "/v1/files", None, "Content-Length: 520000"))
        await trickle(client, 520)
        assert (await client.response()).status == 200
        assert (await only_record(here)).outcome is Outcome.COMPLETED


async def test_no_body_deadline_while_the_client_is_throttled(autojump_clock: Any, handover: bool) -> None:
    """While the upstream does not take the upload the client has no turn: no idle and no rate deadline runs."""

    async def lazy(upstream: Conversation) -> None:
        while not (await take(upstream, little(handover=handover))).endswith(b"!"):  # noqa: ASYNC110  # the pause is the point
            await trio.sleep(100)  # less than 500 B/s, and less than its own deadline of 120 s
        await upstream.say(OK)
        await trio.sleep_forever()

    async with world(lazy, handover=handover, deadlines=Deadlines(first_byte=1000)) as here:
        here.by_request = False
        client = here.connect()
        await client.send(request("POST", "/v1/files", b"x" * 299_999 + b"!"))
        assert (await client.response()).status == 200
        assert trio.current_time() > 1000
        assert (await only_record(here)).outcome is Outcome.COMPLETED


async def test_linger(autojump_clock: Any, handover: bool) -> None:
    """After an answer that refuses a body the gateway reads and drops for 2 s, then closes on whoever goes on."""
    async with world(handover=handover) as here:
        client = here.connect()
        await client.send(request("POST", "/", None, "Content-Length: -1") + b"x")
        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trickle, client, 10)
            response = await client.response()
            assert response.status == 400
            assert since(start) == 0
            assert await ended(client) == "fin"
            await here.gateway_closes(0)
            assert since(start) == 2
            nursery.cancel_scope.cancel()
