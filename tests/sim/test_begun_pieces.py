"""A piece of which the client's kernel took a part, and then the exchange ended: the part was delivered, and counts.

The simulation found it as "the record says 0 bytes, 220 were delivered", at a drain's deadline.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing
from kit import Client, chat
from simkit import SSE, URL, Conversation, Play, World, only_record, world

from canal_trio.hooks import ExchangeRecord, Outcome
from canal_trio.settings import Drain, Model, Target, Upstream
from canal_trio.testing.simstream import SimLink, SimStream, sim_stream_pair

ROOM = 1000  # bytes that the client's kernel takes while the client does not read


async def whole(upstream: Conversation) -> None:
    """All of it at once: written in one with its head."""
    await upstream.say(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + b"x" * 5000)


async def at_first(upstream: Conversation) -> None:
    """A stream whose first event comes with its head, and is large."""
    await upstream.say(SSE + b"bb8\r\n" + b"x" * 3000 + b"\r\n")
    await trio.sleep_forever()


async def later(upstream: Conversation) -> None:
    """A stream whose second event is large: handed over."""
    await upstream.say(SSE)
    await upstream.chunk(b"data: 1\n\n")
    await trio.sleep(1)
    await upstream.chunk(b"x" * 3000)
    await trio.sleep_forever()


async def many(upstream: Conversation) -> None:
    """A stream of events of which some wait behind the one that was begun."""
    await upstream.say(SSE)
    for _ in range(20):
        await upstream.chunk(b"data: " + b"x" * 292 + b"\n\n")
        await trio.sleep(0.1)
    await trio.sleep_forever()


def deadline(here: World, _client: Client, _scope: trio.CancelScope) -> None:
    """The gateway drains, and its time is over."""
    here.gateway.drain(trio.current_time() + 1)


def stopped(_here: World, _client: Client, scope: trio.CancelScope) -> None:
    """The gateway is stopped at once."""
    scope.cancel()


def stalled(_here: World, _client: Client, _scope: trio.CancelScope) -> None:
    """The client reads nothing more."""


def gone(_here: World, client: Client, _scope: trio.CancelScope) -> None:
    """The client closes its connection."""
    client.stream.close()  # type: ignore[attr-defined]  # a simulated stream


def body_bytes(message: bytes) -> int:
    """How many bytes of the body are in what there is of a message."""
    head, _, rest = message.partition(b"\r\n\r\n")
    if b"chunked" not in head.lower():
        return len(rest)
    count = 0
    while b"\r\n" in rest:
        line, _, rest = rest.partition(b"\r\n")
        size = int(line, 16)
        count += min(size, len(rest))
        rest = rest[size + 2 :]
    return count


async def ends(
    play: Play, ending: Callable[..., None], reads: int, *, handover: bool, **settings: Any
) -> tuple[ExchangeRecord, int]:
    """The record of an exchange that ends while a piece is under way, and what its client's kernel had taken."""
    async with world(play, handover=handover, **settings) as here:
        ours, theirs = sim_stream_pair(a_to_b=SimLink(ROOM), handover=handover)
        here.streams.append(ours)
        client, scope = Client(theirs), trio.CancelScope()
        here.clients.append(client)

        async def serve() -> None:
            with scope:
                await here.gateway.handle(ours, peer="192.0.2.1")

        here.nursery.start_soon(serve)
        await client.send(chat())
        await trio.sleep(5)
        if reads:
            await client.fill(reads)
        await trio.testing.wait_all_tasks_blocked()
        taken = body_bytes(bytes(client.seen) + waiting(theirs))
        ending(here, client, scope)
        return await only_record(here), taken


def waiting(stream: SimStream) -> bytes:
    """What has arrived and was not read."""
    return bytes(stream.incoming._arrived)


@pytest.mark.parametrize("heartbeat", [None, 50.0], ids=["straight", "pair"])
@pytest.mark.parametrize("reads", [0, 137, 600])
@pytest.mark.parametrize(
    ("ending", "outcome"),
    [
        (deadline, Outcome.DRAINED),
        (stopped, Outcome.DRAINED),
        (stalled, Outcome.CLIENT_STALLED),
        (gone, Outcome.CLIENT_GONE),
    ],
)
@pytest.mark.parametrize("play", [whole, at_first, later, many])
async def test_a_record_has_less_bytes_than_were_delivered(
    autojump_clock: Any,
    handover: bool,
    play: Play,
    ending: Callable[..., None],
    outcome: Outcome,
    reads: int,
    heartbeat: float | None,
) -> None:
    """What the kernel took of the last piece is in the record; where that cannot be seen, it is never too much."""
    upstream = Upstream("u0", URL, heartbeat=heartbeat)
    record, taken = await ends(play, ending, reads, handover=handover, upstream=upstream)
    assert record.outcome is outcome
    assert taken > 0
    if handover:
        assert record.response_bytes == taken
    else:
        assert record.response_bytes <= taken


@pytest.mark.parametrize("heartbeat", [None, 50.0], ids=["straight", "pair"])
@pytest.mark.parametrize("reads", [0, 137, 600])
@pytest.mark.parametrize("play", [at_first, later, many])
async def test_so_where_the_answer_goes_on_without_its_client(
    autojump_clock: Any, play: Play, reads: int, heartbeat: float | None
) -> None:
    """`on_disconnect = "drain"`: what the client had got is counted as it was when it left."""
    models = (Model("*", (Target("u0"),), on_disconnect=Drain(seconds=60)),)
    upstream = Upstream("u0", URL, heartbeat=heartbeat)
    record, taken = await ends(play, gone, reads, handover=True, upstream=upstream, models=models)
    assert record.outcome is Outcome.CLIENT_GONE
    assert "drained" in record.flags
    assert record.response_bytes == taken > 0
