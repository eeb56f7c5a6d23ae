"""Hostile clients on real sockets, with short deadlines: each kind is got rid of, and good streams keep flowing.

Progress is what counts: a good stream gets every event while the attackers come again and again; no time is measured.
"""

from __future__ import annotations

import contextlib
import errno
import json
import select
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing
from serve_fakes import Running, eventually, read_all, serving, settings

from canal_trio.gateway import Gateway
from canal_trio.hooks import ExchangeRecord
from canal_trio.settings import Bounds, Deadlines, Upstream
from canal_trio.testing.scripts import Forever, Script, Send, stream
from canal_trio.testing.upstreams import ScriptedUpstream, by_model

ATTACKERS = 12
STREAMS = 3
EVENTS = [b"data: %d\n\n" % number for number in range(40)]
GOOD = stream(EVENTS, gap=0.01)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b"data: " + b"x" * 8000 + b"\n\n"
FLOOD = Script((Send(HEAD), Forever((Send(b"%x\r\n%b\r\n" % (len(EVENT), EVENT)),))))
QUICK = Deadlines(request_head=1, keep_alive=1, body_idle=1, client_write=1, linger=0.2)


def chat(model: str) -> bytes:
    """A chat request."""
    body = json.dumps({"model": model, "stream": True}).encode()
    fields = f"Host: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return f"POST /v1/chat/completions HTTP/1.1\r\n{fields}\r\n\r\n".encode() + body


class Records(list[ExchangeRecord]):
    """A recorder."""

    finished = list.append


Attack = Callable[[Running], Awaitable[str]]


async def dribbled(client: trio.SocketStream, data: bytes) -> str:
    """Send a byte now and then, until the gateway has had enough; the status line it says so with."""

    async def send() -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            for byte in data:
                await client.send_all(bytes([byte]))
                await trio.sleep(0.02)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        answer = await read_all(client)
        nursery.cancel_scope.cancel()
    return answer.split(b"\r\n")[0].decode()


async def slow_head(server: Running) -> str:
    """One byte of a head at a time, for ever."""
    return await dribbled(await server.connect(), b"GET / HTTP/1.1\r\nX: " + b"x" * 10_000)


async def slow_body(server: Running) -> str:
    """One byte of a body at a time."""
    client = await server.connect()
    await client.send_all(b"POST /v1/files HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n")
    return await dribbled(client, b"x" * 10_000)


async def half_a_body(server: Running) -> str:
    """A body that stops."""
    client = await server.connect()
    await client.send_all(b"POST /v1/files HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 100_000)
    return (await read_all(client)).split(b"\r\n")[0].decode()


async def silent(server: Running) -> str:
    """Nothing at all."""
    return (await read_all(await server.connect())).decode()


async def never_reading(server: Running) -> str:
    """Asks for a flood and does not look at it; its window is as small as can be."""
    client = await server.connect()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await client.send_all(chat("flood"))
    poll = select.poll()
    poll.register(client.socket.fileno(), 0)  # errors and hang-ups are always reported
    await eventually(lambda: poll.poll(0), 20)
    error = client.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return "reset" if error == errno.ECONNRESET else errno.errorcode.get(error, str(error))


async def garbage(server: Running) -> str:
    """What is no HTTP."""
    client = await server.connect()
    await client.send_all(b"\x00\xff" * 5000)
    return (await read_all(client)).split(b"\r\n")[0].decode()


async def connect_and_go(server: Running) -> str:
    """As many connections as a machine can make."""
    for _ in range(20):
        client = await server.connect()
        client.socket.close()
    return "gone"


async def request_and_go(server: Running) -> str:
    """A request, and away before its answer."""
    client = await server.connect()
    await client.send_all(chat("flood"))
    await trio.sleep(0.01)
    client.socket.close()
    return "gone"


TIMED_OUT = "HTTP/1.1 408 Request Timeout"
ATTACKS: dict[str, tuple[Attack, str]] = {
    "slow head": (slow_head, TIMED_OUT),
    "slow body": (slow_body, TIMED_OUT),
    "half a body": (half_a_body, TIMED_OUT),
    "silent": (silent, ""),
    "never reading": (never_reading, "reset"),
    "garbage": (garbage, "HTTP/1.1 400 Bad Request"),
    "connect and go": (connect_and_go, "gone"),
    "request and go": (request_and_go, "gone"),
}


async def good_stream(server: Running) -> None:
    """It asks, and gets every event."""
    client = await server.connect()
    await client.send_all(chat("good"))
    answer = b""
    while not answer.endswith(b"0\r\n\r\n"):
        piece = await client.receive_some()
        assert piece, f"cut after {answer[-100:]!r}"
        answer += piece
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert [line for line in answer.splitlines() if line.startswith(b"data: ")] == [event.strip() for event in EVENTS]
    await client.aclose()


async def besieged(attack: Attack, expected: str, **more: Any) -> None:
    """Good streams, while attackers come again and again; at the end nothing is left of anybody."""
    outcomes: Counter[str] = Counter()
    records = Records()
    async with ScriptedUpstream(by_model({"good": GOOD, "flood": FLOOD})) as upstream:
        chosen = settings(**{"upstreams": (Upstream("up", upstream.url),), "deadlines": QUICK} | more)
        async with serving(
            chosen, make_gateway=lambda chosen, recorders: Gateway(chosen, recorders=[*recorders, records])
        ) as server:
            async with trio.open_nursery() as attackers:

                async def attacker() -> None:
                    while True:
                        outcomes[await attack(server)] += 1
                        await trio.sleep(0.02)  # both sides share one core here: the attackers' own work is no attack

                for _ in range(ATTACKERS):
                    attackers.start_soon(attacker)
                await eventually(lambda: outcomes)
                async with trio.open_nursery() as streams:
                    for _ in range(STREAMS):
                        streams.start_soon(good_stream, server)
                attackers.cancel_scope.cancel()
            assert set(outcomes) == {expected}, outcomes
            for client in server.clients:
                client.socket.close()
            await eventually(lambda: server.gateway.statistics().connections == 0, 20)
            statistics = server.gateway.statistics()
            assert (statistics.in_flight, statistics.held_bytes) == (0, 0)
            assert "Traceback" not in server.log()
    good = [record for record in records if record.model == "good"]
    assert [record.events for record in good] == [len(EVENTS)] * STREAMS


@pytest.mark.parametrize("kind", ATTACKS)
async def test_good_streams_flow_under_attack(kind: str) -> None:
    """Whatever the others do: each good stream gets every event, each attacker its end, and nothing of it stays."""
    await besieged(*ATTACKS[kind])


async def test_a_full_door_opens_for_who_asks() -> None:
    """Silent clients hold every connection, with hours to go: they make room, and good streams are served."""
    bounds = Bounds(client_connections=30)
    deadlines = Deadlines(keep_alive=7200)
    async with ScriptedUpstream(GOOD) as upstream:
        chosen = settings(upstreams=(Upstream("up", upstream.url),), bounds=bounds, deadlines=deadlines)
        async with serving(
            chosen, make_gateway=lambda chosen, recorders: Gateway(chosen, recorders=recorders)
        ) as server:
            for _ in range(60):
                await server.connect()
            with trio.fail_after(60):
                await good_stream(server)
            page = (await server.page("/metrics"))[1].decode()
            closed = float(page.partition('canal_connections_shed_total{cause="idle"} ')[2].split("\n")[0])
            assert closed >= 30
            assert server.gateway.statistics().connections <= 30
