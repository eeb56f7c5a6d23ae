"""The attempts of one exchange: which upstream, over which connection, and whether another one follows.

An attempt runs as a pair (the upstream task puts heads and pieces into a `Port`, the driver delivers them) or straight,
where nothing has to wait for two sides at once. Another attempt is made only before the first byte of an answer was
relayed, and only if policy says that it may (design, section 6).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, final

import trio

from canal_trio.errors import Failure, Kind, Phase, Retry, Side
from canal_trio.gateway.deliver import Delivery
from canal_trio.gateway.exchange import Exchange
from canal_trio.gateway.port import Port
from canal_trio.gateway.requests import UpstreamRequest, UpstreamRequests
from canal_trio.gateway.writer import ClientWriter
from canal_trio.messages import RequestHead, ResponseHead
from canal_trio.policy.exchange import Step, next_step, retries_status
from canal_trio.policy.routing import Plan
from canal_trio.relay.flow import Ended
from canal_trio.settings import Settings, Upstream
from canal_trio.upstream.interface import BodySource, StraightConnection
from canal_trio.upstream.pool import Lease

if TYPE_CHECKING:
    from canal_trio.gateway.core import Generation

__all__ = ["PEEK_BYTES", "Attempts"]

PEEK_BYTES = 262_144  # of a body that nothing else needs are held for the log's `model`


@final
class Attempts:
    """Runs them inside the exchange's scope. `settled` is called when the answer is here: no attempt will follow."""

    def __init__(
        self,
        exchange: Exchange,
        generation: Generation,
        writer: ClientWriter,
        delivery: Delivery,
        requests: UpstreamRequests,
        *,
        trusted: bool,
        close: bool,
        settled: Callable[[], None],
    ) -> None:
        self._exchange = exchange
        self._generation = generation
        self._settings: Settings = generation.settings
        self._writer = writer
        self._delivery = delivery
        self._requests = requests
        self._trusted = trusted  # the peer is a trusted proxy
        self._close = close  # the connection ends with this exchange
        self._settled = settled

    async def run(self, plan: Plan) -> Failure | None:
        """Try where `plan` leads. The failure of the last one; None: an answer was delivered or broke off."""
        exchange = self._exchange
        index, fresh = 0, False
        while True:
            upstream = plan.choices[index].upstream
            others = index + 1 < len(plan.choices)
            failure = await self._attempt(upstream, fresh=fresh, others=others)
            if failure is None or self._delivery.begun or exchange.failure is not None:
                return failure
            step = next_step(
                failure,
                replayable=exchange.body is None or exchange.body.replayable,
                fresh_tried=fresh,
                others=others,
                retry_sent=upstream.retry_sent,
            )
            if step is Step.STOP:
                return failure
            fresh = step is Step.FRESH
            if step is Step.NEXT:
                index += 1

    async def _attempt(self, upstream: Upstream, *, fresh: bool, others: bool) -> Failure | None:
        """One try at one upstream. None: an answer was delivered, or begun."""
        exchange = self._exchange
        exchange.attempts += 1
        exchange.upstream = upstream.name
        exchange.phase = Phase.LEASE
        pool = self._generation.pools[upstream.name]
        request = self._requests.make(exchange, upstream, self._generation, trusted=self._trusted)
        if isinstance(request, Failure):
            return request
        lease = await pool.lease(fresh=fresh, dialling=self._dialling)
        if isinstance(lease, Failure):
            return lease
        if exchange.body is not None and not others and not lease.reused:
            exchange.body.last_attempt(PEEK_BYTES)  # nothing that can happen to it would be tried again
        exchange.lease = lease
        exchange.phase = Phase.FIRST_BYTE if exchange.received else Phase.UPLOAD
        straight = lease.connection.straight if self._goes_straight(upstream) else None
        if straight is not None:
            return await self._straight(lease, straight, request, upstream, others=others)
        port = Port(self._settings.bounds, self._delivery.meter)
        body = exchange.body.source() if exchange.body is not None else None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._upstream_task, lease, request.head, body, port)
                failure = await self._answer(port, upstream, others=others)
                nursery.cancel_scope.cancel(reason="the answer was delivered or given up")
        finally:
            port.close()
        return failure

    def _goes_straight(self, upstream: Upstream) -> bool:
        """Nothing has to wait for two sides at once, unless the client blocks: no task of its own for the upstream."""
        exchange = self._exchange
        return (
            exchange.received
            and exchange.upgrade is None
            and (exchange.body is None or isinstance(exchange.body.ending, Ended))
            and self._writer.direct is not None
            and upstream.heartbeat is None
        )

    async def _straight(
        self,
        lease: Lease,
        connection: StraightConnection,
        request: UpstreamRequest,
        upstream: Upstream,
        *,
        others: bool,
    ) -> Failure | None:
        exchange = self._exchange
        body = exchange.body.source() if exchange.body is not None else None

        def settle() -> None:
            if connection.conclude() is None and lease.connection.reusable:
                lease.release()
            else:
                lease.abort()
            exchange.lease = None

        try:
            answer = await connection.ask(request.head, body, self._delivery.informational, request.block)
            if isinstance(answer, Failure):
                return answer
            another = self._worth_another(answer, upstream, others=others)
            if another is None:
                self._settled()
                await self._delivery.straight(
                    connection, answer, close=self._close, settle=settle, lasts=self._requests.forget
                )
            return another
        finally:
            lease.abort()  # of no effect once it was settled
            if exchange.lease is lease:
                exchange.lease = None

    def _dialling(self) -> None:
        self._exchange.phase = Phase.DIAL

    async def _upstream_task(self, lease: Lease, head: RequestHead, body: BodySource | None, port: Port) -> None:
        try:
            failure = await lease.connection.run(head, body, port)
            if failure is None and lease.connection.reusable:
                lease.release()
            port.finish(failure)
        finally:
            lease.abort()  # of no effect after release()
            if self._exchange.lease is lease:
                self._exchange.lease = None

    async def _answer(self, port: Port, upstream: Upstream, *, others: bool) -> Failure | None:
        exchange, delivery = self._exchange, self._delivery
        while True:
            head = await port.next_head()
            if isinstance(head, Failure):
                return head
            if head.status == 101 or not head.informational:
                break
            await delivery.informational(head)
        another = self._worth_another(head, upstream, others=others)
        if another is not None:
            return another
        self._settled()
        if head.status == 101:
            await self._tunnel(head, port)
        else:
            self._begin_reading()
            # An upload that this answer overtook is not waited for: say so, or the client's next request meets a close.
            await delivery.final(head, close=self._close or not exchange.received)
            await delivery.body(port.body, port.flow, upstream.heartbeat)
        return None

    def _worth_another(self, head: ResponseHead, upstream: Upstream, *, others: bool) -> Failure | None:
        """Why another upstream is asked instead of relaying this answer, if one is."""
        body = self._exchange.body
        replayable = body is None or body.replayable
        if not (others and replayable and retries_status(head.status, retry_sent=upstream.retry_sent)):
            return None
        detail = f"It answered {head.status}."
        return Failure(Side.UPSTREAM, Phase.FIRST_BYTE, Kind.REFUSED, detail, Retry.UNSENT)

    def _begin_reading(self) -> None:
        """Whether it became a tunnel is decided: the client's next bytes may be read."""
        if self._exchange.upgraded is not None:
            self._exchange.upgraded.set()

    async def _tunnel(self, head: ResponseHead, port: Port) -> None:
        exchange, delivery = self._exchange, self._delivery
        exchange.tunnels()
        await delivery.upgraded(head)
        self._begin_reading()
        await delivery.body(port.body, port.flow)
        if delivery.complete and await self._writer.send_eof():
            # The upstream's direction has ended, the client's has not: it may still have something to say.
            failure = await port.over()
            if failure is not None and failure.side is Side.GATEWAY:
                exchange.note(failure)
