"""What the pipeline offers to the outside: one frozen record per exchange, and the protocols that receive it.

A hook gets frozen records and returns a value; it never gets a stream, a codec, a flow or a nursery. Hooks are
synchronous, must not block, and cost once per exchange, never per piece.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

from canal_trio.errors import Failure, Phase
from canal_trio.messages import RequestHead
from canal_trio.settings import Drain, Settings

__all__ = [
    "Admission",
    "Admissions",
    "Admitted",
    "Asked",
    "Authenticator",
    "Bookkeeper",
    "ExchangeRecord",
    "Outcome",
    "Principal",
    "Recorder",
    "Refused",
    "Slot",
    "Tap",
    "Tried",
    "Usage",
    "UsageSource",
    "Wanted",
]


class Outcome(enum.Enum):
    """How an exchange ended (design, section 6)."""

    COMPLETED = "completed"
    REJECTED = "rejected"  # the gateway answered itself: the client's fault or our own limit
    CLIENT_GONE = "client_gone"
    CLIENT_STALLED = "client_stalled"
    UPSTREAM_FAILED = "upstream_failed"
    UPSTREAM_ERROR = "upstream_error"  # relayed an error that the upstream reported in band
    DRAINED = "drained"
    INTERNAL_ERROR = "internal_error"


@dataclass(frozen=True, slots=True)
class Principal:
    """Whose key it was, and the name of that key. `models` are names or patterns; empty allows nothing."""

    name: str
    models: tuple[str, ...] = ("*",)
    key: str = ""
    on_disconnect: Drain | None = None  # what its key says of clients that leave


class UsageSource(enum.Enum):
    """Where the token counts of a record come from."""

    UPSTREAM = "upstream"  # it said so
    DRAINED = "drained"  # it said so after the client had left: the route drains
    ESTIMATED = "estimated"  # the stream was cut, or said nothing: from bytes and events
    NONE = "none"  # nothing was generated, or accounting is off


class Usage(NamedTuple):
    """Tokens of one generation. `cached` are among the prompt's, `reasoning` among the completion's."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    reasoning: int = 0


@dataclass(frozen=True, slots=True)
class Tried:
    """An attempt that another one followed."""

    upstream: str
    result: str  # the status it answered, or the kind of its failure


class ExchangeRecord(NamedTuple):
    """What an exchange leaves behind: exactly one per request whose first byte was read.

    A named tuple, because there is one for each exchange: making it costs a fifth of what a frozen dataclass does.

    Times are seconds on Trio's clock except `started_at` (Unix time). `first_byte` counts from the end of the request
    head to the first response body byte accepted by the client's kernel. `cancel_latency` is from the client's FIN or
    RST being seen to the upstream's socket being closed. Gaps are between pieces delivered.
    """

    request_id: str
    started_at: float
    client: str  # address of the peer, or of the client behind a trusted proxy
    method: str
    path: str  # without the query: a query may hold secrets
    outcome: Outcome
    phase: Phase
    status: int | None = None  # what the client was told, None if nothing
    failure: Failure | None = None
    certificate: str | None = None  # the verified subject of the client's own, such as CN=alice,O=Example
    principal: str | None = None
    key: str | None = None  # the name of the principal's key
    model: str | None = None  # as the client calls it
    upstream: str | None = None
    upstream_model: str | None = None  # as the last upstream that was asked calls it
    attempts: int = 0
    tried: tuple[Tried, ...] = ()  # the attempts before the last, in their order; `upstream` is the last one's
    streamed: bool = False  # the response was an event stream
    request_bytes: int = 0  # body bytes read from the client
    response_bytes: int = 0  # body bytes accepted by the client's kernel; where a stream cannot tell, at least
    events: int = 0  # events delivered
    first_byte: float | None = None
    duration: float = 0.0
    longest_gap: float = 0.0
    mean_gap: float = 0.0
    cancel_latency: float | None = None
    handed_over: int = 0  # pieces that went straight through
    queued: int = 0  # pieces that took the channel
    waits: int = 0  # times the reading of the upstream stopped until the client had taken more
    flags: tuple[str, ...] = ()  # no_terminal_event, cut_after_terminal, late_body_end, ...
    usage: Usage | None = None  # None: unknown, see `usage_source`
    usage_source: UsageSource = UsageSource.NONE
    cost: int | None = None  # of that usage, in billionths of the prices' currency; None: unknown, or without a price


