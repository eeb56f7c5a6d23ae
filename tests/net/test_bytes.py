"""Bytes are sacred: what one side said is what the other side gets, whatever the framing, however it was cut."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterable
from pathlib import Path

import pytest
import trio
from kit import Response, chat, chunked, request, running_gateway, scene, settings_for
from strict import OK, Recorded, strict_upstream

from canal_trio.hooks import Outcome
from canal_trio.testing.scripts import Close, Script, Send, Stall, WaitFor, openai_error
from canal_trio.testing.upstreams import ScriptedUpstream, SeenRequest

CASES = json.loads((Path(__file__).parent.parent / "cases/sse_cases.json").read_text())
MIB = 1024 * 1024
FRAMINGS = ("chunked", "length", "close")

STREAMS: dict[str, bytes] = {
    "usual": b'data: {"n":1}\n\ndata: {"n":2}\n\ndata: [DONE]\n\n',
    "crlf": b"data: 1\r\n\r\ndata: 2\r\nid: 7\r\n\r\ndata: [DONE]\r\n\r\n",
    "cr": b"data: 1\r\rdata: 2\r\r",
    "comments": b": keep-alive\n\n:\n\ndata: 1\n: between\ndata: 2\n\n: last\n\n",
    "named": b'event: response.created\ndata: {}\n\nevent: response.completed\ndata: {"response":{}}\n\n',
    "retry-and-id": b"retry: 10\n\nid: \xc3\xa9\n\ndata\n\nunknown: x\n\n",
    "utf-8": "data: naïve 日本語 🎋 \u2028 ﷽\n\n".encode() * 20,
    "bom": b"\xef\xbb\xbfdata: 1\n\n",
    "no-last-blank-line": b'data: {"n":1}\n\ndata: [DONE]\n',
    "no-last-newline": b'data: {"n":1}\n\ndata: [DONE]',
    "invalid-utf-8": b"data: \xff\xfe\x80\n\n",
    "nul": b"data: \0\n\n\0",
    "nothing": b"",
    "one-long-line": b"data: " + random.Random(1).randbytes(5 * MIB).translate(None, b"\r\n") + b"\n\ndata: [DONE]\n\n",
    "many-events": b"".join(b'data: {"token":"%d"}\n\n' % n for n in range(20_000)) + b"data: [DONE]\n\n",
    **{f"case-{case['name']}": case["raw"].encode("latin-1") for case in CASES},
}
BODIES: dict[str, bytes] = {
    "json": json.dumps({"object": "list", "data": [{"id": "é" * 50}] * 200}).encode(),
    "noise": random.Random(2).randbytes(3 * MIB),
    "looks-like-http": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n0\r\n\r\n" * 100,
    "looks-like-events": b"data: [DONE]\n\n" * 50,
}


def head_of(kind: str, framing: str, size: int) -> bytes:
    """A response head."""
    field = {"chunked": "Transfer-Encoding: chunked", "length": f"Content-Length: {size}", "close": "Connection: close"}
    return f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n{field[framing]}\r\n\r\n".encode()


def wire_of(body: bytes, framing: str, chance: random.Random) -> bytes:
    """The body in its framing; chunks of random sizes."""
    return chunked(*slices(body, chance)) if framing == "chunked" else body


def slices(data: bytes, chance: random.Random, most: int = 8) -> list[bytes]:
    """`data` cut at random."""
    if not data:
        return []
    cuts = sorted({0, len(data), *(chance.randrange(len(data)) for _ in range(chance.randrange(most)))})
    return [data[start:end] for start, end in itertools.pairwise(cuts)]


def cut(wire: bytes, way: str, chance: random.Random) -> Iterable[bytes]:
    """The sends: all at once, byte by byte, or at random."""
    if way == "whole":
        return [wire]
    if way == "bytes":
        return [wire[at : at + 1] for at in range(len(wire))]
    return slices(wire, chance, most=30)


def ways_for(body: bytes) -> list[str]:
    """Byte by byte only what is small."""
    return ["whole", "random", *(["bytes"] if len(body) < 300 else [])]


def sha(data: bytes) -> str:
    """The digest, so that a difference in megabytes does not fill the screen."""
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("version", ["1.1", "1.0"])
async def test_responses(framing: str, version: str) -> None:
    """Event streams and other bodies, in three framings, cut in three ways, to both kinds of clients."""
    bodies = {name: ("text/event-stream", body) for name, body in STREAMS.items()}
    bodies |= {name: ("application/octet-stream", body) for name, body in BODIES.items()}
    scripts: dict[str, tuple[Script, bytes]] = {}
    for name, (kind, body) in bodies.items():
        for way in ways_for(body):
            chance = random.Random(f"{name} {way}")
            sends = cut(head_of(kind, framing, len(body)) + wire_of(body, framing, chance), way, chance)
            steps = (*(Send(data) for data in sends), *((Close(),) if framing == "close" else ()))
            scripts[f"/{name}/{way}"] = (Script(steps), body)

    def answer(seen: SeenRequest) -> Script:
        return scripts[seen.target][0]

    answers: dict[str, Response] = {}
    async with ScriptedUpstream(answer) as upstream, running_gateway(settings_for(upstream.url)) as gateway:
        limit = trio.CapacityLimiter(12)

        async def ask(path: str) -> None:
            async with limit:
                answers[path] = await gateway.ask(request("GET", path, version=version))

        async with trio.open_nursery() as nursery:
            for path in scripts:
                nursery.start_soon(ask, path)
        records = {record.path: record for record in await gateway.records.wait(len(scripts))}
    for path, (_, body) in scripts.items():
        response, record = answers[path], records[path]
        assert response.status == 200
        assert response.complete, path
        assert sha(response.body) == sha(body), path
        assert record.response_bytes == len(body), path
        said_error = record.outcome is Outcome.UPSTREAM_ERROR  # some cases report one in band
        assert said_error or record.outcome is Outcome.COMPLETED, (path, record)
        streamed = response.header("content-type") == "text/event-stream"
        assert response.framing == framing_for(framing, version, streamed=streamed), path


def framing_for(framing: str, version: str, *, streamed: bool) -> str:
    """How the client is told where the body ends."""
    if framing == "length" and not streamed:
        return "length"
    return "chunked" if version == "1.1" else "close"


@pytest.mark.parametrize("way", ["length", "chunked"])
async def test_requests(way: str) -> None:
    """Request bodies of any size, in both framings, cut at random, arrive whole at an upstream that checks them."""
    bodies = {"empty": b"", "one": b"x", **BODIES, "large": random.Random(3).randbytes(7 * MIB)}
    async with strict_upstream() as upstream, running_gateway(settings_for(upstream.url)) as gateway:
        for name, body in bodies.items():
            chance = random.Random(name)
            if way == "length":
                raw = request("POST", f"/{name}", body)
            else:
                raw = request("POST", f"/{name}", None, "Transfer-Encoding: chunked")
                raw += chunked(*slices(body, chance, most=40))
            client = await gateway.connect()
            for data in slices(raw, chance, most=30):
                await client.send(data)
            assert (await client.response()).status == 200
            seen = upstream.requests[-1]
            assert seen.complete
            assert sha(seen.body) == sha(body), name
            assert (await gateway.records.wait(len(upstream.requests)))[-1].request_bytes == len(body)
        assert upstream.garbage == []
        framings = {bool(seen.all("transfer-encoding")) for seen in upstream.requests}
        assert framings == {way == "chunked"}


async def test_trailers_of_a_request() -> None:
    """A client's trailer fields arrive behind the last chunk, but for those that would change the message."""
    async with strict_upstream() as upstream, running_gateway(settings_for(upstream.url)) as gateway:
        fields = ("Transfer-Encoding: chunked", "Trailer: X-Digest")
        raw = request("POST", "/", None, *fields) + b"5\r\nhello\r\n0\r\nX-Digest: abc\r\nX-More: d\r\n\r\n"
        assert (await gateway.ask(raw)).status == 200
        assert upstream.requests[0].body == b"hello"
        assert upstream.requests[0].trailers == [("x-digest", "abc"), ("x-more", "d")]
        assert upstream.requests[0].all("trailer") == ["X-Digest"]


