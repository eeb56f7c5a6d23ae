"""Whatever an upstream answers: a 502, a body that looks broken, or the truth; and the next answer is the next one's.

Answers are drawn, right and wrong ones: response splitting, lengths and codings that contradict each other or the
body, bad chunks, floods of 1xx, heads beyond every bound, bytes after the end, ends at any byte. Two judges that share
no code with the product: the tests' own strict client, and h11 (what looks complete is what h11 reads as complete).

The next requests come when all of the answer has: bytes that arrive behind a request are its answer, as far as HTTP/1.1
can tell.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import h11
import trio
import trio.testing
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from kit import Ended, Response, request
from simkit import Conversation, world

from canal_trio.hooks import ExchangeRecord
from canal_trio.settings import Bounds, Deadlines

AFTER = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nafter"
POISON = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison"
HEAD_BYTES, HEAD_FIELDS = 2048, 20


@dataclass(frozen=True)
class Said:
    """What the upstream says to the first request, where its sends end, and what it does then."""

    data: bytes
    cuts: Sequence[int]
    then: str  # "close", "reset", or "stay"
    method: str

    def pieces(self) -> list[bytes]:
        """The sends."""
        positions = sorted({0, len(self.data), *(cut % (len(self.data) + 1) for cut in self.cuts)})
        return [self.data[start:end] for start, end in itertools.pairwise(positions)]


@dataclass
class Seen:
    """What came of it."""

    response: Response | None  # None: the connection ended before a head
    raw: bytes
    afters: list[Response]
    records: list[ExchangeRecord]
    attempts: list[int]  # the connection of each asking
    others: list[int]


async def simulate(said: Said, *, handover: bool) -> Seen:
    """One hostile answer, and two requests after it. The world sees to it that nothing is left."""
    attempts: list[int] = []
    others: list[int] = []
    played = trio.Event()

    async def play(upstream: Conversation) -> None:
        if b"/first" not in upstream.requests[-1].partition(b"\r\n")[0]:
            others.append(upstream.number)
            await upstream.say(AFTER)
            return
        attempts.append(upstream.number)
        try:
            for piece in said.pieces():
                await upstream.say(piece)
                await trio.sleep(0.001)
        finally:
            played.set()
        if said.then == "reset":
            upstream.stream.reset()
        if said.then != "stay":
            upstream.stream.close()

    bounds = Bounds(head_bytes=HEAD_BYTES, head_fields=HEAD_FIELDS)
    deadlines = Deadlines(first_byte=5, upstream_idle=5)
    async with world(play, handover=handover, bounds=bounds, deadlines=deadlines) as here:
        client = here.connect()
        await client.send(request(said.method, "/first"))
        try:
            response = await client.response(said.method)
        except Ended:
            response = None
        raw = bytes(client.seen)
        await played.wait()
        await trio.testing.wait_all_tasks_blocked()
        afters = []
        for asking in (client, here.connect()):
            if asking is client and (response is None or not kept(response)):
                continue
            await asking.send(request("GET", "/after"))
            afters.append(await asking.response())
        await here.records.wait(1 + len(afters))
        return Seen(response, raw, afters, list(here.records.all), attempts, others)


def kept(response: Response) -> bool:
    """Does the client's connection go on?"""
    return response.complete and response.framing != "close" and response.header("connection") != "close"


def run(said: Said, *, handover: bool) -> Seen:
    """One simulation in a run of its own."""

    async def main() -> Seen:
        return await simulate(said, handover=handover)

    return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


# -- the second judge --------------------------------------------------------------------------------------------------


