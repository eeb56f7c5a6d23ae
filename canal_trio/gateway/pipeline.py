"""The pipeline of one request: authenticate, hold what routing needs, route; then the attempts.

Each step hands on data or stops with a failure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import msgspec
import trio

from canal_trio.errors import Failure, Kind, Phase, Side
from canal_trio.gateway.attempts import PEEK_BYTES, Attempts
from canal_trio.gateway.body import WholeBody, too_large
from canal_trio.gateway.deliver import Delivery
from canal_trio.gateway.drain import Draining
from canal_trio.gateway.early import EarlyHead
from canal_trio.gateway.exchange import GENERATING, Exchange
from canal_trio.gateway.judged import AT_ONCE_BYTES, judge, judge_in_thread
from canal_trio.gateway.places import Places
from canal_trio.gateway.requests import UpstreamRequests
from canal_trio.gateway.respond import continue_head
from canal_trio.gateway.writer import ClientWriter
from canal_trio.hooks import Admission, Asked, Refused
from canal_trio.messages import Headers, RequestHead, ResponseHead
from canal_trio.policy.routing import Choice, Plan
from canal_trio.relay.course import in_task
from canal_trio.settings import Settings
from canal_trio.wire.form_fields import is_form
from canal_trio.wire.model_lists import model_list
from canal_trio.wire.targets import origin_form, plain_path, wanted_model

if TYPE_CHECKING:
    from canal_trio.gateway.body import HeldBody
    from canal_trio.gateway.core import Generation

__all__ = ["Pipeline"]

_MODELS = ("/v1/models", "/models")
_SAFE = (b"GET", b"HEAD", b"OPTIONS")  # what asks for no work and changes nothing
_MODEL_CHARACTERS = 256  # of a name that no route knows, in the log


class _Named(msgspec.Struct):
    """The one field of a body that is looked at when nothing depends on it."""

    model: str | None = None


_named = msgspec.json.Decoder(_Named).decode


@final
class Pipeline:
    """Runs one exchange inside its scope. What it leaves in the exchange decides the ending."""

    __slots__ = (
        "_delivery", "_exchange", "_facts", "_generation", "_places", "_requests", "_settings", "_trusted", "_writer",
        "close"
    )  # fmt: skip

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
        assert exchange.facts is not None
        self._exchange = exchange
        self._facts = exchange.facts
        self._generation = generation
        self._settings: Settings = generation.settings
        self._places = places
        self._writer = writer
        self._delivery = delivery
        self._requests = requests
        self._trusted = trusted  # the peer is a trusted proxy
        self.close = False  # the request asks for the connection to be closed

    @property
    def _head(self) -> RequestHead:
        head = self._exchange.head
        assert head is not None
        return head

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
        if isinstance(plan, Failure) or plan is None:
            return plan
        if not plan.choices:
            return Failure(Side.GATEWAY, Phase.ROUTE, Kind.UNAVAILABLE, "No upstream is configured.")
        admission = self._generation.admission
        if self._generation.accounts:
            self._account()
        if admission is not None:
            refusal = await self._admit(admission, plan.choices[0])
            if refusal is not None:
                return refusal
        if self._generation.booking is not None:
            self._generation.booking.note(exchange, plan.choices[0].upstream.name)
        exchange.drain = self._drain(plan)
        exchange.routed(eof_leaves=plan.choices[0].upstream.on_client_eof == "abort")
        attempts = Attempts(
            exchange,
            self._generation,
            self._writer,
            self._delivery,
            self._requests,
            trusted=self._trusted,
            close=self.close,
            settled=self._settle,
        )
        early = self._delivery.early = self._early(plan)
        try:
            if early is None:
                failure = await attempts.run(plan)
            else:
                await in_task()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(early.run)
                    failure = await attempts.run(plan)
                    await early.stop()
        except BaseException:  # the client has left, a deadline has passed: which model it was stands in the record
            self._settle()
            raise
        if failure is not None:
            self._settle()
        return failure

    def _early(self, plan: Plan) -> EarlyHead | None:
        """What writes a stream's head when its upstreams take too long, if the first of them has it so."""
        exchange, first = self._exchange, plan.choices[0].upstream
        if first.early_head_after is None:
            return None
        if exchange.judged is None or not exchange.judged.stream or self._head.version != b"1.1":
            return None
        self._delivery.close = self.close
        return EarlyHead(self._delivery, exchange.headed + first.early_head_after, first.heartbeat)

    def _account(self) -> None:
        """The answer's usage is read, and asked for where the client did not say whether it wants it."""
        exchange = self._exchange
        exchange.accounted = True
        judged = exchange.judged
        if judged is not None and judged.usage is not None:
            exchange.asked_usage = self._facts.path.endswith("/completions")  # the Responses API tells it unasked

    def _drain(self, plan: Plan) -> Draining | None:
        """What is done when the client leaves, if it is not to cancel the upstream: the key's word, or the entry's."""
        principal, entry = self._exchange.principal, plan.entry
        if principal is not None and principal.on_disconnect is not None:
            limits, owner = principal.on_disconnect, f"key {principal.key}"
        elif entry is not None and entry.on_disconnect is not None:
            limits, owner = entry.on_disconnect, f"{type(entry).__name__} {entry.name}"
        else:
            return None
        if not limits.at_once:
            return None
        return Draining(self._exchange, limits, owner, self._generation.drains, self._delivery)

    def _authenticate(self) -> Failure | None:
        router = self._generation.router
        if not router.keyed:
            return None
        verdict = self._requests.identity.principal(self._head, router, self._exchange.started_at)
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
            await in_task()
            refusal = await places.take()
            if refusal is not None:
                return refusal
            exchange.placed = trio.current_time()
        return self._generation.crowded()

    async def _continue(self) -> Failure | None:
        """Invite the body of a client that waits for it (RFC 9110 10.1.1)."""
        wanted = self._facts.wants_continue
        if isinstance(wanted, Failure):
            return wanted
        waits = wanted and not self._exchange.received and not self._exchange.request_bytes
        if waits and not await self._writer.write([continue_head()]):
            self._delivery.lost()  # nobody is left to ask anything for
            return self._exchange.failure
        return None

    # -- routing -------------------------------------------------------------------------------------------------------

    async def _route(self) -> Plan | Failure | None:
        """Where it goes, or why it goes nowhere; None: it was answered here."""
        exchange, router, body = self._exchange, self._generation.router, self._exchange.body
        plan = self._path_route() if self._settings.routes else None
        if isinstance(plan, Failure):
            return plan
        if plan is None and self._head.method in (b"GET", b"HEAD") and self._facts.path.startswith(_MODELS):
            wanted = wanted_model(self._facts.path)
            if wanted is not None and self._generation.listing.answers(exchange.principal):
                return await self._list(wanted)
        tunnel = exchange.upgrade is not None  # its bytes are no body: there is nothing to wait for
        if body is not None and not tunnel:
            named = self._facts.names_model
            needed = plan is None and router.needs_model(exchange.principal, named=named)
            if needed or (named and self._is_useful(of_route=plan is not None)):
                decides = needed or self._settings.ledger is not None  # by what it says it is routed, or billed
                failure = await self._read(body, strict=named and plan is None and decides)
                if failure is not None:
                    return failure
        exchange.phase = Phase.ROUTE
        if plan is not None:
            return plan
        asks = body is not None or self._head.method not in _SAFE
        return router.route(exchange.model, exchange.principal, has_body=asks, deployment=self._facts.deployment)

    async def _list(self, wanted: str) -> Failure | None:
        """Answer with the models there are for this principal, or with the one that is `wanted`."""
        exchange, listing = self._exchange, self._generation.listing
        exchange.routed(eof_leaves=True)
        await in_task()
        lists = await self._generation.catalogue.lists(listing.sources)
        if wanted:
            entry = listing.model(wanted, exchange.principal, lists)
            if isinstance(entry, Failure):
                return entry
            content = msgspec.json.encode(entry)
        else:
            content = model_list(listing.models(exchange.principal, lists))
        fields = [(b"Content-Type", b"application/json"), (b"Content-Length", b"%d" % len(content))]
        await self._delivery.own(ResponseHead(200, Headers(fields), b"OK"), content, close=self.close)
        return None

    def _is_useful(self, *, of_route: bool) -> bool:
        """What the body says serves somebody although it decides nothing. Behind a path route, whose bodies may be of
        any size, only one of a generation that is no larger than may be held."""
        if not self._settings.accounting and not self._generation.router.early_heads:
            return False
        if not of_route:
            return True
        length = self._facts.length
        short = isinstance(length, int) and length <= self._settings.bounds.held_body_bytes
        return short and self._facts.path.endswith(GENERATING)

    async def _read(self, body: HeldBody | WholeBody, *, strict: bool) -> Failure | None:
        """Hold the body and judge it. `strict`: it is of a kind that can be read, so it must be."""
        exchange, most = self._exchange, self._settings.bounds.held_body_bytes
        if not isinstance(body, WholeBody):  # which is here
            failure = await self._hold(body, most)
            if failure is not None:
                return failure
        content = body.beginning(most)
        if content is None:
            return too_large(most)
        if not content:
            return None
        if len(content) <= AT_ONCE_BYTES:
            judged = judge(self._head.headers, self._facts, content, strict)
        else:
            judged = await judge_in_thread(self._head.headers, self._facts, content, strict)
        if judged is None or isinstance(judged, Failure):
            return judged
        exchange.judged = judged
        exchange.model = judged.model
        return None

    async def _hold(self, body: HeldBody, most: int) -> Failure | None:
        """Until all of the body is here, but at most that many bytes."""
        self._exchange.phase = Phase.UPLOAD
        length = self._facts.length
        if isinstance(length, int) and length > most:
            return too_large(most)
        return await body.hold_all()

    def _path_route(self) -> Plan | Failure | None:
        origin = origin_form(self._head)
        path = None if isinstance(origin, Failure) else plain_path(origin[0])
        return self._generation.router.by_path(path, self._exchange.principal)

    async def _admit(self, admission: Admission, first: Choice) -> Failure | None:
        """Ask the limits, once for all attempts; `first` is tried first. Why not, if not."""
        exchange, content = self._exchange, None
        if admission.wants_body and exchange.body is not None and exchange.upgrade is None:
            form = not self._facts.json and is_form(self._head.headers.get(b"content-type") or b"")
            if exchange.judged is None:
                failure = await self._read_anyway(exchange.body, form=form)
                if failure is not None:
                    return failure
            if not form:
                content = exchange.body.beginning(self._settings.bounds.held_body_bytes)
        principal, judged = exchange.principal, exchange.judged
        fields = (
            self._facts.path,
            None if principal is None else principal.name,
            exchange.model,
            first.upstream.name,
            first.model,
            content,
            None if judged is None else judged.wanted,
        )
        asked: Asked = tuple.__new__(Asked, fields)  # as `Asked`, in half the time
        if admission.admit_now is not None:
            verdict = admission.admit_now(asked)
        else:
            await in_task()
            verdict = await admission.admit(asked)
        exchange.fields = verdict.fields
        if isinstance(verdict, Refused):
            return verdict.failure
        exchange.slot = verdict
        return None

    async def _read_anyway(self, body: HeldBody | WholeBody, *, form: bool) -> Failure | None:
        """Read a body that the route did not need: whatever it calls itself, for many upstreams do not look at that.
        Only files are not held for it."""
        named = self._facts.names_model
        if form and not named:
            return None
        failure = await self._read(body, strict=named)
        self._exchange.phase = Phase.ROUTE
        return failure

    def _settle(self) -> None:
        """The answer is here: no attempt will follow, so nothing of the request is held any longer."""
        exchange = self._exchange
        if exchange.body is None:
            return
        if exchange.model is None and exchange.judged is None and self._facts.json:
            content = exchange.body.beginning(PEEK_BYTES)
            try:
                model = _named(content).model if content else None
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                model = None
            exchange.model = model[:_MODEL_CHARACTERS] if model is not None else None
        exchange.body.stop_holding()
