"""What a failure means: which answer the client gets, who is blamed, and whether another attempt may be made.

This is design, sections 6 and 7, as tables and pure functions. Consulted a handful of times per exchange, never per
piece.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, replace

from canal_trio.errors import Failure, Kind, Phase, Retry, Side
from canal_trio.hooks import Outcome

__all__ = ["Answer", "Step", "answer_for", "blames_upstream", "next_step", "outcome_of", "retries_status"]


@dataclass(frozen=True, slots=True)
class Answer:
    """A local answer in OpenAI's shape (gateways.md D1). `retry_after` is in seconds."""

    status: int
    type: str
    code: str
    message: str
    param: str | None = None
    retry_after: int | None = None
    should_retry: bool | None = None  # None: the status speaks for itself


_INVALID = "invalid_request_error"

_CLIENT: dict[Kind, Answer] = {
    Kind.MALFORMED: Answer(400, _INVALID, "malformed_request", "The request is malformed."),
    Kind.CUT: Answer(400, _INVALID, "malformed_request", "The request ended before it was complete."),
    Kind.HEAD_TOO_LARGE: Answer(431, _INVALID, "headers_too_large", "The request's header fields are too large."),
    Kind.TARGET_TOO_LONG: Answer(414, _INVALID, "uri_too_long", "The request target is too long."),
    Kind.BODY_TOO_LARGE: Answer(413, _INVALID, "body_too_large", "The request body is too large."),
    Kind.UNSUPPORTED_CODING: Answer(501, _INVALID, "unsupported_transfer_coding", "This coding is not supported."),
    Kind.UNSUPPORTED_VERSION: Answer(505, _INVALID, "unsupported_http_version", "The HTTP version is not supported."),
    Kind.METHOD_NOT_ALLOWED: Answer(405, _INVALID, "method_not_allowed", "The method is not allowed."),
    Kind.EXPECTATION: Answer(417, _INVALID, "expectation_failed", "Only the expectation 100-continue is understood."),
    Kind.UNAUTHENTICATED: Answer(401, _INVALID, "invalid_api_key", "Incorrect API key provided.", should_retry=False),
    Kind.FORBIDDEN: Answer(403, "permission_error", "model_not_allowed", "This key may not use that.", "model"),
    Kind.LIMITED: Answer(429, "rate_limit_error", "rate_limit_exceeded", "Over the limit.", retry_after=1),
    Kind.QUOTA: Answer(
        429, "insufficient_quota", "insufficient_quota", "The budget is spent.", retry_after=3600, should_retry=False
    ),
    Kind.NOT_FOUND: Answer(404, _INVALID, "model_not_found", "There is no such model here.", "model"),
    Kind.TIMEOUT: Answer(408, _INVALID, "request_timeout", "The request took too long to arrive."),
}

_GATEWAY: dict[Kind, Answer] = {
    Kind.BUFFERS_FULL: Answer(503, "server_error", "overloaded", "The gateway holds too much already.", None, 1, True),
    Kind.OVERLOADED: Answer(503, "server_error", "gateway_overloaded", "The gateway is at its limit.", None, 1, True),
    Kind.UNAVAILABLE: Answer(503, "server_error", "upstream_unavailable", "No upstream is free.", None, 1, True),
    Kind.UNBOOKED: Answer(503, "server_error", "ledger_unavailable", "The exchange cannot be booked.", None, 5, True),
    Kind.UNCOUNTED: Answer(503, "server_error", "limits_unavailable", "Limits cannot be checked now.", None, 1, True),
    Kind.DRAINING: Answer(503, "server_error", "gateway_draining", "The gateway is shutting down.", None, 1, True),
    Kind.TIMEOUT: Answer(504, "server_error", "deadline_exceeded", "The exchange took too long.", None, None, False),
    Kind.INTERNAL: Answer(500, "server_error", "internal_error", "The gateway failed; its log says more."),
}

_UPSTREAM: dict[Kind, Answer] = {
    Kind.TIMEOUT: Answer(504, "upstream_error", "upstream_timeout", "The upstream did not answer in time."),
    Kind.DNS: Answer(502, "upstream_error", "upstream_unreachable", "The upstream's name cannot be resolved."),
    Kind.REFUSED: Answer(502, "upstream_error", "upstream_unreachable", "The upstream cannot be reached."),
    Kind.TLS: Answer(502, "upstream_error", "upstream_tls", "The TLS handshake with the upstream failed."),
    Kind.MALFORMED: Answer(502, "upstream_error", "upstream_malformed", "The upstream's answer is not valid HTTP."),
    Kind.STALLED: Answer(504, "upstream_error", "upstream_stalled", "The upstream stalled."),
    Kind.NO_STREAM: Answer(502, "upstream_error", "upstream_no_stream", "The upstream gave no stream."),
}
_UPSTREAM_BROKE = Answer(502, "upstream_error", "upstream_disconnected", "The upstream closed the connection.")

