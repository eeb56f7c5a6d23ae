"""Random streams, twice: handed over on the spot, and on the plain path. Nothing that can be observed may differ.

Pieces, latencies, buffers, faults at any byte of either side and a client that reads slowly or leaves are drawn; time
is virtual. Chunks may be cut differently, so bodies are compared, not chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import trio
import trio.testing
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from kit import Client, Ended, Response, chat
from simkit import Conversation, World, comparable, world

from canal_trio.errors import Kind, Side
from canal_trio.hooks import ExchangeRecord, Outcome
from canal_trio.testing.simstream import Fault, FaultKind, SimLink
from canal_trio.wire.sse import EventParser

DONE = b"data: [DONE]\n\n"
LINGER = 5.0  # virtual seconds: longer than any drawn latency


@dataclass(frozen=True)
class Case:
    """What is drawn."""

    pieces: Sequence[bytes]  # the upstream's body, one send each
    framing: str
    sse: bool
    gap: float  # virtual seconds between two pieces
    upstream: SimLink
    client: SimLink
    read: int  # the client's reads are at most this long
    pause: float  # and this far apart
    stops: int | None  # the client reads no more after so many bytes ...
    leaves: str | None  # ... and leaves at once: "close", "reset"; None: it stays, until it has stalled

    @property
    def payload(self) -> bytes:
        """The body."""
        return b"".join(self.pieces)


@dataclass
class Seen:
    """What came of a case."""

    response: Response | None  # None: the connection ended before its head
    record: ExchangeRecord
    upstream_left: bool


def head_of(case: Case) -> bytes:
    """The response head."""
    framing = {
        "chunked": b"Transfer-Encoding: chunked",
        "length": b"Content-Length: %d" % len(case.payload),
        "close": b"Connection: close",
    }
    kind = b"text/event-stream" if case.sse else b"application/octet-stream"
    return b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\n%b\r\n\r\n" % (kind, framing[case.framing])


async def simulate(case: Case, *, handover: bool) -> Seen:
    """Run the case once. The world sees to it that nothing is left."""

    async def play(upstream: Conversation) -> None:
        await upstream.say(head_of(case))
        for piece in case.pieces:
            await trio.sleep(case.gap)
            if case.framing == "chunked":
                await upstream.chunk(piece)
            else:
                await upstream.say(piece)
        if case.framing == "chunked":
            await upstream.say(b"0\r\n\r\n")
        if case.framing == "close":
            await upstream.stream.send_eof()
            await trio.sleep(10_000)

    async with world(play, handover=handover) as here:
        here.upstream_link = case.upstream
        client = here.connect(to_client=case.client)
        await client.send(chat())
        response = await listen(client, case, here)
        await here.records.wait(seconds=100_000)
        await trio.sleep(LINGER)
        assert len(here.records.all) == 1
        return Seen(response, here.records.all[0], here.conversations[0].left is not None)


class Reader(Client):
    """A client that reads as the case says."""

    def __init__(self, stream: Any, case: Case) -> None:
        super().__init__(stream)
        self.case = case

    async def fill(self, size: int = 65536) -> bool:
        """Read once, slowly; beyond `stops` not at all."""
        case = self.case
        if case.pause:
            await trio.sleep(case.pause)
        if case.stops is not None:
            size = min(size, case.stops - len(self.seen))
            if size <= 0:
                return False
        return await super().fill(min(size, case.read))


async def listen(client: Client, case: Case, here: World) -> Response | None:
    """Read the response as the case says; what the client has of it when it stops."""
    reader = Reader(client.stream, case)
    try:
        response = await reader.response()
    except Ended:
        response = None
    if case.stops is not None and len(reader.seen) >= case.stops:
        if case.leaves == "reset":
            client.stream.reset()  # type: ignore[attr-defined]  # a simulated stream
        if case.leaves is not None:
            client.stream.close()  # type: ignore[attr-defined]  # the same
    return response


# -- what must hold of each run ----------------------------------------------------------------------------------------


def judge(case: Case, seen: Seen) -> None:
    """The promises."""
    response, record = seen.response, seen.record
    if response is not None and response.status == 200:
        body, payload = response.body, case.payload
        if not payload.startswith(body):
            # Only one thing may follow what the upstream said, and only a part of it: the error event.
            assert case.sse
            assert record.outcome in (Outcome.UPSTREAM_FAILED, Outcome.CLIENT_GONE, Outcome.CLIENT_STALLED)
            said = payload[: before_error(body, payload)]
            if case.stops is None:  # else the client may have stopped reading within it
                # A parser sees it as an event of its own, and the events before it as they were.
                *before, error = EventParser().feed(body)
                assert before == EventParser().feed(said)
                assert (error.event, error.data[:9]) == ("message", '{"error":')
        if response.complete and case.framing != "close":  # there a FIN is an end wherever it comes (RFC 9112 8)
            assert body == payload, "a well-formed end that the upstream did not give"
        assert body.count(b"[DONE]") <= payload.count(b"[DONE]"), "a made-up [DONE]"
        assert record.response_bytes <= len(payload)
    if record.outcome is Outcome.COMPLETED and case.stops is None:
        assert response is not None
        assert response.complete or "cut_after_terminal" in record.flags
    if record.failure is not None:
        assert record.failure.kind is not Kind.INTERNAL
        if record.failure.side is Side.UPSTREAM:
            assert seen.upstream_left, "the upstream failed and its connection is still open"
    if record.outcome is Outcome.CLIENT_STALLED:
        assert record.failure is not None
        assert record.failure.side is Side.CLIENT


def before_error(body: bytes, payload: bytes) -> int:
    """Where the error event, or the beginning of it, follows what the upstream said."""
    begin = b'data: {"error":'
    differ = (at for at, (one, other) in enumerate(zip(body, payload, strict=False)) if one != other)
    common = next(differ, min(len(body), len(payload)))
    found = [
        at
        for at in range(max(0, common - len(begin)), common + 1)
        if begin.startswith(body[at:]) or body[at:].startswith(begin)
    ]
    assert found, body
    return found[0]


def same(case: Case, one: Seen, other: Seen) -> None:
    """Hand-over and the plain path: the same bytes, the same ending, the same record."""
    first, second = comparable(one.record), comparable(other.record)
    stays = case.stops is None
    # A client that leaves, or stalls, may do so when one of the two has passed on all there was, and the other has not.
    its_own_doing = not stays and {first.outcome, second.outcome} & {Outcome.CLIENT_GONE, Outcome.CLIENT_STALLED}
    assert first.outcome is second.outcome or its_own_doing, (first, second)
    if stays:
        assert (one.response is None) == (other.response is None)
        if one.response is not None and other.response is not None:
            assert one.response.body == other.response.body
            assert one.response.complete == other.response.complete
            assert one.response.status == other.response.status
        assert first.failure == second.failure
        assert first.response_bytes == second.response_bytes
        assert first.events == second.events
        assert first.status == second.status
        assert {*first.flags} == {*second.flags}
    elif one.response is not None and other.response is not None:
        shorter, longer = sorted((one.response.body, other.response.body), key=len)
        assert longer.startswith(shorter)
    assert first.attempts == second.attempts


# -- what is drawn -----------------------------------------------------------------------------------------------------

texts = st.binary(min_size=0, max_size=40).map(lambda raw: raw.translate(None, b"\r\n"))
events = st.one_of(
    texts.map(lambda text: b"data: %b\n\n" % text),
    texts.map(lambda text: b": %b\n\n" % text),
    texts.map(lambda text: b"event: e\ndata: %b\ndata: more\r\n\r\n" % text),
    st.integers(1, 70_000).map(lambda size: b"data: " + b"x" * size + b"\n\n"),
)
faults = st.builds(
    Fault,
    st.sampled_from(list(FaultKind)),
    st.integers(0, 3000) | st.integers(0, 150_000),
    st.sampled_from([0.5, 3.0]),
)


@st.composite
def links(draw: st.DrawFn, *, faulty: bool) -> SimLink:
    """One direction of a connection."""
    found = draw(st.lists(faults, max_size=1)) if faulty else []
    buffer = draw(st.sampled_from([7, 100, 4096, 70_000, 300_000]))
    # So slow that a write takes its 30 s is a case of its own: what counts as progress differs there.
    latency = draw(st.sampled_from([0.0, 0.25])) if buffer >= 4096 else 0.0
    return SimLink(buffer, latency, found)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A stream, its network and its client."""
    sse = draw(st.booleans())
    pieces = draw(st.lists(events if sse else st.binary(min_size=1, max_size=300), max_size=12))
    if sse and draw(st.booleans()):
        pieces.append(DONE)
    if sse and draw(st.booleans()):  # sends that do not keep to the events
        size = draw(st.integers(1, 1000))
        whole = b"".join(pieces)
        pieces = [whole[at : at + size] for at in range(0, min(len(whole), size * 60), size)]
    stops = draw(st.none() | st.integers(1, 3000) | st.integers(1, 100_000))
    upstream = draw(links(faulty=True))
    client = draw(links(faulty=False))
    pause = draw(st.sampled_from([0.0, 0.0, 0.0, 0.5]))
    if client.buffer < 100 or upstream.buffer < 100:
        pieces = cap(pieces, 400)
        pause = 0.0
    elif pause and client.buffer < 4096:
        pieces = cap(pieces, 3000)
    return Case(
        pieces=[piece for piece in pieces if piece],
        framing=draw(st.sampled_from(["chunked", "length", "close"])),
        sse=sse,
        gap=draw(st.sampled_from([0.0, 0.0, 0.1, 2.0])),
        upstream=upstream,
        client=client,
        read=draw(st.sampled_from([4096, 65_536] if pause else [100, 4096, 65_536])),  # as for the latency
        pause=pause,
        stops=stops,
        leaves=draw(st.sampled_from(["close", "reset", None])),
    )


