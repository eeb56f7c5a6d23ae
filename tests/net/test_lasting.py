"""What a stream that goes on for long keeps: what its end asks for, and nothing of how it came about.

Thousands of them wait in one worker, so what one keeps is memory by the megabyte. Looked at with what the collector
knows: everything of ours, and what it refers to.
"""

from __future__ import annotations

import gc
import types
from collections import Counter
from collections.abc import Iterator

import trio
from kit import chunked, eventually, request, scene

from canal_trio.hooks import Outcome
from canal_trio.testing.scripts import Script, Send, WaitFor

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nX-Answer: %b\r\nTransfer-Encoding: chunked\r\n\r\n"
FIELD, BODY, ANSWER = b"said-in-a-field", b"said-in-the-body", b"said-in-the-answer"
ASKED = request(
    "POST",
    "/v1/chat/completions",
    b'{"model": "m", "messages": "%b"}' % BODY,
    "Content-Type: application/json",
    f"X-Note: {FIELD.decode()}",
)
SUSPENDED = types.CoroutineType | types.GeneratorType
CONTAINERS = tuple | list | dict | set | types.MethodType | types.CellType


def ours(thing: object) -> str | None:
    """What to call `thing`, an object or a suspended function, if it is the product's."""
    if isinstance(thing, SUSPENDED):
        code = thing.cr_code if isinstance(thing, types.CoroutineType) else thing.gi_code
        where, name = code.co_filename.replace("/", "."), code.co_qualname
    else:
        where, name = f".{type(thing).__module__}.", type(thing).__qualname__
    return name if ".canal_trio." in where and ".canal_trio.testing." not in where else None


def texts(thing: object, depth: int = 0) -> Iterator[bytes]:
    """The bytes that `thing` refers to, also by containers."""
    for part in gc.get_referents(thing):
        if isinstance(part, bytes):
            yield part
        elif isinstance(part, CONTAINERS) and depth < 4:
            yield from texts(part, depth + 1)


def holders(*marks: bytes) -> Counter[str]:
    """Who of ours keeps bytes with one of `marks` in them."""
    return Counter(
        name
        for thing in gc.get_objects()
        if (name := ours(thing)) is not None and any(mark in text for text in texts(thing) for mark in marks)
    )


async def test_thousands_of_idle_streams_keep_the_heads_of_their_requests() -> None:
    """While an answer goes on, nothing of ours refers to the fields of its request, to its body, or to its own head.

    Before that something does, or the test would see nothing; and a head that was forgotten is read anew, whole.
    """
    begin, go = trio.Event(), trio.Event()
    first, event = HEAD % ANSWER, b"data: 1\n\n"
    steps = WaitFor(begin), Send(first + chunked(event, end=False), event), WaitFor(go), Send(chunked(event), event)
    async with scene(Script(steps)) as (upstream, gateway):
        client = await gateway.connect()
        await client.send(ASKED)
        await eventually(lambda: upstream.requests and upstream.requests[0].complete)
        assert holders(FIELD)
        assert holders(BODY)
        begin.set()
        await client.until(event)
        assert holders(FIELD, BODY, ANSWER) == {}
        (view,) = gateway.gateway.exchanges()
        assert (view.method, view.path, view.phase) == ("POST", "/v1/chat/completions", "stream")
        go.set()
        await client.until(b"0\r\n\r\n")
        await client.send(ASKED)
        await client.until(b"0\r\n\r\n")
        assert [seen.header("x-note") for seen in upstream.requests] == [FIELD.decode()] * 2
        for record in await gateway.records.wait(2):
            assert (record.method, record.path, record.model) == ("POST", "/v1/chat/completions", "m")
            assert record.outcome is Outcome.COMPLETED
