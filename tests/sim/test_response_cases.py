"""The byte-level response cases through the whole gateway in the simulated network: whole, byte by byte, cut at random.

`tests/net/test_http_upstream_cases.py` runs them as they are over real sockets. Here every send is cut further, on both
paths, and whatever the upstream said, the next request must get an answer of its own.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import trio
import trio.testing
from kit import request
from response_cases import AFTER, CASES, judge
from simkit import Conversation, World, world

from canal_trio.settings import Deadlines

WAYS = ("whole", "bytes", "cut")
GAP = 0.001  # virtual seconds between two sends, so that each arrives alone


def pieces_of(data: bytes, way: str) -> list[bytes]:
    """The bytes as they are sent, the same cuts every time."""
    if way == "whole":
        return [data]
    if way == "bytes":
        return [data[at : at + 1] for at in range(len(data))]
    chance = random.Random(data)
    cuts = sorted({0, len(data), *(chance.randrange(len(data) + 1) for _ in range(chance.randrange(1, 9)))})
    return [data[start:end] for start, end in itertools.pairwise(cuts)]


class Player:
    """Plays the case's steps for its request, and answers any other plainly."""

    def __init__(self, case: dict[str, Any], way: str) -> None:
        self.steps = case["upstream"]
        self.way = way
        self.attempts: list[int] = []  # the connection of each asking of the case
        self.others: list[int] = []
        self.played = trio.Event()

    async def play(self, upstream: Conversation) -> None:
        """Answer one request."""
        if b"/case" not in upstream.requests[-1].partition(b"\r\n")[0]:
            self.others.append(upstream.number)
            await upstream.say(AFTER)
            return
        self.attempts.append(upstream.number)
        try:
            for kind, *argument in self.steps:
                if kind == "send":
                    for piece in pieces_of(argument[0].encode("latin-1"), self.way):
                        await upstream.say(piece)
                        await trio.sleep(GAP)
                elif kind == "wait":
                    await trio.sleep(argument[0])
                else:
                    if kind == "hang":
                        await upstream.stream.receive_some()
                    upstream.stream.close()
                    return
        finally:
            self.played.set()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in CASES])
async def test_response_case_in_the_simulation(
    case: dict[str, Any], way: str, handover: bool, autojump_clock: trio.testing.MockClock
) -> None:
    """The client sees what the case says, however it was cut, and no doubtful connection is used again."""
    check = case["check"]
    player = Player(case, way)
    deadlines = Deadlines(first_byte=0.5) if check.get("timeout") else Deadlines()
    async with world(player.play, handover=handover, deadlines=deadlines) as here:
        data = case["request"].encode("latin-1")
        client = here.connect()
        await client.send(data)
        response = await client.response(data.partition(b" ")[0].decode())
        await player.played.wait()
        judge(check, response, client)
        record = (await here.records.wait(1))[0]
        assert record.status == response.status
        assert record.attempts == len(player.attempts)
        assert check["attempts"] in (None, len(player.attempts))
        assert len(player.attempts) == 1 or case["retry_ok"]
        await trio.testing.wait_all_tasks_blocked()
        await next_one_is_whole(here)
        if check["reused"] is not None:
            assert (player.others[0] in player.attempts) == check["reused"]
        if check["reused"] is False:
            assert all(here.conversations[number].left is not None for number in player.attempts)


async def next_one_is_whole(here: World) -> None:
    """Another client's request gets its own answer."""
    other = here.connect()
    await other.send(request("GET", "/after"))
    after = await other.response()
    assert (after.status, after.body) == (200, b"after")
