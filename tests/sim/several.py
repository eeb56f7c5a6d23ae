"""Several simulated upstreams behind one gateway: who does what, by name, and the usual ways to misbehave."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import trio
import trio.testing
from kit import request
from rawclient import Response
from simkit import OK, SSE, Conversation, Play, World, world

from canal_trio.settings import Upstream

__all__ = [
    "ERROR_AMONG_OTHERS",
    "ERROR_EVENT",
    "EVENT",
    "answers",
    "asked",
    "error_first",
    "hello",
    "named",
    "ok",
    "refuses",
    "several",
    "silent",
    "streams",
    "talk",
    "vanishes",
]

EVENT = b'data: {"choices":[]}\n\n'
ERROR_AMONG_OTHERS = (  # as OpenRouter sends it
    b'data: {"id":"gen-1","object":"chat.completion.chunk","created":1,"model":"m","provider":"p","error":{"code":502,'
    b'"message":"Provider disconnected"},"choices":[{"index":0,"delta":{"content":""},"finish_reason":"error"}]}\n\n'
)
ERROR_EVENT = b'data: {"error":{"message":"no memory","type":"server_error","param":null,"code":null}}\n\n'
DONE = b"data: [DONE]\n\n"


def named(count: int, **options: Any) -> tuple[Upstream, ...]:
    """u0, u1, … with these options."""
    return tuple(Upstream(f"u{number}", f"http://u{number}.test/v1", **options) for number in range(count))


def hello(text: str = "hi", *fields: str, stream: bool = True) -> bytes:
    """A chat request that says so."""
    body = {"model": "m", "stream": stream, "messages": [{"role": "user", "content": text}]}
    fields = ("Content-Type: application/json", *fields)
    return request("POST", "/v1/chat/completions", json.dumps(body).encode(), *fields)


@asynccontextmanager
async def several(
    plays: Mapping[str, Play], *upstreams: Upstream, handover: bool, **settings: Any
) -> AsyncIterator[World]:
    """A gateway before `upstreams` (as many as there are plays, if none are given). A play may be exchanged."""
    chosen = upstreams or named(len(plays))

    async def play(conversation: Conversation) -> None:
        await plays[conversation.upstream](conversation)

    async with world(play, handover=handover, upstreams=chosen, **settings) as here:
        yield here


async def talk(here: World, raw: bytes = b"") -> Response:
    """One exchange on a connection of its own."""
    client = here.connect()
    await client.send(raw or hello())
    response = await client.response()
    client.stream.close()  # type: ignore[attr-defined]  # a simulated stream
    await trio.testing.wait_all_tasks_blocked()  # its record is there
    return response


def asked(here: World) -> Counter[str]:
    """How many requests each upstream got."""
    counts: Counter[str] = Counter()
    for conversation in here.conversations:
        counts[conversation.upstream] += len(conversation.requests)
    return counts


# -- what upstreams do -------------------------------------------------------------------------------------------------


async def ok(upstream: Conversation) -> None:
    """A small answer."""
    await upstream.say(OK)


def answers(status: int, *fields: bytes, body: bytes = b"{}") -> Play:
    """A whole answer of that status."""

    async def play(upstream: Conversation) -> None:
        lines = b"".join(b"%b\r\n" % field for field in fields)
        await upstream.say(b"HTTP/1.1 %d X\r\n%bContent-Length: %d\r\n\r\n%b" % (status, lines, len(body), body))

    return play


refuses = answers(503)


async def silent(_upstream: Conversation) -> None:
    """No answer."""
    await trio.sleep_forever()


async def vanishes(upstream: Conversation) -> None:
    """It closes without a word."""
    upstream.stream.close()


def streams(*events: bytes, done: bool = True, gap: float = 0.0, cut: bool = False) -> Play:
    """These events, `gap` seconds apart, and the end, or a cut in its place."""

    async def play(upstream: Conversation) -> None:
        await upstream.say(SSE)
        for event in events:
            await trio.sleep(gap)
            await upstream.chunk(event)
        if cut:
            upstream.stream.close()
            return
        if done:
            await upstream.chunk(DONE)
        await upstream.say(b"0\r\n\r\n")

    return play


error_first = streams(ERROR_EVENT, done=False)