class Admitted(NamedTuple):
    """What is known of an exchange when it is about to go upstream. `upstream` is the first that is tried."""

    request_id: str  # 1 to 128 visible ASCII characters
    started_at: float  # Unix time
    path: str
    principal: str | None
    key: str | None  # the name of the principal's key
    model: str | None
    upstream: str | None


class Bookkeeper(Protocol):
    """Keeps a row for each admitted exchange, whatever becomes of it. Synchronous, and never blocks for long."""

    def admitted(self, exchanges: Sequence[Admitted]) -> Sequence[int | Failure]:
        """Note, before anything goes upstream, that there are these exchanges: of each the number, or why it may not
        be."""

    def ended(self, endings: Sequence[tuple[int, ExchangeRecord]]) -> None:
        """The exchanges of these numbers are over. Each number is told once."""


class Recorder(Protocol):
    """Receives each record once, after its exchange ended."""

    def finished(self, record: ExchangeRecord) -> None:
        """Note it. Must not block; an exception is logged and goes no further."""


class Authenticator(Protocol):
    """Decides whose request it is, before anything upstream is touched."""

    def check(self, head: RequestHead) -> Principal | Failure:
        """The principal, or the failure to answer with (UNAUTHENTICATED or FORBIDDEN)."""


class Tap(Protocol):
    """Sees delivered bytes, cannot change them."""

    def piece(self, data: bytes) -> None:
        """`data` was accepted by the client's kernel."""


class Wanted(NamedTuple):
    """How much a request wants to have generated, as it says it: any number, or None where it says nothing."""

    tokens: float | None = None  # at most, for each answer
    answers: float | None = None


class Asked(NamedTuple):
    """What is known of an exchange when it asks to be admitted: authenticated and routed, nothing upstream touched."""

    path: str  # without the query
    principal: str | None
    model: str | None  # as the client named it
    upstream: str | None  # the first that would be tried
    upstream_model: str | None  # as that one names it
    body: bytes | None  # if it is here, and no form
    wanted: Wanted | None = None  # None: its body says nothing of it, or could not be read


class Slot(Protocol):
    """An admitted exchange's place. It lasts exactly as long as the exchange."""

    @property
    def fields(self) -> bytes:
        """Header fields for the answer, whoever gives it: lines with lower-case names, each ended by CR LF."""

    def release(self, record: ExchangeRecord) -> None:
        """The exchange has ended: settle by what it used. Called exactly once, not a checkpoint."""


@dataclass(frozen=True, slots=True)
class Refused:
    """Not admitted: the failure to answer with, and header fields for that answer, as a `Slot` has them."""

    failure: Failure
    fields: bytes = b""


class Admission(Protocol):
    """Decides whether an exchange may begin, before anything upstream is touched."""

    @property
    def wants_body(self) -> bool:
        """It judges by the model or the size of what is asked: a JSON body is held before it is asked."""

    @property
    def wants_usage(self) -> bool:
        """It settles by what was used: accounting is on for what it admits."""

    @property
    def admit_now(self) -> Callable[[Asked], Slot | Refused] | None:
        """`admit` where the answer is in this process: nothing is waited for, so there need not be a task yet. None
        where it may have to be asked for elsewhere."""

    async def admit(self, asked: Asked) -> Slot | Refused:
        """A slot, or why not. A checkpoint only where the answer is not in this process.

        Cancelling it leaves nothing behind: a slot that nobody has received any more is given back.
        """


Admissions: TypeAlias = Callable[[Settings, Callable[[], bool]], Admission | None]
"""Gives the hook of a configuration, None where that limits nothing. The other argument has those released that have
ended and are not yet (False: there are none), so that nobody is refused for their sake."""
