"""The gateway, unchanged, in a simulated network: clients and upstreams are streams in memory, time is virtual.

`world()` runs a gateway whose dialer gives simulated connections; the far end of each is played by a function of the
test. At its end nothing may be left: no connection, lease, held byte, task, or open stream of the gateway's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
import trio.testing
from kit import Client, Records, settings_for
from trio.abc import HalfCloseableStream, Stream

from canal_trio.errors import Failure, Kind, Phase, Retry, Side
from canal_trio.gateway import Gateway
from canal_trio.hooks import ExchangeRecord
from canal_trio.quota.admission import Limits
from canal_trio.quota.memory import MemoryStore
from canal_trio.quota.table import Table, table_bytes
from canal_trio.settings import Settings, Upstream
from canal_trio.testing.simstream import SimLink, SimStream, sim_stream_pair

__all__ = [
    "EXACT",
    "OK",
    "SSE",
    "Conversation",
    "OneEnded",
    "PlainStream",
    "Play",
    "World",
    "comparable",
    "ended",
    "failed",
    "little",
    "only_record",
    "read_request",
    "since",
    "world",
]

URL = "http://upstream.test/v1"
TABLE = table_bytes(1024, 1)
NOON = 1_750_075_200.0  # of a day in the middle of a month, for budgets
FOR_EVER = 1_000_000  # virtual seconds
EXACT = 0.01  # seconds of virtual time: the reaper's grain, and nothing else
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


class OneEnded(Stream):
    """A stream without the hand-over protocol over one that has it, which cannot be half-closed: as Trio's own TLS."""

    def __init__(self, inner: SimStream) -> None:
        self.transport_stream = inner

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """As the stream below."""
        await self.transport_stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """As the stream below."""
        await self.transport_stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """As the stream below."""
        return await self.transport_stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        """As the stream below."""
        await self.transport_stream.aclose()


class PlainStream(OneEnded, HalfCloseableStream):
    """A Trio stream without the hand-over protocol over one that has it, as a TLS stream is over its socket."""

    async def send_eof(self) -> None:
        """As the stream below."""
        await self.transport_stream.send_eof()


@dataclass
class Conversation:
    """One simulated connection of the gateway to an upstream, seen from the upstream's end."""

    stream: SimStream
    number: int
    requests: list[bytes] = field(default_factory=list)  # heads and bodies, as they came
    left: float | None = None  # when the gateway was seen to close
    upstream: str = "u0"  # which one it is

    async def say(self, data: bytes) -> None:
        """Send."""
        await self.stream.send_all(data)

    async def chunk(self, *pieces: bytes) -> None:
        """Send pieces as chunks."""
        for piece in pieces:
            await self.say(b"%x\r\n%b\r\n" % (len(piece), piece))

    def note_leaving(self) -> None:
        """The gateway's end was closed."""
        if self.left is None:
            self.left = trio.current_time()


Play = Callable[[Conversation], Awaitable[None]]
"""Answers one request, which was read whole; returning serves the next one."""


async def read_request(stream: trio.abc.Stream, begun: bytes = b"") -> bytes | None:
    """One request, head and body as they came; None when the peer has left instead."""
    data = begun
    while b"\r\n\r\n" not in data or not _whole(data):
        more = await stream.receive_some()
        if not more:
            return None
        data += more
    return data


def _whole(data: bytes) -> bool:
    head, _, body = data.partition(b"\r\n\r\n")
    lower = head.lower()
    if b"transfer-encoding: chunked" in lower:
        return body.endswith(b"0\r\n\r\n")
    _, found, length = lower.partition(b"content-length: ")
    return not found or len(body) >= int(length.partition(b"\r\n")[0])


