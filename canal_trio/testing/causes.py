"""Which causes a record may name, by what the plan has go wrong around its exchange.

A *hazard* is one thing of the plan that may reach an exchange. Without any, an exchange must complete; with some, its
failure must be one that they can cause. A fault that comes too late to matter is no obligation to fail.
"""

from __future__ import annotations

import math
from itertools import accumulate

from canal_trio.errors import Failure, Kind, Phase, Side
from canal_trio.settings import Deadlines
from canal_trio.testing.plans import Ask, Client, Plan, Reply, reply_bytes
from canal_trio.testing.simlink import FaultKind

__all__ = ["causes_of", "hazards_of", "longest_idle"]

_U, _C, _G = Side.UPSTREAM, Side.CLIENT, Side.GATEWAY
Cause = tuple[Side, Kind]

_CUT: set[Cause] = {(_U, Kind.CUT), (_U, Kind.RESET), (_U, Kind.STALE)}
_LATE: set[Cause] = {(_U, Kind.TIMEOUT), (_U, Kind.STALLED), (_G, Kind.TIMEOUT)}
_GONE: set[Cause] = {(_C, Kind.GONE), (_C, Kind.CUT), (_C, Kind.MALFORMED)}  # the latter inside of a head
_CAUSES: dict[str, set[Cause]] = {
    "reset": {(_U, Kind.RESET), (_U, Kind.CUT), (_U, Kind.STALE)},
    "stall": _LATE,
    "delay": _LATE,
    "half_close": {(_U, Kind.CUT), (_U, Kind.STALE)},
    "truncate": _CUT,
    "garbage": {(_U, Kind.MALFORMED)},
    "refused": {(_U, Kind.REFUSED)},
    "dns": {(_U, Kind.DNS)},
    "silent": {(_U, Kind.TIMEOUT)},
    "quits": {(_U, Kind.STALE), (_U, Kind.CUT), (_U, Kind.RESET)},
    "leave": _GONE,
    "pipelines": _GONE,
    "stops reading": {(_C, Kind.STALLED), (_G, Kind.TIMEOUT)},
    "client reset": _GONE,
    "client truncate": _GONE,
    "client half_close": _GONE,
    "client stall": {(_C, Kind.TIMEOUT)},
    "client delay": {(_C, Kind.TIMEOUT)},
    "raises": {(_G, Kind.INTERNAL)},
    "drain": {(_G, Kind.DRAINING)},
    "slow head": {(_U, Kind.STALLED)},
    "limit": {(_G, Kind.UNAVAILABLE)},
    "places": {(_G, Kind.OVERLOADED)},
    "deadline": {(_G, Kind.TIMEOUT)},
    "begun": {(_U, Kind.NO_STREAM)},
    "large": {(_C, Kind.BODY_TOO_LARGE)},
}


def hazards_of(plan: Plan, client: Client, ask: Ask) -> set[str]:
    """What may reach this exchange by its own replies and dials, its client's doings, and the world's."""
    found = _of_client(plan, client)
    least = min(plan.deadlines.upstream_idle, plan.reload.upstream_idle if plan.reload is not None else math.inf)
    for number, reply in enumerate(ask.replies):
        found |= _of_reply(reply)
        if reply.early and _head_takes(ask, number) > least - 1:
            found.add("slow head")  # nothing is read meanwhile, and a head that is not whole answers for nothing
    found |= {dial for dial in ask.dials if dial in ("refused", "dns", "silent")}
    if plan.drain is not None:
        found.add("drain")
    if any(upstream.connections is not None for upstream in plan.upstreams):
        found.add("limit")
    if plan.bounds.exchanges < math.inf:
        found.add("places")
    if plan.deadlines.exchange < math.inf:
        found.add("deadline")
    if ask.streams and any(reply.status != 200 or not reply.sse for reply in ask.replies):
        found.add("begun")  # a stream, whose head said 200, before that came
    for other in (each for one in plan.clients for each in one.asks):
        for number, reply in enumerate(other.replies):
            if reply.quits is not None:
                found.add("quits")  # of an idle connection, which anybody may be given
            if reply.out is not None and reply.out.at == reply_bytes(other, number).whole:
                found.add(reply.out.kind.value)  # the same: it strikes when all was said
    if ask.body is not None and ask.body > plan.bounds.held_body_bytes - 200:
        found.add("large")
    return found


def _head_takes(ask: Ask, number: int) -> float:
    """Seconds until the head of this reply is said."""
    said, reply = reply_bytes(ask, number), ask.reply(number)
    begun = accumulate(map(len, said.sends[:-1]), initial=0)  # bytes that were said before each send
    return reply.wait + sum(reply.pause(index) for index, before in enumerate(begun) if before < said.marks[0][0])


def _of_reply(reply: Reply) -> set[str]:
    found = {fault.kind.value for fault in (reply.out, reply.into) if fault is not None}
    return found | ({"garbage"} if reply.garbage else set())


def _of_client(plan: Plan, client: Client) -> set[str]:
    found = set()
    if client.leave is not None:
        found |= {"stops reading", "client stall"} if client.leave.how == "stall" else {"leave"}
        if client.leave.how == "eof" and all(upstream.on_client_eof == "finish" for upstream in plan.upstreams):
            found |= {"client half_close"}
    if client.out is not None:
        found.add(f"client {client.out.kind.value}")
    for fault in client.to_client.faults:
        late = fault.kind is FaultKind.STALL or (fault.kind is FaultKind.DELAY and fault.seconds > 10)
        found.add("stops reading" if late else "leave")
    if client.raises is not None:
        found.add("raises")
    ahead = sum((ask.body or 0) + 400 for ask in client.asks[1:])
    if client.pipelined and ahead > plan.bounds.pipelined_bytes * 0.8:
        found.add("pipelines")  # more than is read ahead where a hang-up can only be read
    return found


def causes_of(hazards: set[str]) -> set[Cause]:
    """The sides and kinds that a failure may have."""
    return set().union(*(_CAUSES[hazard] for hazard in hazards))


def longest_idle(failure: Failure | None, deadlines: Deadlines) -> float:
    """Virtual seconds that may pass without a byte moving before an exchange ends in this way."""
    if failure is None:
        return deadlines.after_done
    match failure.side, failure.kind:
        case (Side.CLIENT, Kind.TIMEOUT):
            return deadlines.request_head if failure.phase is Phase.HEAD else deadlines.body_idle
        case (Side.CLIENT, Kind.STALLED):
            return deadlines.client_write
        case (Side.UPSTREAM, Kind.TIMEOUT):
            return deadlines.connect if failure.phase is Phase.DIAL else deadlines.first_byte
        case (Side.UPSTREAM, Kind.STALLED):
            return deadlines.upstream_idle
        case (Side.GATEWAY, Kind.TIMEOUT):
            return max(deadlines.tunnel_idle, 0.0 if deadlines.exchange == math.inf else deadlines.exchange)
        case (Side.GATEWAY, Kind.UNAVAILABLE | Kind.OVERLOADED):
            return deadlines.lease
        case (Side.GATEWAY, Kind.DRAINING):
            return 1e9  # the drain's own deadline is looked at where records are made
        case _:
            return 0.0
