"""The promises, held against what a run has shown; `twins` compares the two runs of a seed.

Each check is a function that answers with complaints, so that one run can break several promises at once. Invariant: no
check knows how the gateway works, only what its peers said, what they got, and what the records claim.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace

from canal_trio.errors import Kind, Phase, Side
from canal_trio.hooks import ExchangeRecord, Outcome
from canal_trio.settings import Deadlines
from canal_trio.testing.causes import causes_of, hazards_of, longest_idle
from canal_trio.testing.plans import Ask, Client, request_bytes
from canal_trio.testing.simpeers import Attempt, ClientPeer
from canal_trio.testing.simworld import Noted, Seen
from canal_trio.testing.strictwire import Message

__all__ = ["PINGS", "judge"]

_WRITE = 16 * 1024  # bytes of one write, and a piece, where a stream tells only that it took all
GRAIN = 0.05  # virtual seconds: the reaper's grain, and what a latency does to it
PINGS = re.compile(rb"(?:^|(?<=\n\n))(?:: ping\n)+")  # between two events, and nowhere else
_HALF_A_PING = re.compile(rb"(?:^|(?<=\n\n)):(?: (?:p(?:i(?:ng?)?)?)?)?\Z")


def judge(seen: Seen) -> list[str]:
    """Every broken promise of one run."""
    found = list(seen.complaints)
    for peer in seen.clients:
        found += _client(seen, peer)
    found += _attempts(seen)
    path = "hand-over" if seen.handover else "plain"
    return [f"[{path}] {complaint}" for complaint in dict.fromkeys(found)]


def _client(seen: Seen, peer: ClientPeer) -> Iterator[str]:
    """What concerns one connection, then each of its exchanges."""
    plan, records = peer.plan, seen.records[peer.number]
    if len(records) > peer.sent:
        yield f"c{peer.number}: {len(records)} records of {peer.sent} requests"
    if len(peer.answers) > len(records):
        yield f"c{peer.number}: {len(peer.answers)} answers and {len(records)} records"
    whole = peer.ended_by == "fin" and not peer.left and not plan.to_client.faults and plan.raises is None
    whole = whole and plan.out is None  # the answer to half a HEAD has a body
    whole = whole and not any(_is_cut(noted.record) for noted in records)
    if peer.reader.pending and peer.reader.current is None and whole:
        yield f"c{peer.number}: {peer.reader.pending} bytes that belong to no answer"
    disturbed = False
    for index, ask in enumerate(plan.asks):
        hazards = hazards_of(seen.plan, plan, ask)
        noted = records[index] if index < len(records) else None
        answer = peer.answers[index] if index < len(peer.answers) else None
        if noted is None:
            if not disturbed and not hazards:
                yield f"{ask.tag}: nothing was wrong with it, and it has no record"
        else:
            yield from _exchange(seen, peer, ask, hazards, noted, answer)
        closes = ask.close or ask.version == "1.0" or any(reply.early for reply in ask.replies)
        disturbed = disturbed or closes or bool(hazards)


def _is_cut(record: ExchangeRecord) -> bool:
    """By a drain, or its own deadline: anywhere, in a head, too."""
    late = record.failure is not None and (record.failure.side, record.failure.kind) == (Side.GATEWAY, Kind.TIMEOUT)
    return late or record.outcome is Outcome.DRAINED


def _exchange(
    seen: Seen, peer: ClientPeer, ask: Ask, hazards: set[str], noted: Noted, answer: Message | None
) -> Iterator[str]:
    record, plan = noted.record, peer.plan
    say = f"{ask.tag} ({record.outcome.value}, {record.failure}): "
    if record.path and record.request_id != ask.tag:
        yield f"{say}its record is that of {record.request_id}"
    for complaint in (
        *_cause(hazards, record, late=not seen.handover and answer is not None and answer.complete),
        *_time(seen, plan, noted, patient="stops reading" in hazards),
        *_leaving(seen, peer, ask, noted),
        *_delivered(seen, peer, ask, record, answer),
    ):
        yield say + complaint


def _cause(hazards: set[str], record: ExchangeRecord, *, late: bool) -> Iterator[str]:
    """Its cause fits what the plan did to it.

    `late`: the client has all, on the path where a write tells only afterwards what was taken. If it is seen to leave
    before that, and the rest would be read without it, it counts as gone.
    """
    failure = record.failure
    if failure is None or (late and failure.kind is Kind.GONE and "drained" in record.flags):
        return
    if (failure.side, failure.kind) not in causes_of(hazards):
        yield f"no such cause in {sorted(hazards) or 'a plan that leaves it alone'}"
    if record.outcome is Outcome.COMPLETED:
        yield "completed, with a failure"


def _time(seen: Seen, plan: Client, noted: Noted, *, patient: bool) -> Iterator[str]:
    """Nothing ends later than its deadline, and none of them is early."""
    failure, deadlines = noted.record.failure, seen.plan.deadlines
    longest = longest_idle(failure, deadlines)
    if seen.plan.reload is not None:
        longest = max(longest, longest_idle(failure, _reloaded(seen)))
    most = deadlines.exchange + deadlines.request_head + deadlines.client_write + deadlines.linger
    if noted.record.duration > most and "drained" not in noted.record.flags:
        yield f"took {noted.record.duration:.3f} s, where {deadlines.exchange:g} s are allowed"
    if failure is not None and failure.kind is Kind.GONE and "finish" in _eof_rules(seen):
        return  # an EOF becomes leaving when an upstream is tried that has it so
    if "drained" in noted.record.flags:
        return  # it went on without its client
    if patient:  # what is still to be said has its time, too
        longest += deadlines.client_write
    if plan.raises is not None and failure is not None and failure.kind is Kind.INTERNAL:
        # The planted bug strikes at a byte, which may be one of a heartbeat's, and that comes after silence.
        longest += max(upstream.heartbeat or 0.0 for upstream in seen.plan.upstreams)
    latency = 2 * (plan.to_client.latency + plan.to_gateway.latency)
    if noted.idle > longest + GRAIN + latency:
        yield f"ended {noted.idle:.3f} s after the last byte moved, where {longest:g} s are allowed"
    if failure is not None and failure.side is Side.UPSTREAM and failure.kind is Kind.STALLED:
        least = min(deadlines.upstream_idle, _reloaded(seen).upstream_idle)
        if failure.phase is Phase.STREAM and noted.upstream_idle < least - GRAIN:
            yield f"stalled after {noted.upstream_idle:.3f} s, where {least:g} s are allowed"


def _reloaded(seen: Seen) -> Deadlines:
    reload, deadlines = seen.plan.reload, seen.plan.deadlines
    return deadlines if reload is None else replace(deadlines, upstream_idle=reload.upstream_idle)


def _leaving(seen: Seen, peer: ClientPeer, ask: Ask, noted: Noted) -> Iterator[str]:
    """A client's leaving closes the upstream in the step that noticed it, and asks no other."""
    end = seen.client_ends[peer.number]
    noticed = end.noticed
    if ask.upgrade and noted.record.status == 101:
        noticed = end.broke or noticed  # in a tunnel an end is no leaving
    if noted.record.outcome is not Outcome.CLIENT_GONE or not noticed or "drained" in noted.record.flags:
        return
    first, steps = noticed[0], {moment.step for moment in noticed}
    patient = {upstream.name for upstream in seen.plan.upstreams if upstream.on_client_eof == "finish"}
    for attempt in seen.attempts.get(ask.tag, [])[-1:]:
        closed = attempt.end.closed_at
        if attempt.raw >= attempt.said.whole:
            continue  # it had nothing more to say, and its connection is another's
        if closed is None:
            yield f"the client left and {attempt.end.name} is still open"
        elif attempt.upstream in patient and noted.record.phase is Phase.ROUTE:
            pass  # its end was no leaving there; it became that on the way to one that has it so, which is not asked
        elif closed.step > first.step and closed.step not in steps:
            yield (
                f"the client's leaving was seen in step {first.step} ({first.time - seen.began:.6f}), "
                f"{attempt.end.name} closed in step {closed.step} ({closed.time - seen.began:.6f})"
            )
    if not seen.handover or "finish" in _eof_rules(seen):
        return  # where no hang-up is watched an end may be read before the exchange that it ends has begun
    number = seen.records[peer.number].index(noted)
    for upstream in seen.upstream_ends:
        for use in upstream.uses:
            if (use.client, use.number) == (peer.number, number) and use.asked.step > first.step:
                yield f"{upstream.name} was asked in step {use.asked.step}, the client's leaving seen in {first.step}"


