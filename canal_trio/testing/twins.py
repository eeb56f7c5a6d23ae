"""The two runs of a seed beside each other: hand-over and the plain path give the same bytes, endings and records.

Invariant: what hangs by where bytes happen to be at one moment is not compared; `judge` has looked at it already.
"""

from __future__ import annotations

from collections.abc import Iterator

from canal_trio.errors import Failure, Kind, Phase, Side
from canal_trio.hooks import ExchangeRecord
from canal_trio.testing.causes import hazards_of
from canal_trio.testing.judge import PINGS
from canal_trio.testing.plans import Ask
from canal_trio.testing.simlink import FaultKind
from canal_trio.testing.simpeers import ClientPeer
from canal_trio.testing.simworld import Seen
from canal_trio.testing.strictwire import Message

__all__ = ["compare"]

_ALIKE = (
    "outcome", "failure", "status", "attempts", "upstream", "request_bytes", "response_bytes", "events", "flags"
)  # fmt: skip
_FAULTY = {"stops reading", "pipelines", "leave", "raises", "drain", "limit", "places", "deadline"}


def compare(one: Seen, other: Seen) -> tuple[list[str], int]:
    """Hand-over and the plain path: same bytes, same endings, same records. How many exchanges could be compared?

    A client that leaves or stalls, a drain or a queue takes effect where bytes happen to be, and they may be elsewhere
    on the other path; such exchanges are judged alone.
    """
    found, count = [], 0
    peers = {peer.number: peer for peer in other.clients}
    for peer in one.clients:
        twin = peers.get(peer.number)
        if twin is None:
            continue
        refused = False  # within an upload: whether the connection goes on hangs by how much of that had come
        for index, ask in enumerate(peer.plan.asks):
            pair = _records(one, peer.number, index), _records(other, peer.number, index)
            hazards = hazards_of(one.plan, peer.plan, ask)
            if hazards & _FAULTY or peer.plan.out is not None or _way(one, ask) != _way(other, ask):
                break  # what follows on this connection began elsewhere
            if pair[0] is None or pair[1] is None:
                if pair[0] is not pair[1] and not refused:
                    found.append(f"{ask.tag}: a record on one path only")
                break
            if _held_up(ask, pair[0].failure, pair[1].failure):
                break
            if one.plan.holds and (pair[0].failure is not None or pair[1].failure is not None):
                break  # what breaks behind a first event that is held counts if it is known by then
            if _early_once(one, peer, twin, index):
                break
            count += 1
            names = list(_ALIKE)
            if pair[0].failure is not None or ask.upgrade or any(reply.early or reply.into for reply in ask.replies):
                names.remove("request_bytes")  # how much was read of what nobody wants any more
            if "quits" in hazards:
                names.remove("attempts")  # a connection may die while it is idle, or just before it is used
            if _breaks_or_ends(ask, pair[0].failure, pair[1].failure):
                names.remove("failure")
            found += [f"{ask.tag}: {text}" for text in _same(pair[0], pair[1], names)]
            inside = any(reply.into or (reply.early and reply.out) for reply in ask.replies)
            if not (inside and _is_own(peer, index) and _is_own(twin, index)):
                found += [f"{ask.tag}: {text}" for text in _same_bytes(peer, twin, index)]
            refused = pair[0].failure is not None and ask.body is not None
    return [f"[the two paths] {text}" for text in found], count


def _records(seen: Seen, client: int, index: int) -> ExchangeRecord | None:
    records = seen.records[client]
    return records[index].record if index < len(records) else None


def _way(seen: Seen, ask: Ask) -> list[tuple[str, bool]]:
    """What happened upstream: the same connection may have been idle on one path and in use on the other."""
    return [(attempt.upstream, attempt.reused) for attempt in seen.attempts.get(ask.tag, [])]


def _held_up(ask: Ask, one: Failure | None, other: Failure | None) -> bool:
    """An upstream has stopped reading, and the rest of the request fitted what its kernel holds on one path only.

    Chunks are cut as the body came, so it has not the same length on both; and then another deadline runs.
    """
    stops = any(reply.into is not None and reply.into.kind is FaultKind.STALL for reply in ask.replies)
    if not stops or one is None or other is None:
        return False
    return {(one.phase, one.kind), (other.phase, other.kind)} == {
        (Phase.SEND, Kind.STALLED),
        (Phase.FIRST_BYTE, Kind.TIMEOUT),
    }


def _early_once(seen: Seen, peer: ClientPeer, twin: ClientPeer, index: int) -> bool:
    """A head was written before its time on one path only: what was pipelined is here sooner on one of them, and the
    time for it begins with the request's head."""
    planned = any(upstream.early_head_after is not None for upstream in seen.plan.upstreams)
    return planned and _is_own(peer, index) is not _is_own(twin, index)


def _breaks_or_ends(ask: Ask, one: Failure | None, other: Failure | None) -> bool:
    """An upstream that answers early leaves in the middle of it: by what it has not read, its close is a reset or an
    end, and when the last bytes of a request come to it hangs by the pieces they are in."""
    leaves = any(
        reply.early and reply.out is not None and reply.out.kind is FaultKind.TRUNCATE for reply in ask.replies
    )
    if not leaves or one is None or other is None or one.phase is not other.phase:
        return False
    return {(one.side, one.kind), (other.side, other.kind)} == {(Side.UPSTREAM, Kind.CUT), (Side.UPSTREAM, Kind.RESET)}


def _same(one: ExchangeRecord, other: ExchangeRecord, names: list[str]) -> Iterator[str]:
    for name in names:
        mine, theirs = getattr(one, name), getattr(other, name)
        if isinstance(mine, Failure) and isinstance(theirs, Failure):
            mine, theirs = (mine.side, mine.phase, mine.kind), (theirs.side, theirs.phase, theirs.kind)
        if mine != theirs:
            yield f"{name}: {mine} handed over, {theirs} on the plain path"


def _is_own(peer: ClientPeer, index: int) -> bool:
    """The gateway's own word. What it tells of an upstream that left inside of a request hangs by what was unread:
    with that a close is a reset, and without it an end."""
    return index < len(peer.answers) and peer.answers[index].get(b"x-tag") is None


def _same_bytes(peer: ClientPeer, twin: ClientPeer, index: int) -> Iterator[str]:
    mine, theirs = (p.answers[index] if index < len(p.answers) else None for p in (peer, twin))
    if mine is None or theirs is None:
        if mine is not theirs:
            yield "an answer on one path only"
        return
    if _told(mine) != _told(theirs):
        yield f"other bytes: {len(mine.body)} handed over, {len(theirs.body)} on the plain path"
    if mine.complete != theirs.complete:
        yield f"complete: {mine.complete} handed over, {theirs.complete} on the plain path"


def _told(message: Message) -> bytes:
    return PINGS.sub(b"", bytes(message.body))