def cap(pieces: Sequence[bytes], size: int) -> list[bytes]:
    """As much of `pieces` as is worth moving byte by byte."""
    kept: list[bytes] = []
    for piece in pieces:
        kept.append(piece[:size])
        size -= len(kept[-1])
        if size <= 0:
            break
    return kept


def run(case: Case, *, handover: bool) -> Seen:
    """One simulation in a run of its own."""
    clock = trio.testing.MockClock(autojump_threshold=0)

    async def main() -> Seen:
        return await simulate(case, handover=handover)

    return trio.run(main, clock=clock)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(cases())
@example(
    Case(
        [b"data: 1\n\n", DONE],
        "close",
        True,
        0.1,
        SimLink(4096, 0.0, [Fault(FaultKind.RESET, 100)]),
        SimLink(4096),
        100,
        0.0,
        None,
        None,
    )
)
@example(  # the client stops reading within the error event
    Case(
        [b"data: \n\n"],
        "chunked",
        True,
        0.0,
        SimLink(7, 0.0, [Fault(FaultKind.RESET, 91)]),
        SimLink(7),
        100,
        0.0,
        256,
        "close",
    )
)
def test_both_paths(case: Case) -> None:
    """Same bytes, same outcome, same record; a prefix of what was sent; no end that the upstream did not give."""
    seen = [run(case, handover=handover) for handover in (True, False)]
    for one in seen:
        judge(case, one)
    same(case, *seen)
