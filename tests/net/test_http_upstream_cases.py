"""The byte-level response cases, over real sockets: what the client sees, and whether the connection is used again."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
from kit import Client, Response, eventually, request, running_gateway, settings_for
from response_cases import AFTER, CASES, judge

from canal_trio.settings import Deadlines

# Cases whose expectation is believed wrong, with what says otherwise.
DISPUTED: dict[str, str] = {}


@dataclass
class Player:
    """An upstream that plays the case's steps for its request, and answers any other plainly."""

    steps: list[list[Any]]
    port: int = 0
    attempts: list[int] = field(default_factory=list)  # the connection of each asking of the case
    others: list[int] = field(default_factory=list)
    connections: int = 0
    left: set[int] = field(default_factory=set)
    played: trio.Event = field(default_factory=trio.Event)
    sends: list[float] = field(default_factory=list)

    async def serve(self, stream: trio.SocketStream) -> None:
        """One connection."""
        number = self.connections
        self.connections += 1
        try:
            async with stream:
                while await self.exchange(stream, number):
                    pass
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            self.left.add(number)

    async def exchange(self, stream: trio.SocketStream, number: int) -> bool:
        """One request. False: the connection is over."""
        raw = b""
        while b"\r\n\r\n" not in raw or (b"Content-Length: 5" in raw and not raw.endswith(b"hello")):
            data = await stream.receive_some()
            if not data:
                return False
            raw += data
        if b"/case" not in raw.partition(b"\r\n")[0]:
            self.others.append(number)
            await stream.send_all(AFTER)
            return True
        self.attempts.append(number)
        try:
            for kind, *argument in self.steps:
                if kind == "send":
                    self.sends.append(trio.current_time())
                    await stream.send_all(argument[0].encode("latin-1"))
                elif kind == "wait":
                    await trio.sleep(argument[0])
                elif kind == "hang":
                    await stream.receive_some()
                    return False
                else:
                    return False
        finally:
            self.played.set()
        return True


@asynccontextmanager
async def playing(steps: list[list[Any]]) -> AsyncIterator[Player]:
    """The player on loopback for the block."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    player = Player(steps, listeners[0].socket.getsockname()[1])
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, player.serve, listeners)
        yield player
        nursery.cancel_scope.cancel()


async def watch(client: Client, prefixes: list[str], arrivals: list[float], method: str, version: str) -> Response:
    """The response, noting when each prefix of the body was complete at the client."""
    head = await client.final_head()
    if not prefixes:
        await client.body(head, method)
        return head
    async with trio.open_nursery() as nursery:

        async def look() -> None:
            seen = ""
            for prefix in prefixes:
                seen += prefix
                # Chunk framing stands between the events, so each is looked for by itself.
                await eventually(lambda wanted=prefix: wanted.encode() in client.seen)
                arrivals.append(trio.current_time())

        nursery.start_soon(look)
        await client.body(head, method)
    return head


@pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in CASES])
async def test_response_case(case: dict[str, Any]) -> None:
    """The client sees what the case says, nothing looks finished that is not, and no doubtful connection is reused."""
    check = case["check"]
    deadlines = Deadlines(first_byte=0.5) if check.get("timeout") else Deadlines()
    data = case["request"].encode("latin-1")
    method = data.partition(b" ")[0].decode()
    arrivals: list[float] = []
    async with playing(case["upstream"]) as player:
        settings = settings_for(f"http://127.0.0.1:{player.port}", deadlines=deadlines)
        async with running_gateway(settings) as gateway:
            with trio.fail_after(10):
                client = await gateway.connect()
                await client.send(data)
                version = "1.0" if b"HTTP/1.0" in data else "1.1"
                response = await watch(client, check.get("streaming", []), arrivals, method, version)
                await player.played.wait()
                record = (await gateway.records.wait(1))[0]
                judge(check, response, client)
                if check["attempts"] is not None:
                    assert len(player.attempts) == check["attempts"]
                assert len(player.attempts) == 1 or case["retry_ok"]
                for index, arrived in enumerate(arrivals):
                    assert arrived < player.sends[index + 1], "an event came after the next one was sent"
                after = await gateway.ask(request("GET", "/after"))
                assert (after.status, after.body) == (200, b"after")
                if check["reused"] is not None:
                    assert (player.others[0] in player.attempts) == check["reused"]
                if check["reused"] is False:
                    await eventually(lambda: set(player.attempts) <= player.left, "a doubtful connection is kept")
                assert record.attempts == len(player.attempts)
                assert record.status == response.status


def test_all_cases_are_here() -> None:
    """34 cases, each with a unique name."""
    assert len({case["name"] for case in CASES}) == len(CASES) == 34
    assert set(DISPUTED) <= {case["name"] for case in CASES}