def as_h11_reads_it(said: Said) -> tuple[int | None, bytes, bool]:
    """The final status (None: no head), the body, and whether it is complete."""
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
    connection.send(h11.Request(method=said.method, target="/", headers=[("Host", "a")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(said.data)
    if said.then == "close":
        connection.receive_data(b"")
    status, body = None, b""
    while True:
        try:
            event = connection.next_event()
        except h11.RemoteProtocolError:
            return status, body, False
        if isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            return status, body, True
        elif not isinstance(event, h11.InformationalResponse):
            return status, body, False


def judge(said: Said, seen: Seen) -> None:
    """What must hold of every run."""
    assert all((after.status, after.body, after.complete) == (200, b"after", True) for after in seen.afters)
    assert len(seen.records) == 1 + len(seen.afters)
    assert b"poison" not in seen.raw.partition(b"\r\n\r\n")[0]
    status, body, complete = as_h11_reads_it(said)
    response = seen.response
    if response is None:
        return
    if response.status in (502, 504) and response.header("x-should-retry"):
        assert said.method == "HEAD" or response.error["type"] == "upstream_error"
        return
    assert response.status == status
    assert body.startswith(said_of(response.body)), (body, response.body)
    if response.complete:
        # Behind `[DONE]` no more is waited for: an end of ours, and the record says so (design, section 6).
        assert complete or "late_body_end" in seen.records[0].flags, "it looks finished, and was not"
        assert response.body == body
    if not response.complete or said.then != "stay":
        assert not set(seen.attempts) & set(seen.others), "a doubtful connection was used again"
    names = [name for name, _ in response.headers]
    assert names.count("content-length") + names.count("transfer-encoding") <= 1
    assert len(response.informational) <= Bounds().informational_heads
    assert not re.search(rb"[\x00\x0b\x0c\x7f]", response.raw_head)


def said_of(body: bytes) -> bytes:
    """The body without the one thing that the gateway may add behind it."""
    return body[: body.index(b'data: {"error"')] if b'data: {"error"' in body else body


# -- what is drawn -----------------------------------------------------------------------------------------------------

fields = st.sampled_from(
    [
        b"Content-Type: text/event-stream",
        b"Content-Type: application/json",
        b"Connection: close",
        b"Connection: X-A",
        b"X-A: b",
        b"Keep-Alive: timeout=5",
        b"Trailer: X-T",
        b"Set-Cookie: a=1",
        b"X-Request-Id: theirs",
        b"X-Canal-A: b",
        b"Upgrade: h2c",
        b"X: " + b"x" * 1900,
    ]
)
odd_fields = st.sampled_from(
    [
        b"Content-Length: 3",
        b"Content-Length: -1",
        b"Content-Length: 3, 3",
        b"Content-Length: 99999999999999999999",
        b"Transfer-Encoding: chunked",
        b"Transfer-Encoding: gzip",
        b"Transfer-Encoding : chunked",
        b"X-A: split\r\n\r\n" + POISON,
        b"X-A: split\rContent-Length: 0",
        b"X-A: split\nContent-Length: 0",
        b"X-A: \x00",
        b" folded",
        b"no colon",
        b": no name",
        b"X: " + b"x" * 3000,
        b"\r\n".join([b"X: y"] * 30),
    ]
)
events = st.sampled_from([b"data: 1\n\n", b"data: [DONE]\n\n", b": ping\n\n", b"data: half", b'data: {"error":{}}\n\n'])
bodies = st.one_of(st.just(b""), st.lists(events, max_size=4).map(b"".join), st.binary(max_size=60), st.just(POISON))
informational = st.sampled_from(
    [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n", b"HTTP/1.1 101 \r\n\r\n"]
)
bad_chunks = st.sampled_from(
    [b"zz\r\nx\r\n", b"-1\r\n", b"5\nhello\r\n", b"5\r\nhel\r\n", b"ffffffffffffffffff\r\n", b"5 \r\nhello\r\n"]
)


@st.composite
def bodies_in_chunks(draw: st.DrawFn, body: bytes) -> bytes:
    """The body in chunks; once in a while one is not right, or the last one is missing."""
    out = b""
    while body:
        size = draw(st.integers(1, len(body)))
        out += b"%x\r\n%b\r\n" % (size, body[:size])
        body = body[size:]
    end = draw(st.sampled_from([b"0\r\n\r\n"] * 6 + [b"", b"0\r\nX-T: v\r\n\r\n", b"0\r\nBad\r\n\r\n", b"0\r\n"]))
    return out + (draw(bad_chunks) if draw(st.integers(0, 5)) == 0 else b"") + end


@st.composite
def answers(draw: st.DrawFn) -> bytes:
    """One answer, mostly right."""
    floods = draw(st.sampled_from([0] * 12 + [1, 2, 2, 20]))
    heads = draw(st.lists(informational, max_size=floods)) if floods < 20 else [draw(informational)] * 20
    version = draw(st.sampled_from([b"HTTP/1.1"] * 20 + [b"HTTP/1.0"] * 3 + [b"HTTP/2.0", b"ICY"]))
    status = draw(st.sampled_from([b"200"] * 16 + [b"204", b"304", b"500", b"099", b"600", b"20", b"101"]))
    body = draw(bodies)
    lines = draw(st.lists(st.one_of(*[fields] * 12, odd_fields), max_size=4))
    framing = draw(st.sampled_from(["length", "chunked", "close", "length", "chunked", "wrong"]))
    if framing == "length":
        lines.append(b"Content-Length: %d" % len(body))
    if framing == "wrong":
        lines.append(b"Content-Length: %d" % draw(st.integers(0, len(body) + 9)))
    if framing == "chunked":
        lines.append(b"Transfer-Encoding: chunked")
        body = draw(bodies_in_chunks(body))
    order = draw(st.permutations(lines))
    head = b"%b %b %b\r\n" % (version, status, draw(st.sampled_from([b"OK"] * 20 + [b"", b"\xff", b"a\x01b"])))
    rest = draw(st.sampled_from([b""] * 9 + [POISON, b"\r\n", b"x"]))
    return b"".join(heads) + head + b"".join(line + b"\r\n" for line in order) + b"\r\n" + body + rest


@st.composite
def sayings(draw: st.DrawFn) -> Said:
    """An answer, perhaps cut short, and what follows."""
    data = draw(answers())
    if draw(st.integers(0, 9)) == 0:
        data = data[: draw(st.integers(0, len(data)))]
    cuts = draw(st.lists(st.integers(0, 3000), max_size=6))
    then = draw(st.sampled_from(["close", "stay", "stay", "stay", "reset"]))
    return Said(data, cuts, then, draw(st.sampled_from(["GET", "GET", "GET", "HEAD"])))


SPLIT = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-A: split\r\n\r\nok" + POISON
SPLIT_STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nX-A: split\r\n\r\ndata:[DONE]\n\n"
TWICE_FRAMED = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + POISON


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(sayings())
@example(Said(SPLIT, (), "stay", "GET"))
@example(Said(SPLIT, range(len(SPLIT)), "stay", "HEAD"))
@example(Said(TWICE_FRAMED, (), "stay", "GET"))
@example(Said(SPLIT_STREAM, (), "stay", "GET"))
def test_an_upstream_cannot_poison_anything(said: Said) -> None:
    """A failure that shows, or what the upstream said; no head of its making; every later answer is its own."""
    both = [run(said, handover=handover) for handover in (True, False)]
    for seen in both:
        judge(said, seen)
    first, second = (seen.response for seen in both)
    assert (first is None) == (second is None)
    if first is not None and second is not None:
        assert (first.status, first.body, first.complete) == (second.status, second.body, second.complete)
    outcomes = [seen.records[0].outcome for seen in both]
    assert outcomes[0] is outcomes[1]
