"""The attempts of one exchange: which upstream, over which connection, and whether another one follows.

An attempt runs as a pair (the upstream task puts heads and pieces into a `Port`, the driver delivers them) or straight,
where nothing has to wait for two sides at once. Another attempt is made only before the first byte of an answer was
relayed, and only if policy says that it may (design, section 6).
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, final

import trio

from canal_trio.errors import Failure, Kind, Phase, Retry, Side
from canal_trio.gateway.balancing import Group, find_key, timing, verdict_of
from canal_trio.gateway.deliver import Delivery
from canal_trio.gateway.exchange import Exchange
from canal_trio.gateway.kept import HeldFlow, KeptAnswer, hold_event, hold_event_of_flow, keep, keep_from_flow
from canal_trio.gateway.port import Port
from canal_trio.gateway.requests import UpstreamRequest, UpstreamRequests
from canal_trio.gateway.writer import ClientWriter
from canal_trio.hooks import Tried
from canal_trio.messages import RequestHead, ResponseHead
from canal_trio.policy.exchange import Step, next_step, retries_status
from canal_trio.policy.health import Standing, Verdict
from canal_trio.policy.retries import pause
from canal_trio.policy.routing import Plan, key_in
from canal_trio.relay.course import checkpoint_if_cancelled, in_task
from canal_trio.relay.flow import Ended, FlowReceiver
from canal_trio.settings import Settings, Upstream
from canal_trio.upstream.interface import AnswerBody, BodySource, StraightConnection
from canal_trio.upstream.pool import Lease
from canal_trio.wire.facts import response_facts
from canal_trio.wire.hints import retry_after

if TYPE_CHECKING:
    from canal_trio.gateway.core import Generation

__all__ = ["PEEK_BYTES", "Attempts"]

_log = logging.getLogger("canal_trio.gateway")

PEEK_BYTES = 262_144  # of a body that nothing else needs are held for the log's `model`


@final
class Attempts:
    """Runs them inside the exchange's scope. `settled` is called when the answer is here: no attempt will follow."""

    __slots__ = (
        "_close", "_delivery", "_exchange", "_generation", "_group", "_kept", "_key", "_most", "_next", "_request",
        "_requests", "_settings", "_settled", "_standing", "_status", "_trial", "_tried", "_trusted", "_writer"
    )  # fmt: skip

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
        self._group: Group
        self._most = 1  # upstreams that may be asked
        self._key: bytes | None = None  # what the hash goes by
        self._tried: tuple[int, ...] = ()
        self._next: int | None = None  # which is asked after the present one
        self._kept: KeptAnswer | None = None
        # of the present attempt
        self._request: UpstreamRequest | None = None  # until it was answered
        self._standing: Standing
        self._trial = False
        self._status: int | None = None  # of its answer

    async def run(self, plan: Plan) -> Failure | None:
        """Try where `plan` leads. The failure to answer with; None: an answer was delivered or broke off."""
        exchange, choices = self._exchange, plan.choices
        group = self._group = self._generation.balancing.group(plan)
        self._most = min(len(choices), self._settings.retries.attempts)
        if group.by_key:
            key = await find_key(exchange, group.options.hash_by, self._settings.bounds.held_body_bytes)
            if isinstance(key, Failure):
                return key
            self._key = key
        index, fresh = group.first(self._key), False
        if index is None:
            return group.nobody()
        if index:
            exchange.routed(eof_leaves=choices[index].upstream.on_client_eof == "abort")
        while True:
            if exchange.left or exchange.failure is not None:  # while its route was looked for
                await checkpoint_if_cancelled()
            if not fresh:
                self._tried += (index,)
            upstream = choices[index].upstream
            exchange.rewrite(choices[index].model)
            failure = await self._attempt(upstream, index, fresh=fresh)
            if failure is None or self._delivery.bound or exchange.failure is not None:
                return failure
            step = next_step(
                failure,
                replayable=exchange.replayable,
                fresh_tried=fresh,
                others=True,
                retry_sent=upstream.retry_sent,
            )
            if step is Step.NEXT and self._next is None:  # otherwise it was decided when the answer was seen
                self._next = self._another(free=failure.side is Side.GATEWAY)
            if step is Step.STOP or (step is Step.NEXT and self._next is None):
                return await self._give_up(failure)
            result = failure.kind.value if self._status is None else str(self._status)
            exchange.tried += (Tried(upstream.name, result),)
            fresh = step is Step.FRESH
            if self._next is not None:
                index, self._next = self._next, None
                await self._pause(choices[index].upstream)

    # -- which upstream ------------------------------------------------------------------------------------------------

    def _another(self, *, free: bool) -> int | None:
        """Which upstream to ask next, if one may be. `free`: nothing was asked of the last one."""
        if len(self._tried) >= self._most:
            return None
        index, body = self._group.another(self._tried, self._key, free=free), self._exchange.body
        if index is not None and body is not None:
            body.keep_back()  # while the end of this attempt is read
        return index

    async def _pause(self, upstream: Upstream) -> None:
        """Before `upstream` is asked in place of another one. A client that leaves ends it, as any phase."""
        exchange = self._exchange
        exchange.phase = Phase.ROUTE
        exchange.routed(eof_leaves=upstream.on_client_eof == "abort")
        seconds = pause(len(self._tried), self._settings.retries, random.random())
        if seconds > 0:
            await in_task()
            await trio.sleep(seconds)

    async def _give_up(self, failure: Failure) -> Failure | None:
        """Nobody else is asked: an answer that was kept is better than our word about the last failure."""
        kept = self._kept
        if kept is None or failure.retry not in (Retry.UNSENT, Retry.FRESH):
            return failure  # a generation may be under way: an invitation to come again would be wrong
        exchange = self._exchange
        exchange.tried += (Tried(exchange.upstream or "", failure.kind.value),)
        exchange.upstream = kept.upstream
        if await self._delivery.no_longer_early():
            self._delivery.refusal = kept.early()
            return failure
        self._settled()
        self._begin_reading()
        self._delivery.begin(kept.head, close=self._close or not exchange.received)
        await self._delivery.straight(kept, settle=_nothing)
        return None

    # -- one attempt ---------------------------------------------------------------------------------------------------

    async def _attempt(self, upstream: Upstream, index: int, *, fresh: bool) -> Failure | None:
        """One try at one upstream, which is told in its standing. None: an answer was delivered, or begun."""
        exchange, failure = self._exchange, None
        exchange.attempts += 1
        exchange.upstream = upstream.name
        exchange.phase = Phase.LEASE
        standing = self._standing = self._group.standings[index]
        trial = self._trial = standing.begin()
        self._status = None
        if self._group.timed:
            exchange.first_seen = timing(exchange, standing, self._group.options)
        try:
            made = self._requests.make(exchange, upstream, self._generation, trusted=self._trusted)
            if isinstance(made, Failure):
                failure = made
                return failure
            self._request = made
            del made  # a stream goes on for long
            lease = await self._generation.pools[upstream.name].lease(fresh=fresh, dialling=self._dialling)
            if isinstance(lease, Failure):
                failure = lease
                return failure
            straight = lease.connection.straight if self._goes_straight(upstream) else None
            if straight is None or exchange.left or exchange.failure is not None:
                await lease.unless_cancelled()  # in the pass that granted it
            if exchange.body is not None and len(self._tried) >= self._most and not lease.reused:
                exchange.body.last_attempt(PEEK_BYTES)  # nothing that can happen to it would be tried again
            exchange.lease = lease
            exchange.phase = Phase.FIRST_BYTE if exchange.received else Phase.UPLOAD
            if straight is not None:
                failure = await self._straight(lease, straight, upstream)
            else:
                body = exchange.body.source() if exchange.body is not None else None
                failure = await self._pair(lease, body, upstream)
            return failure
        finally:
            self._over(failure, upstream, trial=trial)

    def _over(self, failure: Failure | None, upstream: Upstream, *, trial: bool) -> None:
        """The attempt is over: tell the upstream's standing."""
        exchange, standing = self._exchange, self._standing
        scanner = exchange.scanner
        if self._status == 200 and failure is exchange.failure and (scanner is None or not scanner.error):
            verdict = Verdict.GOOD if failure is None else Verdict.NEITHER
        else:
            verdict = verdict_of(exchange, failure, self._status, upstream)
        before, now = standing.ejections, exchange.clock()
        standing.end(verdict, now, trial=trial)
        if standing.ejections != before:
            wait = standing.avoided(now) - now
            why = exchange.failure or failure or f"it answered {self._status}"
            _log.warning("upstream %s is ejected for %g s: %s", upstream.name, wait, why)
        if exchange.first_seen is not None:
            if verdict is Verdict.BAD and (scanner is None or exchange.first_piece is None):
                standing.missed(now, self._group.options.memory)
            exchange.first_seen = None

    async def _pair(self, lease: Lease, body: BodySource | None, upstream: Upstream) -> Failure | None:
        request, self._request = self._request, None
        assert request is not None
        port = Port(self._settings.bounds, self._delivery.meter)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._upstream_task, lease, request.head, body, port)
                failure = await self._answer(port, upstream)
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
            and self._delivery.early is None
        )

    async def _straight(self, lease: Lease, connection: StraightConnection, upstream: Upstream) -> Failure | None:
        exchange, request = self._exchange, self._request
        assert request is not None
        body = exchange.body.source() if exchange.body is not None else None
        try:
            answer = await connection.ask(
                request.block, body, self._delivery.informational, method=request.method, chunked=request.chunked
            )
            if isinstance(answer, Failure):
                return answer
            if answer is None:
                await in_task()
                return await self._pair(lease, body, upstream)
            another = self._worth_another(answer, upstream)
            if another is not None:
                self._kept = await keep(connection, answer, upstream.name) or self._kept
                self._give_back()
                return another
            body_of: AnswerBody = connection
            if self._group.options.hold_first_event and self._holds(answer):
                held = await hold_event(connection, self._settings.bounds.handover_bytes)
                another = self._not_relayed(held.error, held.failure)
                if another is not None:
                    return another
                body_of = held
            self._settled()
            self._delivery.begin(answer, close=self._close)
            self._request = None
            del answer, body, request  # a stream goes on for long
            await self._delivery.straight(body_of, settle=self._give_back)
            return None
        finally:
            lease.abort()  # of no effect once it was settled
            if exchange.lease is lease:
                exchange.lease = None

    def _give_back(self) -> None:
        """The upstream of a straight attempt has nothing more to say."""
        lease = self._exchange.lease
        assert lease is not None
        connection = lease.connection
        if connection.straight is not None and connection.straight.conclude() is None and connection.reusable:
            lease.release()
        else:
            lease.abort()
        self._exchange.lease = None

    def _dialling(self) -> None:
        self._exchange.phase = Phase.DIAL

    async def _upstream_task(self, lease: Lease, head: RequestHead, body: BodySource | None, port: Port) -> None:
        exchange = self._exchange
        try:
            if exchange.left or exchange.failure is not None:  # this task begins a pass later than its lease
                await trio.lowlevel.checkpoint_if_cancelled()
            failure = await lease.connection.run(head, body, port)
            if failure is None and lease.connection.reusable:
                lease.release()
            port.finish(failure)
        finally:
            lease.abort()  # of no effect after release()
            if exchange.lease is lease:
                exchange.lease = None

    async def _answer(self, port: Port, upstream: Upstream) -> Failure | None:
        exchange, delivery = self._exchange, self._delivery
        while True:
            head = await port.next_head()
            if isinstance(head, Failure):
                return head
            if head.status == 101 or not head.informational:
                break
            await delivery.informational(head)
        another = self._worth_another(head, upstream)
        if another is not None:
            self._kept = await keep_from_flow(port.flow, head, upstream.name) or self._kept
            return another
        if await delivery.no_longer_early() and not (head.status == 200 and response_facts(head).legible_stream):
            refused = await keep_from_flow(port.flow, head, upstream.name)
            delivery.refusal = None if refused is None else refused.early()
            return Failure(Side.UPSTREAM, Phase.FIRST_BYTE, Kind.NO_STREAM, f"It answered {head.status}.")
        flow: FlowReceiver | HeldFlow = port.flow
        if self._group.options.hold_first_event and self._holds(head):
            flow = held = await hold_event_of_flow(port.flow)
            another = self._not_relayed(held.error, held.cut)
            if another is not None:
                return another
        self._settled()
        if head.status == 101:
            await self._tunnel(head, port)
        else:
            self._begin_reading()
            # An upload that this answer overtook is not waited for: say so, or the client's next request meets a close.
            await delivery.final(head, close=self._close or not exchange.received)
            await delivery.body(port.body, flow, upstream.heartbeat)
        return None

    # -- what an answer says -------------------------------------------------------------------------------------------

    def _worth_another(self, head: ResponseHead, upstream: Upstream) -> Failure | None:
        """Why another upstream is asked instead of relaying this answer, if one is. `_next` is which."""
        status = self._status = head.status
        if self._trial and status < 500 and status != 429:
            self._standing.answered(trio.current_time())
        if status < 429:
            return None
        if status == 503 or (status == 429 and self._is_ours(upstream)):
            self._standing.set_aside(retry_after(head.headers, time.time()), trio.current_time())
        if not self._exchange.replayable or not retries_status(status, retry_sent=upstream.retry_sent):
            return None
        self._next = self._another(free=False)
        if self._next is None:
            return None
        return Failure(Side.UPSTREAM, Phase.FIRST_BYTE, Kind.REFUSED, f"It answered {status}.", Retry.UNSENT)

    def _is_ours(self, upstream: Upstream) -> bool:
        """A refusal is meant for all: the client's own key has not been shown."""
        head = self._exchange.head
        assert head is not None
        return upstream.api_key is not None or self._generation.router.keyed or key_in(head.headers) is None

    def _holds(self, head: ResponseHead) -> bool:
        """Its first event is looked at before it is relayed: the model says so, and somebody else could be asked."""
        return (
            head.status == 200
            and len(self._tried) < self._most
            and self._exchange.replayable
            and response_facts(head).legible_stream
        )

    def _not_relayed(self, error: bool, cut: object) -> Failure | None:
        """Why an answer whose first event was held is not relayed, if it is not."""
        if error and self._exchange.replayable:  # an upload that went on may have left what can be held
            self._next = self._another(free=False)
            if self._next is not None:
                detail = "Its first event is an error."
                return Failure(Side.UPSTREAM, Phase.FIRST_EVENT, Kind.IN_BAND, detail, Retry.UNSENT)
        if isinstance(cut, Failure) and cut.side is Side.UPSTREAM:
            return replace(cut, phase=Phase.FIRST_EVENT, retry=Retry.SENT)
        return None

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


def _nothing() -> None:
    pass
