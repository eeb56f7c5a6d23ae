"""The cancel storm: many exchanges over few slots, cancelled at random in every phase, leave nothing behind.

30 workers, 10 slots, 2,000 rounds, by the pool and the connections of the product over real sockets, against a real
HTTP/2 upstream (Hypercorn) and a scripted HTTP/1.1 one. Seeded: a failure can be repeated.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
from kit import eventually, open_sockets
from peers import http2_upstream

from canal_trio.errors import Failure
from canal_trio.messages import End, Headers, RequestHead, ResponseHead
from canal_trio.relay.flow import Ended, FlowReceiver, FlowSender, open_flow
from canal_trio.relay.idle import Reaper
from canal_trio.settings import Bounds, Deadlines, Settings, Upstream
from canal_trio.testing.scripts import chat_stream
from canal_trio.testing.upstreams import ScriptedUpstream
from canal_trio.upstream.connect import Connector
from canal_trio.upstream.pool import Lease, Pool

WORKERS, SLOTS, ROUNDS = 30, 10, 2_000
PHASES = ["never", "at once", "dial", "leased", "upload", "head", "stream", "some time"]


class Answer:
    """Where an attempt puts its answer; `on_head` may cancel."""

    def __init__(self, on_head: Callable[[], None]) -> None:
        self.body: FlowSender
        self.flow: FlowReceiver
        self.body, self.flow = open_flow(4)
        self._on_head = on_head

    async def head(self, head: ResponseHead) -> None:
        """Take it."""
        assert head.status == 200
        self._on_head()
        await trio.lowlevel.checkpoint()


class Body:
    """A request body in two pieces; `on_take` may cancel in between."""

    def __init__(self, content: bytes, on_take: Callable[[], None]) -> None:
        self._pieces = [content[:10], content[10:]]
        self._on_take = on_take
        self.ending: Any = None

    def take_nowait(self) -> list[bytes]:
        """Nothing is ready before it is awaited."""
        return []

    async def take(self) -> list[bytes]:
        """One piece."""
        self._on_take()
        await trio.lowlevel.checkpoint()
        piece = self._pieces.pop(0)
        if not self._pieces:
            self.ending = Ended(End())
        return [piece]


@dataclass
class Storm:
    """What happened."""

    pool: Pool
    rng: random.Random
    cancelled: Counter[str] = field(default_factory=Counter)
    completed: int = 0
    failures: list[Failure] = field(default_factory=list)
    rounds: int = 0
    most: int = 0

    async def worker(self) -> None:
        """Rounds until there are enough."""
        while self.rounds < ROUNDS:
            self.rounds += 1
            await self.round(self.rng.choice(PHASES))

    async def round(self, phase: str) -> None:
        """One exchange, cancelled in `phase` if it gets there."""
        scope = trio.CancelScope()
        held: list[Lease] = []
        abort_first = self.rng.random() < 0.5

        def leave(where: str) -> None:
            if where == phase:
                if abort_first and held:  # as the gateway does when a client leaves
                    held[0].abort()
                scope.cancel()

        if phase == "some time":
            scope.deadline = trio.current_time() + self.rng.uniform(0, 0.03)
        leave("at once")
        with scope:
            await self._exchange(held, leave)
        if scope.cancelled_caught:
            self.cancelled[phase] += 1
        for lease in held:
            lease.abort()  # of no effect on what was released

    async def _exchange(self, held: list[Lease], leave: Callable[[str], None]) -> None:
        lease = await self.pool.lease(dialling=lambda: leave("dial"))
        if isinstance(lease, Failure):
            self.failures.append(lease)
            return
        held.append(lease)
        self.most = max(self.most, self.pool.statistics().used)
        leave("leased")
        tokens = self.rng.randint(1, 4)
        content = json.dumps({"tokens": tokens, "gap": 0.001}).encode()
        fields = [(b"Host", b"upstream.test"), (b"Content-Length", b"%d" % len(content))]
        head = RequestHead(b"POST", b"/v1/chat/completions", Headers(fields))
        answer = Answer(lambda: leave("head"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._attempt, lease, head, Body(content, lambda: leave("upload")), answer)
            while answer.flow.ending is None:
                await answer.flow.take()
                leave("stream")
        if isinstance(answer.flow.ending, Ended):
            self.completed += 1
        elif isinstance(answer.flow.ending.failure, Failure):
            self.failures.append(answer.flow.ending.failure)

    async def _attempt(self, lease: Lease, head: RequestHead, body: Body, answer: Answer) -> None:
        try:
            failure = await lease.connection.run(head, body, answer)
            if failure is None and lease.connection.reusable:
                lease.release()
            answer.body.abort(failure)
        finally:
            lease.abort()


@asynccontextmanager
async def storm_over(upstream: Upstream, seed: int) -> AsyncIterator[Storm]:
    """A pool of ten slots to `upstream`, with its reaper."""
    deadlines = Deadlines(lease=60)
    settings = Settings(upstreams=(upstream,), deadlines=deadlines)
    reaper = Reaper()
    connector = Connector(settings, reaper)
    pool = Pool(upstream, bounds=Bounds(), deadlines=deadlines, connect=connector.connect, reaper=reaper)
    async with trio.open_nursery() as nursery:
        await nursery.start(reaper.run)
        yield Storm(pool, random.Random(seed))
        pool.close()
        nursery.cancel_scope.cancel()


async def rage(storm: Storm) -> None:
    """All workers to their end, and the book of the pool afterwards."""
    async with trio.open_nursery() as workers:
        for _ in range(WORKERS):
            workers.start_soon(storm.worker)
    statistics = storm.pool.statistics()
    assert (statistics.used, statistics.waiting) == (0, 0), statistics
    assert statistics.idle <= SLOTS
    assert storm.most == SLOTS, "the slots were never all in use"
    # A reused connection may be found dead (the upstream closed it); nothing else may go wrong.
    unexpected = [failure for failure in storm.failures if "this stream was closed" not in failure.detail]
    assert not unexpected, Counter(map(str, unexpected))
    assert storm.completed > ROUNDS / 20
    assert all(storm.cancelled[phase] for phase in PHASES if phase != "never"), storm.cancelled
    print(f"\n{storm.completed} completed, cancelled {dict(storm.cancelled)}, {statistics}")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])
async def test_a_cancel_storm_over_http_1_1(seed: int) -> None:
    """No slot, lease or socket is left, and the upstream sees each that was cut short."""
    before = open_sockets()
    async with ScriptedUpstream(lambda request: chat_stream(int(str(request.json["tokens"])), gap=0.001)) as upstream:
        async with storm_over(Upstream("u", upstream.url, connections=SLOTS), seed) as storm:
            await rage(storm)
            await upstream.until(lambda: upstream.open_connections == storm.pool.statistics().idle)
            # The end may have been read before the request was parsed: it is the connection that was left.
            cut = [request for request in upstream.requests if not request.answered]
            assert len(cut) > ROUNDS / 20
            assert all(request.connection.left for request in cut)
        await upstream.until(lambda: upstream.open_connections == 0)
    assert not open_sockets() - before


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("seed", [1])
async def test_a_cancel_storm_over_http2(seed: int) -> None:
    """The same, and Hypercorn's application is told of each request that was cut short."""
    before = open_sockets()
    async with (
        http2_upstream() as upstream,
        storm_over(Upstream("u", upstream.url, connections=SLOTS, http2=True), seed) as storm,
    ):
        await rage(storm)
        await eventually(lambda: all(seen.answered or seen.left.is_set() for seen in upstream.requests))
        answered = sum(seen.answered for seen in upstream.requests)
        cut = len(upstream.requests) - answered
        assert answered >= storm.completed
        assert cut > ROUNDS / 20
        print(f"{len(upstream.requests)} requests seen by the upstream, {cut} of them cut short and told so")
    await eventually(lambda: not open_sockets() - before, "a socket is left")
