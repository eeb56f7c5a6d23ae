"""The pipeline of one request: authenticate, hold what routing needs, route, attempt, deliver.

Each step hands on data or stops with a failure. An attempt runs as a pair: the upstream task puts heads and pieces into
a `Port`, the driver delivers them. Another attempt is made only before the first byte of an answer was relayed, and
only if policy says that it may (design, section 6).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import msgspec
import trio

from canal_trio.errors import Failure, Kind, Phase, Retry, Side
from canal_trio.gateway.deliver import Delivery
from canal_trio.gateway.exchange import Exchange
from canal_trio.gateway.places import Places
from canal_trio.gateway.port import Port
from canal_trio.gateway.requests import UpstreamRequest, UpstreamRequests
from canal_trio.gateway.respond import continue_head
from canal_trio.gateway.writer import ClientWriter
from canal_trio.messages import RequestHead, ResponseHead
from canal_trio.policy.exchange import Step, next_step, retries_status
from canal_trio.policy.routing import Plan
from canal_trio.relay.flow import Ended
from canal_trio.settings import Settings, Upstream
from canal_trio.upstream.interface import BodySource, StraightConnection
from canal_trio.upstream.pool import Lease
from canal_trio.wire.bodies import content_length
from canal_trio.wire.headers import wants_continue
from canal_trio.wire.targets import origin_form, plain_path

if TYPE_CHECKING:
    from canal_trio.gateway.core import Generation

__all__ = ["Pipeline"]

_MODEL_CHARACTERS = 256  # of a name that no route knows, in the log
_PEEK_BYTES = 262_144  # a body up to this is looked into for the log's `model`


class _Named(msgspec.Struct):
    """The one field of a request body that is read."""

    model: str | None = None


@final
class Pipeline:
    """Runs one exchange inside its scope. What it leaves in the exchange decides the ending."""

    def __init__(
        self,
        exchange: Exchange,
        generation: Generation,
        places: Places,
        writer: ClientWriter,
        delivery: Delivery,
        requests: UpstreamRequests,
        *,
        trusted: bool,
    ) -> None:
        assert exchange.head is not None
        self._exchange = exchange
        self._head: RequestHead = exchange.head
        self._generation = generation
        self._settings: Settings = generation.settings
        self._places = places
        self._writer = writer
        self._delivery = delivery
        self._requests = requests
        self._trusted = trusted  # the peer is a trusted proxy
        self.close = False  # the request asks for the connection to be closed

    async def run(self) -> Failure | None:
        """The failure to answer with, or None: an answer was delivered or broke off."""
        exchange = self._exchange
        refusal = self._authenticate() or await self._enter()
        if refusal is not None:
            return refusal
        refusal = await self._continue()
        if refusal is not None:
            return refusal
        plan = await self._route()
        if isinstance(plan, Failure):
            return plan
        if not plan.choices:
            return Failure(Side.GATEWAY, Phase.ROUTE, Kind.UNAVAILABLE, "No upstream is configured.")
        exchange.routed(eof_leaves=plan.choices[0].upstream.on_client_eof == "abort")
        return await self._attempts(plan)

    def _authenticate(self) -> Failure | None:
        verdict = self._generation.router.authenticate(self._head.headers, self._exchange.started_at)
        if isinstance(verdict, Failure):
            return verdict
        self._exchange.principal = verdict
        return None

    async def _enter(self) -> Failure | None:
        """Take one of the gateway's places, before the body costs anything; the failure if there is too much to do.

        A checkpoint only if it waits.
        """
        exchange, places = self._exchange, self._places
        if places.take_nowait():
            exchange.placed = exchange.headed
        else:
            if all(upstream.on_client_eof == "abort" for upstream in self._settings.upstreams):
                exchange.routed(eof_leaves=True)  # wherever it may go: so it can be seen to leave the line
            refusal = await places.take()
            if refusal is not None:
                return refusal
            exchange.placed = trio.current_time()
        return self._generation.crowded()

    async def _continue(self) -> Failure | None:
        """Invite the body of a client that waits for it (RFC 9110 10.1.1)."""
        wanted = wants_continue(self._head)
        if isinstance(wanted, Failure):
            return wanted
        if wanted and not self._exchange.received and not self._exchange.request_bytes:
            await self._writer.write([continue_head()])
        return None

    # -- routing -------------------------------------------------------------------------------------------------------

    async def _route(self) -> Plan | Failure:
        exchange, router, body = self._exchange, self._generation.router, self._exchange.body
        if self._settings.routes:
            plan = self._path_route()
            if plan is not None:
                return plan
        is_json = self._is_json()
        tunnel = exchange.upgrade is not None  # its bytes are no body: there is nothing to wait for
        if body is not None and not tunnel and router.needs_model(exchange.principal, named=is_json):
            exchange.phase = Phase.UPLOAD
            failure = self._too_large() or await body.hold_all()
            if failure is not None:
                return failure
            model = self._model(self._settings.bounds.held_body_bytes)
            if isinstance(model, Failure):
                if is_json:
                    return model
                model = None
            exchange.model = model
        exchange.phase = Phase.ROUTE
        return router.route(exchange.model, exchange.principal, has_body=body is not None)

    def _path_route(self) -> Plan | Failure | None:
        origin = origin_form(self._head)
        path = None if isinstance(origin, Failure) else plain_path(origin[0])
        return self._generation.router.by_path(path, self._exchange.principal)

    def _is_json(self) -> bool:
        media = (self._head.headers.get(b"content-type") or b"").partition(b";")[0].strip().lower()
        return media == b"application/json" or media.endswith(b"+json")

    def _too_large(self) -> Failure | None:
        limit = self._settings.bounds.held_body_bytes
        length = content_length(self._head.headers)
        if isinstance(length, int) and length > limit:
            return Failure(Side.CLIENT, Phase.UPLOAD, Kind.BODY_TOO_LARGE, f"The limit is {limit} bytes.")
        return None

    def _model(self, most: int) -> str | Failure | None:
        body = self._exchange.body
        content = body.beginning(most) if body is not None else None
        if not content:
            return None
        try:
            return msgspec.json.decode(content, type=_Named).model
        except msgspec.DecodeError as exc:
            return Failure(Side.CLIENT, Phase.ROUTE, Kind.MALFORMED, f"The body is not the JSON expected: {exc}.")

    # -- attempts ------------------------------------------------------------------------------------------------------

    async def _attempts(self, plan: Plan) -> Failure | None:
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
            exchange.body.last_attempt(_PEEK_BYTES)  # nothing that can happen to it would be tried again
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
                self._settle()
                await self._delivery.straight(
                    connection, answer, close=self.close, settle=settle, lasts=self._requests.forget
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
        self._settle()
        if head.status == 101:
            await self._tunnel(head, port)
        else:
            self._begin_reading()
            # An upload that this answer overtook is not waited for: say so, or the client's next request meets a close.
            await delivery.final(head, close=self.close or not exchange.received)
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

    def _settle(self) -> None:
        """The answer is here: no attempt will follow, so nothing of the request is held any longer."""
        exchange = self._exchange
        if exchange.body is None:
            return
        if exchange.model is None and self._is_json():
            model = self._model(_PEEK_BYTES)
            exchange.model = model[:_MODEL_CHARACTERS] if isinstance(model, str) else None
        exchange.body.stop_holding()

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