class World:
    """A gateway, its simulated clients and upstreams."""

    def __init__(
        self, settings: Settings, nursery: trio.Nursery, play: Play | None, *, handover: bool, limits: Limits
    ) -> None:
        self.records = Records()
        self.limits = limits
        self.gateway = Gateway(settings, recorders=[self.records], dialer=self._dial)
        self.gateway.limit_by(limits.admission)
        self.nursery = nursery
        self.handover = handover
        self.upstream_link = SimLink()  # from the upstream to the gateway
        self.request_link = SimLink()  # from the gateway to the upstream
        self.conversations: list[Conversation] = []
        self.streams: list[SimStream] = []  # the gateway's ends
        self.clients: list[Client] = []
        self.by_request = True  # False: `play` gets the bare stream and reads for itself
        self.dialer: Callable[[Upstream], Awaitable[Any]] | None = None  # instead of the simulated network
        self.refusing: set[str] = set()  # upstreams that accept no connection
        self._play = play

    async def _dial(self, upstream: Upstream) -> trio.abc.Stream | Failure:
        await trio.lowlevel.checkpoint()
        if self.dialer is not None:
            return await self.dialer(upstream)  # type: ignore[no-any-return]
        if upstream.name in self.refusing:
            return Failure(Side.UPSTREAM, Phase.DIAL, Kind.REFUSED, "Nobody listens.", Retry.UNSENT)
        ours, theirs = sim_stream_pair(a_to_b=self.request_link, b_to_a=self.upstream_link)
        conversation = Conversation(theirs, len(self.conversations), upstream=upstream.name)
        theirs.watch(conversation.note_leaving)  # type: ignore[attr-defined]  # this kind hands over
        self.conversations.append(conversation)
        self.streams.append(ours)
        self.nursery.start_soon(self._serve, conversation)
        return ours if self.handover else PlainStream(ours)

    async def _serve(self, conversation: Conversation) -> None:
        assert self._play is not None
        try:
            if not self.by_request:
                await self._play(conversation)
                return
            while (request := await read_request(conversation.stream)) is not None:
                conversation.requests.append(request)
                await self._play(conversation)
            conversation.note_leaving()  # the end may be read before the watch is told of it
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            conversation.note_leaving()
        finally:
            conversation.stream.close()

    def connect(self, *, to_gateway: SimLink | None = None, to_client: SimLink | None = None) -> Client:
        """A client, served by the gateway from now on."""
        ours, theirs = sim_stream_pair(
            a_to_b=to_client or SimLink(), b_to_a=to_gateway or SimLink(), handover=self.handover
        )
        self.streams.append(ours)
        self.nursery.start_soon(self._handle, ours)
        client = Client(theirs)
        self.clients.append(client)
        return client

    async def _handle(self, stream: SimStream) -> None:
        await self.gateway.handle(stream, peer="192.0.2.1")

    async def gateway_closes(self, index: int) -> None:
        """Wait until the gateway has closed its end of this stream (they are numbered in order of their making)."""
        while not self.streams[index].closed:  # noqa: ASYNC110  # virtual time: no event tells it
            await trio.sleep(0.001)

    async def settle(self) -> None:
        """The clients leave; nothing may be left of them in the gateway."""
        for client in self.clients:
            client.stream.close()  # type: ignore[attr-defined]  # a simulated stream
        await trio.testing.wait_all_tasks_blocked()
        statistics = self.gateway.statistics()
        assert (statistics.connections, statistics.in_flight, statistics.held_bytes) == (0, 0, 0), statistics
        assert (statistics.waiting, statistics.flow_bytes, self.gateway.places.used) == (0, 0, 0), statistics
        for pool in statistics.pools.values():
            assert (pool.used, pool.waiting) == (0, 0), pool
        open_ends = sum(not stream.closed for stream in self.streams)
        assert open_ends == sum(pool.idle for pool in statistics.pools.values()), "a stream is open that no pool knows"
        assert not any(one.in_flight for one in statistics.upstreams.values()), statistics.upstreams


@asynccontextmanager
async def world(play: Play | None = None, *, handover: bool, **settings: Any) -> AsyncIterator[World]:
    """A gateway before one simulated upstream (`upstream`), or several (`upstreams`), for the block.

    `settings` go to `kit.settings_for`.
    """
    upstreams = settings.pop("upstreams", None) or (settings.pop("upstream", Upstream("u0", URL)),)
    # A deadlock has no timer to jump to: without this one it would be real time that passes.
    with trio.fail_after(FOR_EVER):
        async with _running(upstreams, play, settings, handover=handover) as made:
            yield made


@asynccontextmanager
async def _running(
    upstreams: Sequence[Upstream], play: Play | None, settings: dict[str, Any], *, handover: bool
) -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        table = Table(bytearray(TABLE))
        if handover:  # as with one worker; else as with several
            table.own()
        limits = settings.pop("counting", None) or Limits(MemoryStore(table, wall=lambda: NOON))
        made = World(settings_for(*upstreams, **settings), nursery, play, handover=handover, limits=limits)
        await nursery.start(limits.store.run)
        await nursery.start(made.gateway.run)
        yield made
        await made.settle()
        nursery.cancel_scope.cancel()


def comparable(record: ExchangeRecord) -> ExchangeRecord:
    """The record without what may differ from run to run, and between hand-over and the plain path."""
    latency = None if record.cancel_latency is None else 0.0
    return record._replace(
        started_at=0.0, request_id="", cancel_latency=latency, handed_over=0, queued=0, waits=0
    )


# -- small helpers of the tests ---------------------------------------------------------------------------------------


def since(start: float) -> Any:
    """Virtual seconds since `start`, comparable to an exact number."""
    return pytest.approx(trio.current_time() - start, abs=EXACT)


def little(*, handover: bool) -> int:
    """Bytes that are progress: any, or a whole write where the progress within one cannot be seen."""
    return 1000 if handover else 20_000


async def ended(client: Client) -> str:
    """How the connection ended; what still comes is dropped."""
    await client.rest()
    assert client.ended_by is not None
    return client.ended_by


async def only_record(here: World) -> ExchangeRecord:
    """The one record, however long it takes."""
    await here.records.wait(seconds=10_000)
    await trio.testing.wait_all_tasks_blocked()  # what was closed in that step is seen at the other ends
    return await here.records.one()


def failed(record: ExchangeRecord, side: Side, phase: Phase, kind: Kind) -> None:
    """Check the record's failure."""
    assert record.failure is not None
    assert (record.failure.side, record.failure.phase, record.failure.kind) == (side, phase, kind)


async def answer_ok(upstream: Conversation) -> None:
    """A whole answer at once."""
    await upstream.say(OK)


async def take(upstream: Conversation, size: int) -> bytes:
    """The next `size` bytes, or up to the end of what came with the last of them."""
    data = b""
    while len(data) < size and not data.endswith(b"!"):
        data += await upstream.stream.receive_some(1000)
    return data
