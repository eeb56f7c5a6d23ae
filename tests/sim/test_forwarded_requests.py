"""Whatever a client sends, and however it is cut: what reaches the upstream is well-formed requests, each one meant.

Heads, framings and bodies are drawn, right and wrong ones; a client sends several in a row. Two judges that share no
code with the product: the strict parser (one well-formed request after the other, never a length beside a coding, never
a control byte), and h11 (nothing is forwarded that it does not read as a request of this method, target and body).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import h11
import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from kit import Client, Ended
from simkit import Conversation, world
from strict import Recorded, StrictUpstream

from canal_trio.settings import Upstream

SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: evil.test\r\n\r\n"
KEPT_THOUGH_NAMED = {"host", "content-length", "transfer-encoding", "authorization", "api-key", "x-api-key"}


@dataclass(frozen=True)
class Sent:
    """What one client sends, and where its sends end."""

    data: bytes
    cuts: Sequence[int]

    def pieces(self) -> list[bytes]:
        """The sends."""
        positions = sorted({0, len(self.data), *(cut % (len(self.data) + 1) for cut in self.cuts)})
        return [self.data[start:end] for start, end in itertools.pairwise(positions)]


@dataclass
class Seen:
    """What came of it."""

    upstream: StrictUpstream
    statuses: list[int]
    records: int


async def simulate(sent: Sent, *, handover: bool) -> Seen:
    """One client against a gateway before a strict upstream. The world sees to it that nothing is left."""
    strict = StrictUpstream()

    async def play(upstream: Conversation) -> None:
        await strict.serve(upstream.stream)

    async with world(play, handover=handover, upstream=Upstream("u0", "http://upstream.test")) as here:
        here.by_request = False
        client = here.connect()
        statuses: list[int] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, client, statuses)
            for piece in sent.pieces():
                await client.send(piece)
                await trio.sleep(0.001)
            await trio.sleep(1.0)
            if client.ended_by is None:
                await client.stream.send_eof()  # type: ignore[attr-defined]  # a simulated stream
        await trio.testing.wait_all_tasks_blocked()
        return Seen(strict, statuses, len(here.records.all))


async def read(client: Client, statuses: list[int]) -> None:
    """Every response until the connection ends; the reader itself refuses what is not well-formed."""
    try:
        while True:
            response = await client.response()
            statuses.append(response.status)
            assert response.status >= 400 or response.complete or client.ended_by
    except Ended:
        pass


def run(sent: Sent, *, handover: bool) -> Seen:
    """One simulation in a run of its own."""

    async def main() -> Seen:
        return await simulate(sent, handover=handover)

    return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


# -- the second judge --------------------------------------------------------------------------------------------------


def as_h11_reads_it(data: bytes) -> list[tuple[str, str, bytes, list[tuple[str, str]]]]:
    """Every complete request that h11 finds: method, target, body, fields. A lenient reading, so all that may be.

    Each is read by a connection of its own: h11 keeps none open that speaks HTTP/1.0, and knows no empty line before a
    request.
    """
    found = []
    while True:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        connection.receive_data(re.sub(rb"^(?:\r\n)+", b"", data))
        head, body = None, b""
        try:
            while not isinstance(event := connection.next_event(), h11.EndOfMessage):
                if isinstance(event, h11.Request):
                    head = event
                elif isinstance(event, h11.Data):
                    body += event.data
                else:
                    return found
        except h11.RemoteProtocolError:
            return found
        assert head is not None
        fields = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in head.headers]
        found.append((head.method.decode(), head.target.decode("latin-1"), body, fields))
        if "close" in ",".join(value for name, value in fields if name == "connection"):
            return found
        data = connection.trailing_data[0]


def judge(sent: Sent, seen: Seen) -> None:
    """What must hold of every run."""
    upstream = seen.upstream
    assert upstream.garbage == []
    meant = as_h11_reads_it(sent.data)
    assert len(seen.statuses) <= len(meant) + 1, "more answers than requests"
    at = 0
    for request in upstream.complete:
        while at < len(meant) and not same(request, meant[at]):
            at += 1  # answered by the gateway itself
        assert at < len(meant), f"nobody sent {request}"
        nothing_named(request, meant[at][3])
        at += 1
    assert seen.records >= len(seen.statuses)
    for raw in upstream.raw:
        assert not re.search(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", raw.partition(b"\r\n\r\n")[0])


def same(request: Recorded, meant: tuple[str, str, bytes, list[tuple[str, str]]]) -> bool:
    """The same request, whose target may have lost its authority."""
    method, target, body, _ = meant
    plain = re.sub(r"(?i)^https?://[^/?]*", "", target)
    if method == "OPTIONS" and not plain:
        plain = "*"
    plain = plain if plain.startswith(("/", "*")) else "/" + plain
    return (request.method, request.target, request.body) == (method, plain, body)


def nothing_named(request: Recorded, fields: list[tuple[str, str]]) -> None:
    """No value that only a field between client and gateway carried has gone on. Each drawn value is its own mark."""
    listed = ",".join(value for name, value in fields if name == "connection")
    options = {option.strip(" \t").lower() for option in listed.split(",")}
    for name, value in fields:
        if name in options - KEPT_THOUGH_NAMED and value.startswith("mark"):
            assert (name, value) not in request.headers, (name, value)


# -- what is drawn -----------------------------------------------------------------------------------------------------

NAMES = """X-A X-B X_A Cookie Keep-Alive TE Trailer Upgrade Proxy-Connection Proxy-Authorization X-Forwarded-For Via
    Accept Authorization X-Request-Id Content-Type Transfer_Encoding Content_Length X-Canal-A Expect"""
NAMED_OPTIONS = """close keep-alive X-A x-b Host Content-Length Transfer-Encoding Upgrade TE Authorization Cookie Via
    X-Forwarded-For"""
names = st.sampled_from(NAMES.split())
values = st.one_of(
    *[st.integers(0, 999).map(lambda number: f"mark{number}".encode())] * 3,
    st.sampled_from([b"", b"100-continue", b"websocket", b"a, b", b"\xff", b"\t", b"x\x00y", b"x\ry", b"x\ny"]),
)
options = st.lists(st.sampled_from([*NAMED_OPTIONS.split(), ""]), max_size=3).map(
    lambda names: "Connection: {}".format(", ".join(names)).encode()
)
usual = st.builds(lambda name, value: name.encode() + b": " + value, names, values)
odd = st.sampled_from(
    [
        b"X-A : b",
        b" X-A: folded",
        b"\tX-A: folded",
        b"X-A",
        b": b",
        b"X A: b",
        b"Host: second.test",
        b"Content-Length: 4",
        b"Transfer-Encoding: chunked",
        b"Transfer-Encoding: gzip, chunked",
        b"Transfer-Encoding: identity",
        b"Transfer-Encoding : chunked",
        b"Transfer-Encoding:\x0bchunked",
        b"Content-Length: +4",
        b"Content-Length: 4, 4",
        b"Content-Length: 0x4",
        b"Content-Length: 99999999999999999999",
        b"X-A: b\nTransfer-Encoding: chunked",
        b"X-A: b\rTransfer-Encoding: chunked",
    ]
)
lines = st.lists(st.one_of(*[usual] * 8, *[options] * 3, odd), max_size=5)
bodies = st.one_of(st.just(b""), st.just(b"hello"), st.just(SMUGGLED), st.binary(max_size=40))
sizes = st.sampled_from([b"%x", b"%X", b"0%x", b"%x;a=b", b'%x;a="b"', b"%x ", b" %x", b"0x%x", b"-%x", b"%x;\n"])
line_ends = st.sampled_from([b"\r\n"] * 12 + [b"\n", b"\r", b"\r\r\n", b"\r\n "])


@st.composite
def chunked_bodies(draw: st.DrawFn, body: bytes) -> bytes:
    """The body in chunks; once in a while they are not right."""
    right = draw(st.integers(0, 3)) > 0
    out = b""
    while body:
        size = draw(st.integers(1, len(body)))
        line, *ends = (b"%x", b"\r\n", b"\r\n") if right else (draw(sizes), draw(line_ends), draw(line_ends))
        out += line % size + ends[0] + body[:size] + ends[1]
        body = body[size:]
    trailer = draw(st.sampled_from([b""] * 4 + [b"X-T: v\r\n", b"Content-Length: 4\r\n", b"Bad\r\n"]))
    return out + b"0" + (b"\r\n" if right else draw(line_ends)) + trailer + b"\r\n"


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """One request, mostly right."""
    method = draw(st.sampled_from([b"GET", b"POST", b"POST", b"PUT", b"OPTIONS", b"HEAD2", b"CONNECT", b"get"]))
    number = b"%d" % draw(st.integers(0, 99))
    target = draw(
        st.sampled_from([b"/v1/%b"] * 6 + [b"http://gw.test/%b", b"/a/../%b", b"*", b"/%%2e%%2e/%b", b"%b", b"/\\%b"])
    )
    target = target % number if b"%b" in target else target
    version = draw(st.sampled_from([b"1.1"] * 12 + [b"1.0", b"2.0", b"1.10"]))
    fields = draw(lines)
    body = draw(bodies)
    framing = draw(st.sampled_from(["length", "chunked", "none", "length", "chunked", "both", "wrong"]))
    if framing in ("length", "both"):
        fields.append(b"Content-Length: %d" % len(body))
    if framing == "wrong":
        fields.append(b"Content-Length: %d" % draw(st.integers(0, len(body) + 5)))
    if framing in ("chunked", "both"):
        fields.append(b"Transfer-Encoding: chunked")
        body = draw(chunked_bodies(body))
    order = draw(st.permutations([b"Host: gw.test", *fields]))
    end = draw(line_ends) if draw(st.integers(0, 9)) == 0 else b"\r\n"
    head = b"%b %b HTTP/%b%b" % (method, target, version, end)
    return head + b"".join(line + b"\r\n" for line in order) + b"\r\n" + body


sendings = st.builds(
    Sent, st.lists(requests(), min_size=1, max_size=3).map(b"".join), st.lists(st.integers(0, 2000), max_size=6)
)

OLD = b"GET /v1/0 HTTP/1.0\r\nHost: gw.test\r\nConnection: keep-alive\r\n\r\n"
CL_TE = b"POST /v1/1 HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED
NAMED = b"GET /v1/1 HTTP/1.1\r\nHost: a\r\nConnection: X-A\r\nX-A: mark1\r\n\r\n"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(sendings)
@example(Sent(CL_TE, ()))
@example(Sent(NAMED, range(len(NAMED))))
@example(Sent(OLD * 3, ()))
def test_only_what_was_meant_reaches_the_upstream(sent: Sent) -> None:
    """One well-formed request after the other, each that h11 reads there too, with nothing that Connection named."""
    both = [run(sent, handover=handover) for handover in (True, False)]
    for seen in both:
        judge(sent, seen)
    first, second = ([(it.method, it.target, it.body) for it in seen.upstream.complete] for seen in both)
    assert first == second
    assert both[0].statuses == both[1].statuses


SPOILT: dict[str, Callable[[Seen, Recorded], object]] = {
    "nobody sent it": lambda _, request: setattr(request, "target", "/smuggled"),
    "Connection named it": lambda _, request: request.headers.append(("x-a", "mark1")),
    "a control byte": lambda seen, _: seen.upstream.raw.append(bytearray(b"GET / HTTP/1.1\r\nX: \x01\r\n\r\n")),
    "not a request": lambda seen, _: seen.upstream.garbage.append("a bare LF"),
    "more answers than requests": lambda seen, _: seen.statuses.extend([200, 200]),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_the_judges_can_object(fault: str) -> None:
    """To a request that nobody sent, a named field that goes on, a byte that no head may hold, and so on."""
    sent = Sent(NAMED, ())
    seen = run(sent, handover=True)
    judge(sent, seen)
    (request,) = seen.upstream.complete
    SPOILT[fault](seen, request)
    with pytest.raises(AssertionError):
        judge(sent, seen)