_AT_UPSTREAM = frozenset({Phase.SEND, Phase.FIRST_BYTE, Phase.FIRST_EVENT, Phase.STREAM, Phase.DELIVER})

_LOG = "The gateway's log says why."

# What is wrong is said whole by the detail, where there is one.
_SAID_BY_DETAIL = frozenset({Kind.LIMITED, Kind.QUOTA, Kind.UNAUTHENTICATED, Kind.FORBIDDEN, Kind.NOT_FOUND})

_TABLES = {Side.CLIENT: _CLIENT, Side.GATEWAY: _GATEWAY, Side.UPSTREAM: _UPSTREAM}


def answer_for(failure: Failure) -> Answer:
    """The local answer to `failure` (design, section 7). Total: what no table knows is a broken upstream or a bug."""
    fallback = _UPSTREAM_BROKE if failure.side is Side.UPSTREAM else _GATEWAY[Kind.INTERNAL]
    row = _TABLES[failure.side].get(failure.kind, fallback)
    should_retry = row.should_retry
    if failure.side is Side.UPSTREAM:
        # Honest: yes when no generation can have been started, no when a second one might be paid for.
        should_retry = failure.retry in (Retry.UNSENT, Retry.FRESH)
    elif failure.kind is Kind.DRAINING and failure.phase in _AT_UPSTREAM:
        should_retry = False  # as above
    message = row.message
    if failure.side is Side.UPSTREAM and failure.phase is Phase.DIAL:
        message = f"{row.message} {_LOG}"  # the detail names addresses, which are none of a stranger's business
    elif failure.detail:
        message = failure.detail if failure.kind in _SAID_BY_DETAIL else f"{row.message} {failure.detail}"
    retry_after = row.retry_after
    if failure.retry_after is not None:
        retry_after = max(1, math.ceil(failure.retry_after))  # whole seconds (RFC 9110 10.2.3), and never too early
    return replace(row, message=message, should_retry=should_retry, retry_after=retry_after)


def blames_upstream(failure: Failure) -> bool:
    """Does this count against the upstream's health? A reused connection that died idle does not."""
    return failure.side is Side.UPSTREAM and failure.kind is not Kind.STALE


def outcome_of(failure: Failure | None) -> Outcome:
    """The outcome that an exchange's first failure gives it; None: it completed."""
    if failure is None:
        return Outcome.COMPLETED
    if failure.side is Side.UPSTREAM:
        return Outcome.UPSTREAM_ERROR if failure.kind is Kind.IN_BAND else Outcome.UPSTREAM_FAILED
    if failure.kind is Kind.INTERNAL:
        return Outcome.INTERNAL_ERROR
    if failure.kind is Kind.DRAINING and failure.phase not in (Phase.HEAD, Phase.ROUTE):
        return Outcome.DRAINED
    return {Kind.GONE: Outcome.CLIENT_GONE, Kind.STALLED: Outcome.CLIENT_STALLED}.get(failure.kind, Outcome.REJECTED)


class Step(enum.Enum):
    """What to do after a failed attempt."""

    STOP = "stop"
    FRESH = "fresh"  # the same upstream, on a connection that was not used before
    NEXT = "next"  # another upstream


def next_step(failure: Failure, *, replayable: bool, fresh_tried: bool, others: bool, retry_sent: bool) -> Step:
    """May another attempt follow `failure`? Only asked while no byte of an answer has been relayed.

    `replayable`: the request can be sent again whole. `fresh_tried`: a fresh connection was forced once already.
    `others`: another upstream is left. `retry_sent`: the route allows a second generation.
    """
    if not replayable:
        return Step.STOP
    if failure.retry is Retry.FRESH:
        return Step.STOP if fresh_tried else Step.FRESH
    if not others:
        return Step.STOP
    if failure.retry is Retry.UNSENT or (failure.retry is Retry.SENT and retry_sent):
        return Step.NEXT
    return Step.STOP


def retries_status(status: int, *, retry_sent: bool) -> bool:
    """Is an answer of this status worth asking another upstream? 429 and 503 say that nothing was generated."""
    return status in (429, 503) or (retry_sent and status >= 500)
