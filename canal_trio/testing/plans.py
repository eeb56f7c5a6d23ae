"""A simulated scenario as data: who says what to whom, over which network, and what goes wrong.

A `Plan` holds everything that a run depends on beside the order in which Trio runs its tasks, which is drawn from the
plan's seed. Plans are frozen, so that one can be printed, replayed, and made smaller. What is said is made from the
exchange's tag (`0.2`: client 0, its third request) and the number of the attempt, so that no byte of one exchange can
pass for a byte of another.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from canal_trio.settings import Balance, Bounds, Deadlines, Health, Model, Retries, Settings, Upstream
from canal_trio.testing.simlink import Fault, SimLink

__all__ = ["Ask", "Client", "Leave", "Plan", "Reload", "Reply", "Said", "reply_bytes", "request_bytes", "settings_of"]


@dataclass(frozen=True, slots=True)
class Reply:
    """What an upstream answers to one attempt."""

    status: int = 200
    sse: bool = False
    framing: str = "length"  # "length", "chunked", "close"
    sizes: tuple[int, ...] = (2,)  # of the payload's pieces
    cut: int = 0  # bytes of each send; 0: a piece each
    gap: float = 0.0  # seconds between two sends
    wait: float = 0.0  # before the head
    informational: int = 0  # 103 heads
    done: bool = False  # `data: [DONE]` at the end of an event stream
    error: bool = False  # an error event at the end of an event stream
    early: bool = False  # before the request's body was read
    close: bool = False  # says `Connection: close`, and does
    trailers: bool = False
    quits: float | None = None  # closes the connection so many seconds later, if it was not used again
    out: Fault | None = None  # at byte N of what it says
    into: Fault | None = None  # at byte N of what it reads
    garbage: str = ""  # "head" or "chunk": not HTTP from there on

    def pause(self, index: int) -> float:
        """Seconds before the send of this number, from 0: never in step with a timer."""
        return self.gap * (0.4 + index * 0.618 % 1.2) if index else 0.0


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. The replies are those to its attempts, the last one for all that follow; so are the dials."""

    tag: str
    method: str = "POST"
    version: str = "1.1"
    close: bool = False
    body: int | None = None  # bytes
    chunked: bool = False
    expect: bool = False
    upgrade: bool = False
    model: str | None = None  # named in a body of JSON
    streams: bool = False  # and that says `"stream": true`
    pause: float = 0.0  # seconds before it is sent
    replies: tuple[Reply, ...] = (Reply(),)
    dials: tuple[str, ...] = ("ok",)  # "ok", "slow", "refused", "dns", "silent"

    def reply(self, attempt: int) -> Reply:
        """To the attempt of this number, from 0."""
        return self.replies[min(attempt, len(self.replies) - 1)]

    def dial(self, number: int) -> str:
        """How the dial of this number goes, from 0."""
        return self.dials[min(number, len(self.dials) - 1)]


@dataclass(frozen=True, slots=True)
class Leave:
    """A client does something unasked once it received `at` bytes, or `after` seconds after its first request."""

    how: str  # "close", "reset", "eof" (its own direction only), "stall" (reads no more)
    at: int | None = None
    after: float | None = None


@dataclass(frozen=True, slots=True)
class Client:
    """One client connection."""

    asks: tuple[Ask, ...]
    start: float = 0.0
    pipelined: bool = False
    to_gateway: SimLink = field(default_factory=SimLink)
    to_client: SimLink = field(default_factory=SimLink)  # faults of this one are at byte N of what it gets
    send: int = 0  # bytes of each send; 0: a request at once
    spacing: float = 0.0  # seconds between two of them
    read: int = 65_536  # bytes of each read
    pause: float = 0.0  # seconds between two of them
    out: Fault | None = None  # at byte N of what it sends
    leave: Leave | None = None
    raises: int | None = None  # a bug: the gateway's stream raises at this byte of what the client gets
    waits: bool = False  # at the end it waits until the gateway closes


@dataclass(frozen=True, slots=True)
class Reload:
    """The configuration is loaded anew: nobody may notice."""

    at: float
    piece_bytes: int
    upstream_idle: float


@dataclass(frozen=True, slots=True)
class Plan:
    """A scenario. `order` seeds the order in which tasks that could run do run."""

    order: int
    clients: tuple[Client, ...]
    upstreams: tuple[Upstream, ...]
    models: tuple[Model, ...] = ()
    bounds: Bounds = field(default_factory=Bounds)
    deadlines: Deadlines = field(default_factory=Deadlines)
    request_link: SimLink = field(default_factory=SimLink)  # to upstreams; its faults are those of fresh connections
    response_link: SimLink = field(default_factory=SimLink)  # from upstreams
    drain: float | None = None
    reload: Reload | None = None
    bare: bool = False  # the plain path: streams without anything of the protocol, or wrapped ones
    holds: bool = False  # the first event of a stream is held: an error is asked of another upstream

    @property
    def asks(self) -> int:
        """Requests there are."""
        return sum(len(client.asks) for client in self.clients)

    def ask(self, tag: str) -> Ask:
        """The request of this tag."""
        client, _, number = tag.partition(".")
        return self.clients[int(client)].asks[int(number)]


# One exchange's bad luck is not another's: the verdicts over upstreams have tests of their own (`policy`).
_PATIENT = Health(failures=1 << 30, error_count=1 << 30, set_aside=0.0, set_aside_most=0.0)
_EAGER = Retries(attempts=10, share=1.0, floor=1_000.0, burst=1_000.0, backoff=0.0, backoff_most=0.0)


