"""An HTTP/2 connection on a stage: the upstream's end of its stream plays what a test wrote; a simulated network."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio
from peers import H2Peer

from canal_trio.errors import Failure
from canal_trio.messages import Headers, RequestHead, ResponseHead
from canal_trio.relay.flow import FlowReceiver, FlowSender, open_flow
from canal_trio.relay.idle import Reaper
from canal_trio.settings import Bounds, Deadlines
from canal_trio.testing.simstream import SimStream, sim_stream_pair
from canal_trio.upstream.httpcore import Http2Connection
from canal_trio.wire.targets import BaseUrl

__all__ = ["CHUNKED", "DEADLINES", "GET", "Answer", "Stage", "silence", "stage"]

BASE = BaseUrl("http", "upstream.test", 80, b"", b"upstream.test")
GET = RequestHead(b"GET", b"/", Headers([(b"Host", b"upstream.test")]))
CHUNKED = RequestHead(b"POST", b"/", Headers([(b"Host", b"upstream.test"), (b"Transfer-Encoding", b"chunked")]))
DEADLINES = Deadlines(first_byte=300, upstream_idle=120)


class Answer:
    """What came of an attempt."""

    def __init__(self) -> None:
        self.heads: list[ResponseHead] = []
        self.body: FlowSender
        self.flow: FlowReceiver
        self.body, self.flow = open_flow(2)

    async def head(self, head: ResponseHead) -> None:
        """Keep it."""
        self.heads.append(head)
        await trio.lowlevel.checkpoint()

    async def rest(self) -> bytes:
        """The body, to its ending."""
        data = b""
        while self.flow.ending is None:
            data += b"".join(await self.flow.take())
        return data


class Stage:
    """A connection, and the upstream's end of its stream."""

    def __init__(self, connection: Http2Connection, near: SimStream, peer: H2Peer, nursery: trio.Nursery) -> None:
        self.connection = connection
        self.near = near
        self.peer = peer
        self.nursery = nursery
        self.results: list[Failure | None] = []

    def start(self, head: RequestHead = GET, body: FlowReceiver | None = None) -> Answer:
        """Begin an attempt."""
        answer = Answer()

        async def run() -> None:
            self.results.append(await self.connection.run(head, body, answer))

        self.nursery.start_soon(run)
        return answer


@asynccontextmanager
async def stage(play: Callable[[H2Peer], Awaitable[None]], *, bounds: Bounds | None = None) -> AsyncIterator[Stage]:
    """A connection to an upstream that plays `play`. What is still running at the end of the block is cancelled."""
    near, far = sim_stream_pair()
    peer = H2Peer(far)

    async def serve() -> None:
        try:
            peer.h2.initiate_connection()
            await peer.flush()
            await play(peer)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    reaper = Reaper()
    async with trio.open_nursery() as nursery:
        await nursery.start(reaper.run)
        nursery.start_soon(serve)
        raw: Any = near
        connection = Http2Connection(near, raw, BASE, reaper=reaper, bounds=bounds or Bounds(), deadlines=DEADLINES)
        yield Stage(connection, near, peer, nursery)
        nursery.cancel_scope.cancel()
    connection.abort()
    connection.abort()
    assert near.closed
    far.close()


async def silence(peer: H2Peer) -> None:
    """Reads, says nothing."""
    await peer.gone()
