"""How many TLS handshakes there are at once, who waits, and that those who stop half way keep nobody out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from serve_fakes import read_all
from tls_kit import Authority, ask, fronting, until

from canal_trio.serve.handshakes import HURRY, STEPS, Handshakes
from canal_trio.settings import Bounds, Deadlines
from canal_trio.testing.scripts import chat_stream, stream

HALF = b"\x16\x03\x01\x02\x00\x01"  # the first bytes of a ClientHello


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """Whom the clients trust."""
    return Authority(tmp_path)


class Stuck:
    """Handshakes that never get anywhere, each within ten seconds."""

    def __init__(self, shakes: Handshakes, nursery: trio.Nursery) -> None:
        self.shakes = shakes
        self.nursery = nursery
        self.over: dict[str, float] = {}
        self.begun: list[str] = []
        self.start_time = trio.current_time()

    def start(self, name: str) -> None:
        """One more."""
        self.nursery.start_soon(self._run, name)

    async def _run(self, name: str) -> None:
        with trio.move_on_after(10) as scope:
            await self.shakes.begin(scope)
            self.begun.append(name)
            try:
                await trio.sleep_forever()
            finally:
                self.shakes.end(scope)
        self.over[name] = trio.current_time() - self.start_time


async def test_alone_a_handshake_has_its_deadline(autojump_clock: Any) -> None:
    """As long as nobody waits, nobody is hurried."""
    async with trio.open_nursery() as nursery:
        stuck = Stuck(Handshakes(2), nursery)
        stuck.start("a")
        stuck.start("b")
        await trio.sleep(5)
        assert stuck.shakes.running == 2
    assert stuck.over == {"a": pytest.approx(10), "b": pytest.approx(10)}
    assert (stuck.shakes.running, stuck.shakes.waiting) == (0, 0)


async def test_while_others_wait_each_has_a_second(autojump_clock: Any) -> None:
    """Who has had it goes at once, the line moves on in its order, and its last one has all the time again."""
    async with trio.open_nursery() as nursery:
        stuck = Stuck(Handshakes(1), nursery)
        stuck.start("a")
        await trio.sleep(3)
        for name in "bcd":
            stuck.start(name)
            await trio.testing.wait_all_tasks_blocked()
        assert stuck.begun == ["a", "b"]
        assert stuck.shakes.waiting == 2
    assert stuck.begun == list("abcd")
    # d's deadline counts from when it came.
    expected = {"a": 3, "b": 3 + HURRY, "c": 3 + 2 * HURRY, "d": 13}
    assert stuck.over == {name: pytest.approx(at, abs=0.01) for name, at in expected.items()}


async def test_the_wait_counts_too(autojump_clock: Any) -> None:
    """Who waits for longer than the deadline is over without having begun, and leaves nothing in the books."""
    async with trio.open_nursery() as nursery:
        stuck = Stuck(Handshakes(1), nursery)
        for number in range(15):
            stuck.start(str(number))
        await trio.sleep(10.5)
        assert (stuck.shakes.running, stuck.shakes.waiting) == (0, 0)
        assert len(stuck.over) == 15
        assert 9 <= len(stuck.begun) <= 11
        stuck.shakes.resize(2)
        stuck.start("x")
        stuck.start("y")
        await trio.sleep(5)
        assert stuck.shakes.running == 2


async def test_few_begin_in_one_turn(autojump_clock: Any) -> None:
    """Between two turns of a stream at most `STEPS` handshakes begin, however many came at once."""
    async with trio.open_nursery() as nursery:
        stuck = Stuck(Handshakes(1000), nursery)
        for number in range(20 * STEPS):
            stuck.start(str(number))
        most, before = 0, 0
        while len(stuck.begun) < 20 * STEPS:
            await trio.lowlevel.checkpoint()
            most, before = max(most, len(stuck.begun) - before), len(stuck.begun)
        # The order of a turn's tasks is a coin's: what began in two turns may be seen in one.
        assert STEPS <= most <= 2 * STEPS
        nursery.cancel_scope.cancel()


# -- real ones ---------------------------------------------------------------------------------------------------------


async def test_clients_that_stop_half_way_keep_nobody_out(authority: Authority) -> None:
    """Every place is taken by one of them, more wait in line: a client that means it is served all the same."""
    bounds, deadlines = Bounds(tls_handshakes=3), Deadlines(tls_handshake=300)
    async with fronting(authority, chat_stream(1), bounds=bounds, deadlines=deadlines) as (_, server):
        for _ in range(5):
            await (await server.connect()).send_all(HALF)
        with trio.fail_after(60):  # of the 300 s that each of them would have, were it alone
            client = await server.secure()
        await client.send_all(ask())
        assert b"[DONE]" in await until(client, b"0\r\n\r\n")
        assert await server.shaken("timeout") >= 3
        assert 0 <= await server.metric("canal_tls_handshakes_running") <= 3
        assert await server.metric("canal_tls_handshakes_waiting") == 0


async def test_streams_flow_while_handshakes_stall(authority: Authority) -> None:
    """A stream inside TLS gets all its events while a hundred handshakes stop half way, are ended, and come again."""
    events = [b"data: %d\n\n" % number for number in range(100)]
    bounds, deadlines = Bounds(tls_handshakes=16), Deadlines(tls_handshake=0.2)
    async with fronting(authority, stream(events, gap=0.01), bounds=bounds, deadlines=deadlines) as (_, server):
        client = await server.secure()
        await client.send_all(ask())
        ended = 0

        async def stop_half_way() -> None:
            nonlocal ended
            while True:
                one = await server.connect()
                await one.send_all(HALF)
                assert await read_all(one) == b""
                await one.aclose()
                ended += 1

        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(stop_half_way)
            answer = await until(client, b"0\r\n\r\n")
            nursery.cancel_scope.cancel()
        assert answer.count(b"data: ") == 100
        assert ended > 0
        assert "Traceback" not in server.log()