def _eof_rules(seen: Seen) -> set[str]:
    return {upstream.on_client_eof for upstream in seen.plan.upstreams}


def _delivered(
    seen: Seen, peer: ClientPeer, ask: Ask, record: ExchangeRecord, answer: Message | None
) -> Iterator[str]:
    """What the client got is what one attempt said, to its end only if that one ended."""
    attempts = seen.attempts.get(ask.tag, [])
    finished = record.outcome in (Outcome.COMPLETED, Outcome.UPSTREAM_ERROR) and record.failure is None
    stayed = not peer.left and not peer.plan.to_client.faults and peer.plan.raises is None
    if record.attempts and record.status is not None and answer is not None and record.status != answer.status:
        yield f"the record says status {record.status}, the client was told {answer.status}"
    if answer is None:
        if finished and stayed and "left_after_terminal" not in record.flags and peer.ended_by != "fin":
            yield "nothing of the answer arrived"
        return
    cut = record.failure is not None and not seen.handover
    unseen = _WRITE + max(seen.plan.bounds.piece_bytes, seen.plan.bounds.handover_bytes) if cut else 0
    tag = answer.get(b"x-tag")
    if tag is None and ask.streams and answer.status == 200:
        yield from _early(ask, record, answer, attempts, stayed=stayed, ended_by=peer.ended_by, unseen=unseen)
        return
    if tag is None:
        if record.outcome in (Outcome.COMPLETED, Outcome.UPSTREAM_FAILED) and answer.status == 200:
            yield "an answer of 200 that no upstream gave"
        if answer.status >= 500 and answer.get(b"content-type") == b"application/json":
            return
        if answer.status < 400:
            yield f"an answer of {answer.status} that no upstream gave"
        return
    if tag.decode() != ask.tag:
        yield f"the client got the answer to {tag.decode()}"
        return
    attempt = attempts[int(answer.get(b"x-attempt") or b"0")]
    yield from _body(ask, record, answer, attempt, stayed=stayed, ended_by=peer.ended_by, unseen=unseen)