async def test_trailers_of_a_response() -> None:
    """An upstream's trailer fields arrive behind the last chunk; an HTTP/1.0 client gets the body without them."""
    wire = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n"
    async with scene(Script((Send(wire),))) as (_, gateway):
        modern = await gateway.ask(request("GET", "/"))
        assert modern.body == b"hello"
        assert modern.trailers == [("x-sum", "1")]
        assert modern.header("trailer") == "X-Sum"
        old = await gateway.ask(request("GET", "/", version="1.0"))
        assert old.complete
        assert old.body == b"hello"
        assert old.header("trailer") is None


@pytest.mark.parametrize(
    ("method", "wire"),
    [
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\nETag: x\r\n\r\n"),
        ("HEAD", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nETag: x\r\n\r\n"),
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nETag: x\r\n\r\n"),
        ("GET", b"HTTP/1.1 204 No Content\r\nETag: x\r\n\r\n"),
        ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5000\r\nETag: x\r\n\r\n"),
    ],
    ids=["head", "head-chunked", "head-stream", "204", "304"],
)
async def test_responses_without_a_body(method: str, wire: bytes) -> None:
    """Nothing follows their head, whatever it announces, and both connections go on."""
    async with scene(Script((Send(wire),))) as (upstream, gateway):
        client = await gateway.connect()
        for _ in range(3):
            await client.send(request(method, "/"))
            response = await client.response(method)
            assert response.complete
            assert response.header("etag") == "x"
            assert response.header("connection") is None
        assert len(upstream.connections) == 1
        assert client.buffer == b""
        for record in await gateway.records.wait(3):
            assert record.outcome is Outcome.COMPLETED
            assert record.response_bytes == 0


async def test_informational_heads() -> None:
    """103 Early Hints reach the client before the final head exists; an HTTP/1.0 client is spared them."""
    go = trio.Event()
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\n"
    async with scene(Script((Send(hints), WaitFor(go), Send(OK)))) as (_, gateway):
        client = await gateway.connect()
        await client.send(request("GET", "/"))
        early = await client.head()
        assert early.status == 103
        assert early.header("link") == "</style.css>"
        go.set()
        assert (await client.response()).status == 200
        old = await gateway.ask(request("GET", "/", version="1.0"))
        assert old.status == 200
        assert old.informational == []


@pytest.mark.parametrize("continues", [True, False], ids=["client-goes-on", "client-stops"])
async def test_early_refusal_during_the_upload(continues: bool) -> None:
    """An upstream's 413 reaches the client while it still uploads, whole, and says that the connection closes."""
    refusal = openai_error(413, "too much", code="too_large")
    early = Script((*refusal.steps, Stall()), body="never")
    async with scene(early) as (upstream, gateway):
        client = await gateway.connect()
        await client.send(request("POST", "/v1/files", None, "Content-Length: 50000000") + b"x" * 100_000)
        response = await client.response()
        assert response.status == 413
        assert response.body == refusal.payload
        assert response.complete
        assert response.header("connection") == "close"
        if continues:
            await client.send(b"x" * 300_000)
        assert await client.rest() == b""
        record = await gateway.records.one()
        assert record.outcome is Outcome.COMPLETED
        assert record.status == 413
        await upstream.until(lambda: upstream.connections[0].left is not None)


async def test_answer_that_overtakes_the_upload() -> None:
    """An upstream may answer with a stream while the upload goes on; both arrive whole, then the connection closes."""
    body = random.Random(4).randbytes(600_000)
    seen: list[bytes] = []

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            data = b""
            while b"\r\n\r\n" not in data:
                data += await stream.receive_some()
            received = data.partition(b"\r\n\r\n")[2]
            await stream.send_all(head_of("text/event-stream", "chunked", 0))
            while len(received) < len(body):
                received += await stream.receive_some()
                await stream.send_all(chunked(b"data: %d\n\n" % len(received), end=False))
            seen.append(received)
            await stream.send_all(chunked(b"data: [DONE]\n\n"))

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, serve, listeners)
        async with running_gateway(settings_for(url)) as gateway:
            client = await gateway.connect()
            await client.send(request("POST", "/", None, f"Content-Length: {len(body)}") + body[:100_000])
            head = await client.final_head()
            assert head.header("connection") == "close"
            async with trio.open_nursery() as both:
                both.start_soon(client.send, body[100_000:])
                await client.body(head)
            assert head.complete
            assert head.body.endswith(b"data: 600000\n\ndata: [DONE]\n\n")
            assert sha(seen[0]) == sha(body)
            assert (await gateway.records.one()).outcome is Outcome.COMPLETED
        nursery.cancel_scope.cancel()


