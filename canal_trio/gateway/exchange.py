"""One exchange: who it is, how far it came, what it leaves behind.

The state that reader, driver and upstream task share. Invariants: the first failure wins and is noted before anything
is cancelled; when the client leaves, the upstream's socket is closed in the very step that noticed it; exactly one
record is made, at the end, from what is here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import trio

from canal_trio.errors import Failure, Kind, Phase, Side
from canal_trio.hooks import Bookkeeper, Outcome, Principal, Tried
from canal_trio.messages import Headers
from canal_trio.policy.exchange import outcome_of
from canal_trio.wire.facts import request_facts
from canal_trio.wire.headers import request_id
from canal_trio.wire.sse import EventScanner

if TYPE_CHECKING:
    from canal_trio.gateway.account import Account
    from canal_trio.gateway.body import HeldBody, WholeBody
    from canal_trio.gateway.drain import Draining
    from canal_trio.gateway.judged import Judged
    from canal_trio.hooks import Slot
    from canal_trio.messages import RequestHead
    from canal_trio.upstream.pool import Lease

__all__ = ["GENERATING", "Exchange", "ExchangeView"]

_NO_FLAGS: frozenset[str] = frozenset()
GENERATING = ("/completions", "/responses", "/embeddings")  # what names a model, although nobody had to read it


@dataclass(frozen=True, slots=True)
class ExchangeView:
    """An exchange in flight, for people: a row of `/streams`."""

    id: str
    client: str
    method: str
    path: str
    principal: str | None
    model: str | None
    upstream: str | None
    phase: str
    age: float
    bytes: int
    events: int
    deadline: float | None  # seconds until it is ended, by its own deadline or the drain's; None if neither runs


@final
class Exchange:
    """One request and its response. `head` is None when the request's head was refused."""

    __slots__ = (
        "_end",
        "account",
        "accounted",
        "answered",
        "asked_usage",
        "attempts",
        "body",
        "books",
        "cancel_latency",
        "certificate",
        "client",
        "clock",
        "drain",
        "draining",
        "entry",
        "eof",
        "eof_leaves",
        "facts",
        "failure",
        "fields",
        "finished",
        "finished_at",
        "first_piece",
        "first_seen",
        "flags",
        "handed_over",
        "head",
        "headed",
        "id",
        "judged",
        "last_piece",
        "lease",
        "left",
        "longest_gap",
        "model",
        "phase",
        "pieces",
        "placed",
        "principal",
        "queued",
        "received",
        "request_bytes",
        "response_bytes",
        "scanner",
        "scope",
        "slot",
        "started",
        "started_at",
        "status",
        "summon",
        "tried",
        "tunnel",
        "upgrade",
        "upgraded",
        "upstream",
        "upstream_model",
        "waits",
    )
    books: Bookkeeper  # where it was noted, as soon as it has an `entry`

    def __init__(
        self,
        head: RequestHead | None,
        *,
        client: str,
        started: float,
        certificate: str | None = None,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        self.head = head
        self.id = request_id(head.headers if head is not None else Headers()).decode("ascii")
        self.client = client
        self.certificate = certificate  # whom the client's names
        self.started = started
        self.started_at = time.time()
        self.clock = clock  # Trio's, perhaps by a shorter way
        self.headed = clock()  # the request's head was complete
        facts = self.facts = request_facts(head) if head is not None else None
        self.upgrade = facts.upgrade if facts is not None else None
        self.phase = Phase.ROUTE if head is not None else Phase.HEAD
        self.scope: trio.CancelScope | None = None  # what its driver runs it in
        self.summon: Callable[[], None] | None = None  # its driver, while it runs ahead of it
        self.finished = False  # it is over
        self._end: trio.Event | None = None
        self.finished_at = 0.0
        self.failure: Failure | None = None
        self.answered = False  # the kernel took the answer's last byte
        self.left = False  # the client went away
        self.drain: Draining | None = None  # what to do then, where its upstream is not cancelled
        self.draining = False  # that is being done
        self.eof = False  # the client's side of the connection was shut down
        self.eof_leaves: bool | None = None  # is that leaving? None until the route is known
        self.received = head is None  # the request was read to its end
        self.body: HeldBody | WholeBody | None = None
        self.lease: Lease | None = None
        self.placed: float | None = None  # since when it has one of the gateway's places
        self.upgraded: trio.Event | None = trio.Event() if self.upgrade is not None else None
        self.tunnel = False
        # what it uses, where accounting is on
        self.accounted = False
        self.entry: int | None = None  # its number in `books`
        self.asked_usage = False  # the gateway asked for the usage chunk, not the client
        self.account: Account | None = None
        # what was decided
        self.principal: Principal | None = None
        self.model: str | None = None
        self.judged: Judged | None = None  # what its body says, where that was read
        self.upstream: str | None = None
        self.upstream_model: str | None = None  # where that is called otherwise than the client does
        self.attempts = 0
        self.tried: tuple[Tried, ...] = ()
        self.slot: Slot | None = None  # what it was admitted with
        self.fields = b""  # lines for the answer's head, whoever gives it
        # what was delivered
        self.status: int | None = None
        self.scanner: EventScanner | None = None
        self.request_bytes = 0
        self.response_bytes = 0
        self.pieces = 0
        self.first_piece: float | None = None
        self.first_seen: Callable[[float], None] | None = None  # told of it, where anybody wants to know
        self.last_piece = 0.0
        self.longest_gap = 0.0
        self.cancel_latency: float | None = None
        self.handed_over = 0  # pieces that went straight through
        self.queued = 0  # pieces that took the channel
        self.waits = 0  # times they had to wait for room in it
        self.flags = _NO_FLAGS  # rarely any, so no set of its own for each stream

    @property
    def path(self) -> str:
        """The request's, without the query: that may hold secrets."""
        return self.facts.path if self.facts is not None else ""

    @property
    def terminal(self) -> bool:
        """The response's last event was delivered: what happens now cannot harm it."""
        return self.scanner is not None and self.scanner.terminal

    @property
    def replayable(self) -> bool:
        """The whole request is here and held, as far as it has come: another attempt can have it."""
        return self.body is None or self.body.replayable

    def end(self) -> trio.Event:
        """Set once it is finished, for who has to wait for that: few have. Not a checkpoint."""
        if self._end is None:
            self._end = trio.Event()
            if self.finished:
                self._end.set()
        return self._end

    # -- trouble -------------------------------------------------------------------------------------------------------

    def note(self, failure: Failure) -> None:
        """Note why; the first one wins."""
        if self.failure is None and not self.finished:
            self.failure = failure

    def fail(self, failure: Failure) -> None:
        """Note why, close the upstream's socket, and unwind: in this order, in this step. Not a checkpoint."""
        if self.finished:
            return
        self.note(failure)
        if self.lease is not None:
            self.lease.abort()
        self._unwind(str(failure))

    def _unwind(self, reason: str) -> None:
        self.in_scope().cancel(reason=reason)
        if self.summon is not None:
            self.summon()

    def in_scope(self) -> trio.CancelScope:
        """The scope in which it runs, as soon as it has a task. Not a checkpoint."""
        if self.scope is None:
            self.scope = trio.CancelScope()
        return self.scope

    def leave(self, detail: str) -> None:
        """The client is gone: close the upstream and unwind. After the last event that is how SDKs say good-bye."""
        if self.finished or self.left:
            return
        self.left = True
        if self.answered:
            return
        if self.drain is not None and self.failure is None and not self.terminal and self.drain.begin(detail):
            return
        seen = time.perf_counter()
        had_lease = self.lease is not None
        failure = Failure(Side.CLIENT, self.phase, Kind.GONE, detail)
        if self.terminal and self.failure is None:
            self.flags |= {"left_after_terminal"}
            if self.lease is not None:
                self.lease.abort()
            self._unwind("the client left after the last event")
        else:
            self.fail(failure)
        if had_lease:
            self.cancel_latency = time.perf_counter() - seen

    def hangup_seen(self) -> None:
        """The client's FIN or reset was seen, perhaps before the bytes in front of it were read."""
        self.eof = True
        if self.eof_leaves:
            self.leave("The client closed the connection.")

    def client_eof(self) -> None:
        """The client's EOF was read. In the middle of a request that is leaving, else it is the route's choice."""
        if not self.received:
            self.leave("The client closed the connection before its request was complete.")
        else:
            self.hangup_seen()

    def uploaded(self) -> None:
        """The request was read to its end."""
        self.received = True
        if self.phase is Phase.UPLOAD and self.lease is not None:
            self.phase = Phase.FIRST_BYTE

    def rewrite(self, model: str | None) -> None:
        """The next attempt's upstream calls the model `model`; None: as the client does."""
        self.upstream_model = model
        if self.judged is not None and self.body is not None:
            self.body.edits = self.judged.edits(model, usage=self.asked_usage)

    def routed(self, *, eof_leaves: bool) -> None:
        """The route is known, and with it what a client's EOF means."""
        self.eof_leaves = eof_leaves
        if self.eof:
            self.hangup_seen()

    def lasts(self) -> None:
        """Its answer goes on for long, and there are thousands: keep what its end asks for, and not what led here."""
        if self.head is not None:
            self.head = self.head.bare()
        self.judged = None
        if self.body is not None and self.body.ending is not None:  # which no attempt will ask for
            self.body.close()
            self.body = None

    def tunnels(self) -> None:
        """Both sides agreed on another protocol: from here on each direction has an end of its own."""
        self.tunnel = True
        self.eof_leaves = False

    # -- what was delivered --------------------------------------------------------------------------------------------

    def has_answer(self, _pieces: int = 0) -> None:
        """The client has all there is to its answer: from now on it may leave.

        Where a write tells only afterwards what was taken (the plain path), it may have left before we knew.
        """
        if self.draining:
            return  # nobody has it
        self.answered = True
        if self.left:
            self.flags -= {"left_after_terminal"}
            if self.failure is not None and self.failure.kind is Kind.GONE:
                self.failure, self.phase, self.cancel_latency = None, Phase.DELIVER, None

    def view(self, now: float, until: float = math.inf) -> ExchangeView:
        """How it looks from outside, just now; `until` is when the gateway ends it, if it does."""
        own = self.scope.deadline if self.scope is not None else math.inf
        left = min(own, until, self.drain.until if self.drain is not None else math.inf) - now
        return ExchangeView(
            id=self.id,
            client=self.client,
            method=self.facts.method if self.facts is not None else "",
            path=self.path,
            principal=self.principal.name if self.principal else None,
            model=self.model,
            upstream=self.upstream,
            phase=self.phase.value,
            age=round(now - self.started, 3),
            bytes=self.response_bytes,
            events=self.scanner.events if self.scanner else 0,
            deadline=round(left, 3) if left < 1e9 else None,
        )

    def outcome(self) -> Outcome:
        """How it ended, by its first failure and by what the upstream said in band."""
        outcome = outcome_of(self.failure)
        said_so = self.scanner is not None and self.scanner.error
        if said_so and outcome in (Outcome.COMPLETED, Outcome.UPSTREAM_FAILED):
            return Outcome.UPSTREAM_ERROR  # it came first
        return outcome

    def finish(self) -> None:
        """It is over: nothing of it changes any more."""
        self.finished_at = self.clock()
        self.finished = True
        if self._end is not None:
            self._end.set()