def settings_of(plan: Plan, bounds: Bounds | None = None, deadlines: Deadlines | None = None) -> Settings:
    """The gateway's settings."""
    return Settings(
        upstreams=plan.upstreams,
        models=plan.models,
        bounds=bounds or plan.bounds,
        deadlines=deadlines or plan.deadlines,
        health=_PATIENT,
        retries=_EAGER,
        balance=Balance(hold_first_event=plan.holds),
    )


# -- bytes -------------------------------------------------------------------------------------------------------------


def request_bytes(ask: Ask) -> tuple[bytes, bytes]:
    """Head and payload of a request; of an upgrade, the payload is what the client says in the tunnel."""
    lines = [f"{ask.method} /v1/x/{ask.tag} HTTP/{ask.version}", "Host: gw.test", f"X-Request-Id: {ask.tag}"]
    payload = b"" if ask.body is None else _labelled(f"{ask.tag}>", ask.body)
    if ask.upgrade:
        lines += ["Connection: Upgrade", "Upgrade: websocket"]
    elif ask.body is not None:
        if ask.model is not None:
            fields: dict[str, object] = {"model": ask.model, "x": payload.decode()}
            payload = json.dumps(fields | ({"stream": True} if ask.streams else {})).encode()
            lines.append("Content-Type: application/json")
        lines.append("Transfer-Encoding: chunked" if ask.chunked else f"Content-Length: {len(payload)}")
    if ask.expect:
        lines.append("Expect: 100-continue")
    if ask.close:
        lines.append("Connection: close")
    elif ask.version == "1.0":
        lines.append("Connection: keep-alive")
    return "\r\n".join([*lines, "", ""]).encode(), payload


@dataclass(frozen=True, slots=True)
class Said:
    """A reply as bytes. `marks`: for each send, how many bytes were said with it, and how many of them are payload."""

    sends: tuple[bytes, ...]
    payload: bytes
    marks: tuple[tuple[int, int], ...]
    whole: int  # bytes from which on the message is complete
    status: int = 0

    def payload_at(self, raw: int) -> int:
        """The payload bytes in the first `raw` bytes, at the least."""
        known = 0
        for end, payload in self.marks:
            if end > raw:
                break
            known = payload
        return known


@functools.lru_cache(maxsize=512)
def reply_bytes(ask: Ask, attempt: int) -> Said:
    """What the upstream says to this attempt."""
    reply = ask.reply(attempt)
    if reply.garbage == "head":
        raw = b"HTTP/1.1 OK then\r\nx\r\n\r\n"
        return Said((raw,), b"", ((len(raw), 0),), 1 << 60)
    pieces = _pieces(f"{ask.tag}#{attempt}", reply)
    payload = b"".join(pieces)
    bodyless = ask.method == "HEAD" or reply.status in (204, 304)
    lines = [f"HTTP/1.1 {reply.status} Said", f"X-Tag: {ask.tag}", f"X-Attempt: {attempt}"]
    framing = "none" if reply.status in (101, 204, 304) else reply.framing
    if reply.status == 101:
        lines += ["Connection: Upgrade", "Upgrade: websocket"]
    elif reply.close or framing == "close":
        lines.append("Connection: close")
    if framing == "length":
        lines.append(f"Content-Length: {len(payload)}")
    elif framing == "chunked":
        lines.append("Transfer-Encoding: chunked")
    lines.append(f"Content-Type: {'text/event-stream' if reply.sse else 'text/plain'}")
    early = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * reply.informational
    head = early + "\r\n".join([*lines, "", ""]).encode()
    if bodyless:
        return Said((head,), b"", ((len(head), 0),), len(head), reply.status)
    return _said(head, pieces, reply, framing)


def _said(head: bytes, pieces: Sequence[bytes], reply: Reply, framing: str) -> Said:
    sends = [head, *(b"%x\r\n%b\r\n" % (len(piece), piece) if framing == "chunked" else piece for piece in pieces)]
    marks, raw, known = [], 0, 0
    for index, send in enumerate(sends):
        raw += len(send)
        known += len(pieces[index - 1]) if index else 0
        marks.append((raw, known))
    whole = raw
    if reply.garbage == "chunk" and framing == "chunked":
        sends.append(b"zz\r\n")
        whole = 1 << 60
    elif framing == "chunked":
        last = b"0\r\nX-Trailer: t\r\n\r\n" if reply.trailers else b"0\r\n\r\n"
        sends[-1] += last  # what ends a body often comes with its last piece
        whole += len(last)
    if reply.cut:
        data = b"".join(sends)
        sends = [data[at : at + reply.cut] for at in range(0, len(data), reply.cut)]
    return Said(tuple(sends), b"".join(pieces), tuple(marks), whole, reply.status)


def _pieces(label: str, reply: Reply) -> list[bytes]:
    if not reply.sse:
        return [_labelled(f"{label}.{number}", size) for number, size in enumerate(reply.sizes)]
    pieces = [
        b'data: {"t":"%b","x":"%b"}\n\n' % (f"{label}.{number}".encode(), b"y" * size)
        for number, size in enumerate(reply.sizes)
    ]
    if reply.error:
        pieces.append(b'data: {"error":{"message":"out of cards","code":"%b"}}\n\n' % label.encode())
    if reply.done:
        pieces.append(b"data: [DONE]\n\n")
    return pieces


def _labelled(label: str, size: int) -> bytes:
    """`size` bytes that say whose they are."""
    unit = f"<{label}>".encode()
    return (unit * (size // len(unit) + 1))[:size]