async def test_pipelined_responses_come_in_order() -> None:
    """Pipelined requests with bodies are answered one after the other, each with its own bytes."""

    def echo(seen: Recorded) -> bytes:
        body = b"%s:%d" % (seen.target.encode(), len(seen.body))
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)

    async with strict_upstream(echo) as upstream, running_gateway(settings_for(upstream.url)) as gateway:
        client = await gateway.connect()
        sizes = [0, 1, 70_000, 5, 300_000, 2]
        raw = b"".join(request("POST", f"/{index}", b"x" * size) for index, size in enumerate(sizes))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.send, raw)
            for index, size in enumerate(sizes):
                response = await client.response()
                assert response.body == b"/%d:%d" % (index, size)
        assert len(upstream.raw) == 1, "the upstream's connection was not used again"


@pytest.mark.parametrize("version", ["1.1", "1.0"])
async def test_keep_alive(version: str) -> None:
    """A connection is used again as its version says: 1.1 unless told otherwise, 1.0 only when asked for."""
    async with strict_upstream() as upstream, running_gateway(settings_for(upstream.url)) as gateway:
        client = await gateway.connect()
        keep = ("Connection: keep-alive",) if version == "1.0" else ()
        for _ in range(3):
            await client.send(request("GET", "/", None, *keep, version=version))
            response = await client.response()
            assert response.body == b"ok"
            assert response.header("connection") == ("keep-alive" if version == "1.0" else None)
        close = () if version == "1.0" else ("Connection: close",)
        await client.send(request("GET", "/", None, *close, version=version))
        assert (await client.response()).header("connection") == "close"
        assert await client.rest() == b""
        assert client.ended_by == "fin"
        assert len(await gateway.records.wait(4)) == 4
        assert upstream.garbage == []


async def test_chat_request_reaches_the_upstream_as_it_was() -> None:
    """The body of a chat is not touched, not even its white space; `accept-encoding` asks for no compression."""
    body = b'{ "model" : "m",\r\n "stream": true, "messages": [ {"role":"user", "content":"\xc3\xa9\\u00e9"} ]  }\n'
    seen: list[Recorded] = []

    def answer(recorded: Recorded) -> bytes:
        seen.append(recorded)
        return OK

    async with strict_upstream(answer) as upstream, running_gateway(settings_for(upstream.url)) as gateway:
        fields = ("Content-Type: application/json", "Accept-Encoding: gzip, br")
        await gateway.ask(request("POST", "/v1/chat/completions", body, *fields))
        await gateway.ask(chat())
        assert seen[0].body == body
        assert seen[0].all("accept-encoding") == ["identity"]
