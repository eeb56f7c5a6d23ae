"""What one exchange may hold, in bytes, reached and never passed; and what happens when it can go on."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing
from kit import chat, request
from simkit import SSE, Conversation, World, world

from canal_trio.hooks import Outcome
from canal_trio.settings import Bounds
from canal_trio.testing.simstream import SimLink

MANY = SimLink(buffer=3_000_000)
LITTLE = SimLink(buffer=1000)


def formula(bounds: Bounds) -> int:
    """The bound of one direction (design, section 4)."""
    return (2 * bounds.capacity + 2) * bounds.piece_bytes + bounds.handover_bytes


SIZES = [Bounds(), Bounds(piece_bytes=1000, capacity=1, handover_bytes=1000), Bounds(capacity=16)]


@pytest.mark.parametrize("bounds", SIZES, ids=["default", "smallest", "large"])
@pytest.mark.parametrize("waits", [False, True], ids=["at-once", "later"])
async def test_response_flow(autojump_clock: Any, handover: bool, bounds: Bounds, waits: bool) -> None:
    """A client that never reads: what was taken from its upstream and not passed on is at most what the formula says.

    The channel and the hand before it are full, so the bound is used, too. Then the client reads, and all arrives.
    """
    body = bytes(range(256)) * 8000

    async def floods(upstream: Conversation) -> None:
        await upstream.say(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
        if waits:
            await trio.sleep(1)  # so that the client's side is parked and hand-over begins
        await upstream.say(body)

    async with world(floods, handover=handover, bounds=bounds) as here:
        here.upstream_link = MANY
        client = here.connect(to_client=LITTLE)
        await client.send(chat())
        head = await client.final_head()
        for _ in range(10):
            await trio.sleep(5)
            await trio.testing.wait_all_tasks_blocked()
            held = taken(here) - passed_on(here)
            assert held <= formula(bounds)
            assert held >= (bounds.capacity + 1) * bounds.piece_bytes
            # What is counted against the ceiling of memory is that, and a batch counts whole until all of it has gone.
            counted = here.gateway.statistics().flow_bytes
            assert held - bounds.piece_bytes <= counted <= formula(bounds)
            for _ in range(40):
                assert await client.fill(600)
        await client.body(head)
        assert head.complete
        assert head.body == body
        record = await here.records.one()
        assert record.outcome is Outcome.COMPLETED
        assert record.waits  # the log and the metrics know that the upstream had to wait


def taken(here: World) -> int:
    """Bytes the gateway has received from the upstream, the head not counted."""
    stream = here.streams[-1]
    received = stream.incoming._sent - stream.unread
    return received - len(b"HTTP/1.1 200 OK\r\nContent-Length: 2048000\r\n\r\n")


def passed_on(here: World) -> int:
    """Bytes the client's side has taken, the head not counted."""
    sent: int = here.streams[0].outgoing._sent
    return sent - len(bytes(here.clients[0].seen).partition(b"\r\n\r\n")[0]) - 4


@pytest.mark.parametrize("bounds", SIZES, ids=["default", "smallest", "large"])
async def test_request_flow(autojump_clock: Any, handover: bool, bounds: Bounds) -> None:
    """An upstream that never reads: the same of the other direction, once the body is no longer held for replay."""
    bounds = Bounds(
        piece_bytes=bounds.piece_bytes,
        capacity=bounds.capacity,
        handover_bytes=bounds.handover_bytes,
        held_body_bytes=0,
    )
    size = 2_000_000

    async def lazy(upstream: Conversation) -> None:
        await trio.sleep(50)
        received = b""
        while len(received.partition(b"\r\n\r\n")[2]) < size:
            received += await upstream.stream.receive_some(100_000)
        await upstream.say(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await trio.sleep_forever()

    async with world(lazy, handover=handover, bounds=bounds) as here:
        here.by_request = False
        here.request_link = LITTLE
        client = here.connect(to_gateway=MANY)
        await client.send(request("POST", "/v1/files", b"u" * size))
        await trio.sleep(40)
        received = here.streams[0].incoming._sent - here.streams[0].unread
        assert (bounds.capacity + 1) * bounds.piece_bytes <= received <= formula(bounds) + 2000
        assert received - bounds.piece_bytes - 2000 <= here.gateway.statistics().flow_bytes <= formula(bounds)
        assert (await client.response()).status == 200
        assert (await here.records.one()).request_bytes == size


async def test_stream_of_many_small_events_is_bounded_by_pieces(autojump_clock: Any, handover: bool) -> None:
    """Small events fill the channel as pieces, so what is held stays far below the bound in bytes."""
    event = b"data: x\n\n"

    async def drips(upstream: Conversation) -> None:
        await upstream.say(SSE)
        for _ in range(4000):
            await upstream.chunk(event)
            await trio.sleep(0.001)
        await upstream.say(b"0\r\n\r\n")

    async with world(drips, handover=handover) as here:
        client = here.connect(to_client=LITTLE)
        await client.send(chat())
        head = await client.final_head()
        await trio.sleep(20)
        assert here.streams[1].unread > 0, "the upstream was not stopped"
        await client.body(head)
        assert head.complete
        assert head.body == event * 4000