def _early(
    ask: Ask,
    record: ExchangeRecord,
    answer: Message,
    attempts: list[Attempt],
    *,
    stayed: bool,
    ended_by: str | None,
    unseen: int,
) -> Iterator[str]:
    """Behind a head that did not wait for an upstream's: the last one's stream, or an error, and no end of ours."""
    if attempts and attempts[-1].said.status == 200 and ask.reply(attempts[-1].number).sse:
        yield from _body(ask, record, answer, attempts[-1], stayed=stayed, ended_by=ended_by, unseen=unseen)
        return
    pure = PINGS.sub(b"", bytes(answer.body))
    if answer.complete:
        yield "a complete message behind an early head, and no upstream gave one"
    begins = b'data: {"error":'
    if not (pure.startswith((begins, b":")) or begins.startswith(pure)):
        yield f"behind an early head, from nobody: {pure[:60]!r}"


def _body(
    ask: Ask,
    record: ExchangeRecord,
    answer: Message,
    attempt: Attempt,
    *,
    stayed: bool,
    ended_by: str | None,
    unseen: int,
) -> Iterator[str]:
    """`unseen`: so many bytes more than the record says may have been delivered."""
    said, body = attempt.said, bytes(answer.body)
    ended = attempt.raw >= said.whole
    pure = PINGS.sub(b"", body)
    if not answer.complete:
        pure = _HALF_A_PING.sub(b"", pure)
    told = pure.find(b'data: {"error":{"message":') if answer.framing == "chunked" else -1
    if told >= 0 and not said.payload.startswith(pure[: told + 60]):
        if record.outcome not in (
            Outcome.UPSTREAM_FAILED, Outcome.DRAINED, Outcome.INTERNAL_ERROR, Outcome.REJECTED
        ):
            yield "an error event of the gateway's own, and no such outcome"
        if answer.complete:
            yield "a complete message with an error event of the gateway's own"
        pure = pure[:told]
        if pure and not pure.endswith(b"\n\n"):
            yield "an error event of the gateway's own inside of another event"
    if not said.payload.startswith(pure):
        at = next((i for i, (a, b) in enumerate(zip(pure, said.payload, strict=False)) if a != b), len(said.payload))
        yield f"not what the upstream said, from byte {at} on: {pure[max(0, at - 20) : at + 40]!r}"
    closing = attempt.said.whole < 1 << 60 and _framing(ask, attempt) == "close"  # a FIN is an end wherever it comes
    late = "late_body_end" in record.flags
    closing = closing or (answer.framing == "close" and not stayed)  # the plan's own FIN
    if answer.complete and ask.method != "HEAD" and answer.framing != "none" and answer.framing != "tunnel":
        if not ended and not closing and not late:
            yield f"a complete message, and the upstream said {attempt.raw} of {said.whole} bytes"
        if pure != said.payload and not closing and not late:
            yield f"a complete message of {len(pure)} bytes, and the upstream said {len(said.payload)}"
    done = record.outcome in (Outcome.COMPLETED, Outcome.UPSTREAM_ERROR) and record.failure is None
    excused = {"cut_after_terminal", "left_after_terminal"} & set(record.flags)
    if done and stayed and not excused and not answer.complete and answer.framing != "tunnel":
        yield f"the message is incomplete ({len(pure)} of {len(said.payload)} bytes, ended by {ended_by})"
    counted = stayed and record.outcome is not Outcome.CLIENT_GONE and answer.framing != "tunnel"
    if counted and ask.method != "HEAD" and not 0 <= len(pure) - record.response_bytes <= unseen:
        yield f"the record says {record.response_bytes} bytes, {len(pure)} were delivered"


