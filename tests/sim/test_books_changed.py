"""Other books while exchanges run: each ends in the ones it began with, and no row begins twice or stays open."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, final

import pytest
import trio
from kit import chat, waiting_to_send
from simkit import OK, Conversation, World, world

from canal_trio.errors import Failure
from canal_trio.gateway.exchange import Exchange
from canal_trio.hooks import Admitted, ExchangeRecord
from canal_trio.messages import RequestHead
from canal_trio.relay.course import later
from canal_trio.settings import Model, Target


@final
class Rows:
    """A `Bookkeeper` that remembers what it was told; each counts from 0, so no number says whose it is."""

    def __init__(self) -> None:
        self.noted: list[str] = []
        self.over: dict[int, str] = {}
        self.calls = 0  # of `ended`
        self.fails = False

    def admitted(self, exchanges: Sequence[Admitted]) -> Sequence[int | Failure]:
        """Their places in the list."""
        first = len(self.noted)
        self.noted += [exchange.request_id for exchange in exchanges]
        return range(first, len(self.noted))

    def ended(self, endings: Sequence[tuple[int, ExchangeRecord]]) -> None:
        """Once for each, and each is its own."""
        self.calls += 1
        if self.fails:
            raise ZeroDivisionError
        for number, record in endings:
            assert number not in self.over
            assert self.noted[number] == record.request_id
            self.over[number] = record.request_id

    @property
    def counts(self) -> tuple[int, int]:
        """Rows that began, and of these those that have ended."""
        return len(self.noted), len(self.over)


class Waits:
    """An upstream that answers each request when it is told to."""

    def __init__(self) -> None:
        self.go = trio.Event()

    async def __call__(self, upstream: Conversation) -> None:
        """A whole answer, then."""
        await self.go.wait()
        await upstream.say(OK)


def one(number: int) -> Exchange:
    """An exchange that has been routed."""
    exchange = Exchange(RequestHead(b"GET", b"/"), client="192.0.2.1", started=trio.current_time())
    exchange.id = f"r{number}"
    return exchange


async def answered(here: World) -> None:
    """All clients have their answers, and all records are there."""
    for client in here.clients:
        assert (await client.response()).body == b"ok"
    await here.records.wait(len(here.clients))


async def test_each_ends_where_it_was_noted(autojump_clock: Any, handover: bool) -> None:
    """One that runs and one that is still being uploaded when the books change are the old ones'; the next is the new
    ones'; and who waits for those of the old ones to settle can close them."""
    play, old, new = Waits(), Rows(), Rows()
    models = (Model("m", (Target("u0"),)),)  # so that a body has to be here before it is noted
    async with world(play, handover=handover, models=models) as here:
        here.gateway.keep_books(old)
        await here.connect().send(chat())
        uploads, whole = here.connect(), chat()
        await uploads.send(whole[:-3])
        await trio.sleep(1)
        assert old.counts == (1, 0)
        here.gateway.keep_books(new)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(here.gateway.settled)
            await trio.sleep(1)
            await here.connect().send(chat())
            await uploads.send(whole[-3:])
            await trio.sleep(1)
            assert (old.counts, new.counts) == ((2, 0), (1, 0))
            play.go.set()
        assert old.counts == (2, 2)
        here.gateway.drop_books(old)
        await answered(here)
        assert new.counts == (1, 1)


async def test_books_on_and_off(autojump_clock: Any, handover: bool) -> None:
    """What began without books has no row, though they are kept when it ends; what began with them has one, though they
    are not kept any more; and with nothing kept nothing is noted."""
    play, books = Waits(), Rows()
    async with world(play, handover=handover) as here:
        for kept in (None, books, None):
            here.gateway.keep_books(kept)
            await here.connect().send(chat())
            await trio.sleep(1)
        assert books.counts == (1, 0)
        play.go.set()
        await answered(here)
        assert books.counts == (1, 1)


async def test_books_stay_over_a_reload_in_between(autojump_clock: Any, handover: bool) -> None:
    """A configuration with other books, and then one with the same: the exchanges of all three end in theirs."""
    play, first, second = Waits(), Rows(), Rows()
    async with world(play, handover=handover) as here:
        for books in (first, second, None):
            here.gateway.reload(here.gateway.settings)
            if books is not None:
                here.gateway.keep_books(books)
            await here.connect().send(chat())
            await trio.sleep(1)
        play.go.set()
        await answered(here)
        assert (first.counts, second.counts) == ((1, 1), (2, 2))


async def test_one_that_ends_before_it_was_noted_in_books_that_are_kept_no_more(autojump_clock: Any) -> None:
    """Noted at the end of a round, swapped and ended within it: it has its row, in the old books, and that is ended."""
    old, new = Rows(), Rows()
    async with world(Waits(), handover=True) as here:
        gateway = here.gateway
        gateway.keep_books(old)
        booking, exchange = gateway.generation.booking, one(1)
        assert booking is not None
        gateway.begin(exchange)

        async def waits() -> None:
            booking.note(exchange, "u0")
            await later()

        held, course = waiting_to_send(waits())
        gateway.keep_books(new)
        gateway.end(exchange)
        held.go_on()
        await course.finish()
        assert (old.over, new.counts) == ({0: "r1"}, (0, 0))


async def test_old_books_that_fail_harm_no_others(autojump_clock: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Of three, the middle one raises: it is logged, and the first and the present one are told."""
    books = [Rows(), Rows(), Rows()]
    books[1].fails = True
    async with world(Waits(), handover=True) as here:
        exchanges = []
        for number, each in enumerate(books):
            here.gateway.keep_books(each)
            exchange = one(number)
            here.gateway.begin(exchange)
            assert here.gateway.generation.booking is not None
            here.gateway.generation.booking.note(exchange, "u0")
            exchanges.append(exchange)
        here.gateway._ended += exchanges[:2]  # the round's others
        for exchange in exchanges[:2]:
            del here.gateway._exchanges[exchange]
            exchange.finish()
        with caplog.at_level(logging.ERROR, "canal_trio.gateway"):
            here.gateway.end(exchanges[2])
            here.gateway.account()
        assert [each.calls for each in books] == [1, 1, 1]
        assert [each.over for each in books] == [{0: "r0"}, {}, {0: "r2"}]
        assert [line.getMessage() for line in caplog.records] == ["the books failed on the records of 1 exchanges"]
