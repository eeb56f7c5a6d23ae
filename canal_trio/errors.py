"""What can go wrong, as values.

A failure is data: *who* (side), *when* (phase), *what* (kind) and *may it be tried again* (retry). Peers misbehave all
day, so their trouble travels as a `Failure` in return values and records; exceptions are left for bugs, for misuse of
this library (`CanalError`) and for Trio's `Cancelled`. The mapping from a failure to an answer lives in one pure
function, `canal_trio.policy.exchange.answer_for`; nothing here knows HTTP status codes.

The first failure of an exchange wins and is noted before its scope is cancelled.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

__all__ = ["CanalError", "ConfigError", "Failure", "Kind", "Phase", "Retry", "Side"]


class CanalError(Exception):
    """The library was used wrongly, or an invariant broke: a bug in the caller or in us, never a peer's doing."""


class ConfigError(CanalError):
    """A setting is wrong. The text names the place (file:line, flag or variable), the fault and what was meant."""


class Side(enum.Enum):
    """Who is to blame."""

    CLIENT = "client"
    UPSTREAM = "upstream"
    GATEWAY = "gateway"


class Phase(enum.Enum):
    """How far the exchange had come. The order is the order of an exchange's life."""

    ACCEPT = "accept"
    TLS = "tls"
    HEAD = "head"  # the client's request head
    ROUTE = "route"  # authenticate, limit, choose the upstream
    UPLOAD = "upload"  # the client's request body, while nothing else is awaited
    LEASE = "lease"  # waiting for a pooled connection
    DIAL = "dial"  # resolving, connecting, upstream TLS
    SEND = "send"  # writing the request to the upstream
    FIRST_BYTE = "first_byte"  # waiting for the response head
    FIRST_EVENT = "first_event"  # head relayed, no body byte yet
    STREAM = "stream"  # relaying the response body
    DELIVER = "deliver"  # the upstream is done, the client still reads


class Kind(enum.Enum):
    """What happened."""

    MALFORMED = "malformed"  # breaks the grammar or the framing rules
    HEAD_TOO_LARGE = "head_too_large"
    TARGET_TOO_LONG = "target_too_long"
    BODY_TOO_LARGE = "body_too_large"
    BUFFERS_FULL = "buffers_full"  # the process-wide budget for held bodies is used up
    OVERLOADED = "overloaded"  # the gateway has as many exchanges, or holds as much, as it may
    UNSUPPORTED_CODING = "unsupported_coding"  # a transfer coding other than chunked
    UNSUPPORTED_VERSION = "unsupported_version"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    EXPECTATION = "expectation"  # an Expect other than 100-continue
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    LIMITED = "limited"
    QUOTA = "quota"  # the budget is spent
    UNCOUNTED = "uncounted"  # what counts the limits is away
    NOT_FOUND = "not_found"  # no such model or route
    UNAVAILABLE = "unavailable"  # no upstream usable, no lease in time, too many waiters
    DRAINING = "draining"
    TIMEOUT = "timeout"  # the deadline of the phase passed
    DNS = "dns"
    REFUSED = "refused"  # refused or unreachable
    TLS = "tls"
    RESET = "reset"  # the connection broke
    CUT = "cut"  # the peer closed before its message was complete
    STALLED = "stalled"  # bytes stopped moving
    GONE = "gone"  # the client left
    STALE = "stale"  # a reused connection died before any response byte
    UNBOOKED = "unbooked"  # the ledger cannot take note of it
    NO_STREAM = "no_stream"  # the upstream answered, but not with the stream that had been begun
    IN_BAND = "in_band"  # the upstream reported an error inside its event stream
    INTERNAL = "internal"  # our own bug


class Retry(enum.Enum):
    """May the attempt be made again, as far as the failure itself is concerned?"""

    NO = "no"
    FRESH = "fresh"  # once, on a fresh connection: nothing was answered on the reused one
    UNSENT = "unsent"  # yes: no byte of the request left this process
    SENT = "sent"  # only where the route allows a second generation (`retry_sent`)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an exchange or an attempt did not complete: side x phase x kind x retry, and a sentence for people.

    `detail` is one sentence without secrets; it may be shown to the client and written to the log. `retry_after` is in
    seconds, where it is known when trying again makes sense; without it the answer says what its kind says. `remark` is
    for the log only: what the client must not learn.
    """

    side: Side
    phase: Phase
    kind: Kind
    detail: str = ""
    retry: Retry = Retry.NO
    retry_after: float | None = None
    remark: str = ""

    def __str__(self) -> str:
        text = f"{self.side.value} {self.kind.value} ({self.phase.value})"
        said = [part for part in (self.detail, f"[{self.remark}]" if self.remark else "") if part]
        return f"{text}: {' '.join(said)}" if said else text