def _framing(ask: Ask, attempt: Attempt) -> str:
    return ask.reply(attempt.number).framing


# -- upstreams ---------------------------------------------------------------------------------------------------------


def _attempts(seen: Seen) -> Iterator[str]:
    """What upstreams got is what clients sent; who was asked again could be."""
    for tag, attempts in seen.attempts.items():
        ask = seen.plan.ask(tag)
        _, payload = request_bytes(ask)
        for attempt in attempts:
            body = bytes(attempt.request.body)
            if not payload.startswith(body):
                yield f"{tag}: the upstream got what the client did not say: {body[:60]!r}"
            if attempt.request.complete and body != payload and not ask.upgrade:
                yield f"{tag}: a complete request of {len(body)} bytes, and the client's has {len(payload)}"
            if attempt.request.get(b"x-request-id") != tag.encode():
                yield f"{tag}: another id"
        yield from _retries(seen, tag, ask, attempts)


def _retries(seen: Seen, tag: str, ask: Ask, attempts: list[Attempt]) -> Iterator[str]:
    """Asked again only before the first byte of an answer, and only where that is allowed (design, section 6)."""
    stale = 0
    allowed = {upstream.name: upstream.retry_sent for upstream in seen.plan.upstreams}
    for attempt, following in itertools.pairwise(attempts):
        reply = ask.reply(attempt.number)
        if attempt.raw == 0 and attempt.reused and attempt.upstream == following.upstream:
            stale += 1
            if stale > 1:
                yield f"{tag}: sent again twice because of a stale connection"
            if following.reused:
                yield f"{tag}: sent again on a connection that was used before"
            continue
        stale = 0  # each upstream has a stale connection of its own
        if attempt.upstream == following.upstream:
            yield f"{tag}: sent twice to {attempt.upstream}"
        elif reply.status in (429, 503) or allowed[attempt.upstream] or (seen.plan.holds and reply.error):
            continue
        elif attempt.raw > 0 or not attempt.reused:
            yield f"{tag}: sent again to {following.upstream} after {attempt.upstream} said {attempt.raw} bytes"
