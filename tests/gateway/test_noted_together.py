"""The exchanges of one round are noted together, before anything of them goes upstream; who cannot be noted fails."""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import final

import pytest
import trio
from kit import waiting_to_send

from canal_trio.errors import Failure, Kind, Phase, Side
from canal_trio.gateway.booking import Booking
from canal_trio.gateway.core import Gateway
from canal_trio.gateway.exchange import Exchange
from canal_trio.hooks import Admitted, ExchangeRecord, Outcome
from canal_trio.messages import RequestHead
from canal_trio.relay import TcpStream
from canal_trio.relay.course import later
from canal_trio.settings import Settings, Upstream

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
FULL = Failure(Side.GATEWAY, Phase.ROUTE, Kind.UNBOOKED, "Full.")
MANY = 5


@final
class Here:
    """A gateway with its books and its recorder, `MANY` clients that keep their connections, and an upstream."""

    def __init__(self) -> None:
        self.asked = 0  # requests that the upstream has seen
        self.calls: list[tuple[int, int]] = []  # of `admitted`: of how many, and what the upstream had seen by then
        self.room = 10**9  # exchanges that the books take
        self.fails = self.forgets = False
        self.entries: list[str] = []
        self.over: dict[int, ExchangeRecord] = {}
        self.records: list[ExchangeRecord] = []
        upstreams = (Upstream("u", "http://upstream"),)
        self.gateway = Gateway(Settings(upstreams=upstreams), recorders=[self], dialer=self._dial)
        self.gateway.keep_books(self)
        self.clients: list[socket.socket] = []
        self._nursery: trio.Nursery

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Here]:
        """All of it, warm: each client has had one answer over a connection that is kept."""
        async with trio.open_nursery() as self._nursery:
            await self._nursery.start(self.gateway.run)
            for _ in range(MANY):
                ours, theirs = socket.socketpair()
                self.clients.append(ours)
                self._nursery.start_soon(self.gateway.handle, TcpStream(theirs))
            await self.ask_all()
            self.asked, self.entries, self.calls = 0, [], []
            self.over.clear()
            self.records.clear()
            yield self
            for client in self.clients:
                client.close()
            self._nursery.cancel_scope.cancel()

    async def ask_all(self) -> list[bytes]:
        """Each client asks in the same step; the answers."""
        for client in self.clients:
            client.send(b"POST /v1/x HTTP/1.1\r\nHost: gw\r\nContent-Length: 2\r\n\r\n{}")
        with trio.fail_after(10):
            return [await self._answer(client) for client in self.clients]

    async def _answer(self, client: socket.socket) -> bytes:
        await trio.lowlevel.wait_readable(client)
        return client.recv(10_000)

    async def _dial(self, _upstream: Upstream) -> TcpStream:
        ours, theirs = socket.socketpair()
        self._nursery.start_soon(self._serve, trio.SocketStream(trio.socket.from_stdlib_socket(theirs)))
        return TcpStream(ours)

    async def _serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            async for request in stream:
                self.asked += request.count(b"POST")
                await stream.send_all(ANSWER)

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def admitted(self, exchanges: Sequence[Admitted]) -> Sequence[int | Failure]:
        """As books."""
        self.calls.append((len(exchanges), self.asked))
        if self.fails:
            raise ZeroDivisionError
        first = len(self.entries)
        self.entries += [exchange.request_id for exchange in exchanges[: self.room]]
        taken = range(first, len(self.entries))
        return [] if self.forgets else [*taken, *[FULL] * (len(exchanges) - len(taken))]

    def ended(self, endings: Sequence[tuple[int, ExchangeRecord]]) -> None:
        """As books."""
        assert not self.over.keys() & dict(endings).keys()
        self.over.update(endings)

    def finished(self, record: ExchangeRecord) -> None:
        """As a recorder."""
        self.records.append(record)


async def test_the_exchanges_of_one_round_are_noted_together() -> None:
    """One call for all of them, when the upstream has seen nothing of any; each ends the row that it began."""
    async with Here().open() as here:
        answers = await here.ask_all()
        assert all(answer.endswith(b"\r\n\r\nok") for answer in answers)
        assert here.calls == [(MANY, 0)]
        assert [here.over[number].request_id for number in range(MANY)] == here.entries
        assert len(here.over) == here.asked == MANY


async def test_of_those_noted_together_some_find_no_room() -> None:
    """They have a 503 each and nothing of them goes upstream; the others are served, and so are all of them later."""
    async with Here().open() as here:
        here.room = 2
        answers = await here.ask_all()
        assert [answer.split(b" ", 2)[1] for answer in answers] == [b"200", b"200", b"503", b"503", b"503"]
        assert (here.calls, here.asked, len(here.over)) == ([(MANY, 0)], 2, 2)
        assert [record.failure for record in here.records if record.outcome is not Outcome.COMPLETED] == [FULL] * 3
        here.room = MANY
        assert all(answer.endswith(b"\r\n\r\nok") for answer in await here.ask_all())
        assert here.asked == 2 + MANY


@pytest.mark.parametrize("how", ["fails", "forgets"])
async def test_books_with_a_bug_end_the_exchanges_and_nothing_else(how: str, caplog: pytest.LogCaptureFixture) -> None:
    """Books that raise, or answer for none of them: it is logged, these have a 500 each and no row, and it goes on."""
    async with Here().open() as here:
        setattr(here, how, True)
        with caplog.at_level(logging.ERROR, "canal_trio.gateway"):
            answers = await here.ask_all()
        assert [answer.split(b" ", 2)[1] for answer in answers] == [b"500"] * MANY
        assert [line.getMessage() for line in caplog.records] == ["the books failed to note 5 exchanges"]
        assert (here.asked, here.over) == (0, {})
        setattr(here, how, False)
        assert all(answer.endswith(b"\r\n\r\nok") for answer in await here.ask_all())


async def test_who_does_not_wait_to_send_is_noted_at_once() -> None:
    """Though others of the round still wait: these are noted with it, and not again at the round's end."""
    here = Here()
    booking = Booking(here)
    one, two = (Exchange(RequestHead(b"GET", b"/"), client="192.0.2.1", started=trio.current_time()) for _ in range(2))

    async def waits() -> None:
        booking.note(one, "u")
        await later()
        assert one.entry == 0

    held, course = waiting_to_send(waits())
    assert one.entry is None
    booking.note(two, "u")
    assert (one.entry, two.entry) == (0, 1)
    held.go_on()
    await course.finish()
    assert here.calls == [(2, 0)]
