"""What an exchange leaves to do: once for each, for all of a round of the poller together, and harmless if it fails."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import final

import pytest
import trio
import trio.testing

from canal_trio.errors import Failure
from canal_trio.gateway.core import Gateway
from canal_trio.gateway.exchange import Exchange
from canal_trio.hooks import Admitted, Asked, ExchangeRecord, Refused, Slot, Usage
from canal_trio.messages import RequestHead
from canal_trio.quota.admission import Limits
from canal_trio.quota.memory import MemoryStore
from canal_trio.quota.table import WAYS, Table, table_bytes
from canal_trio.relay import TcpStream
from canal_trio.settings import Limit, Price, Settings, Upstream


class Noted:
    """A `Bookkeeper`, a `Slot` and a `Recorder` that write down what they are told, or fail."""

    fields = b""

    def __init__(self, *, fails: bool = False) -> None:
        self.told: list[str] = []
        self.costs: list[int | None] = []
        self._fails = fails

    def _tell(self, what: str, *ids: str) -> None:
        self.told.append(" ".join([what, *ids]))
        if self._fails:
            raise ZeroDivisionError

    def admitted(self, exchanges: Sequence[Admitted]) -> Sequence[int | Failure]:
        """Nobody is."""
        raise NotImplementedError

    def ended(self, endings: Sequence[tuple[int, ExchangeRecord]]) -> None:
        """As books."""
        self._tell("books", *(f"{number}={record.request_id}" for number, record in endings))

    def release(self, record: ExchangeRecord) -> None:
        """As a slot."""
        self._tell("slot", record.request_id)

    def finished(self, record: ExchangeRecord) -> None:
        """As a recorder."""
        self.costs.append(record.cost)
        self._tell("recorder", record.request_id)


@final
class Waits:
    """A store as one that has to be asked elsewhere."""

    admit_now = None

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self.admit, self.flush, self.run = store.admit, store.flush, store.run
        self.away, self.errors = store.away, store.errors


class Told:
    """An account of which the upstream has said what was used."""

    usage = Usage(100, 50)


def gateway_with(noted: Noted) -> Gateway:
    """One that tells `noted` everything."""
    upstreams = (Upstream("u", "http://127.0.0.1:9"),)
    made = Gateway(Settings(upstreams=upstreams), recorders=[noted])
    made.keep_books(noted)
    return made


def begin(gateway: Gateway, noted: Noted, number: int) -> Exchange:
    """An exchange that has a slot, and a place in the books."""
    exchange = Exchange(RequestHead(b"GET", b"/"), client="192.0.2.1", started=trio.current_time())
    exchange.id, exchange.slot, exchange.entry, exchange.books = f"r{number}", noted, number, noted
    gateway.begin(exchange)
    return exchange


async def in_one_round(*calls: Callable[[], None]) -> None:
    """Each call in a sink of its own, all of them ready at once."""
    pairs = [socket.socketpair() for _ in calls]
    streams = [TcpStream(one) for one, _ in pairs]
    ready = False

    def sink(call: Callable[[], None]) -> Callable[[], bool]:
        def when_ready() -> bool:
            if ready:
                call()
            return not ready

        return when_ready

    async with trio.open_nursery() as nursery:
        for stream, call in zip(streams, calls, strict=True):
            stream.arm(sink(call))
            nursery.start_soon(stream.wait_disarmed)
        await trio.testing.wait_all_tasks_blocked()
        ready = True
        for _, other in pairs:
            other.send(b"x")
    for stream, (_, other) in zip(streams, pairs, strict=True):
        stream.close()
        other.close()


async def test_exchanges_that_end_in_one_round_are_accounted_for_together() -> None:
    """Their slots first, then one call for the books, then the recorders; nothing of it before the round is over."""
    noted = Noted()
    gateway = gateway_with(noted)
    one, two = begin(gateway, noted, 1), begin(gateway, noted, 2)

    def end(exchange: Exchange) -> None:
        gateway.end(exchange)
        assert exchange.finished
        assert not noted.told
        gateway.end(exchange)  # of no effect

    await in_one_round(lambda: end(one), lambda: end(two))
    assert noted.told == ["slot r1", "slot r2", "books 1=r1 2=r2", "recorder r1", "recorder r2"]
    assert gateway.exchanges() == []


@pytest.mark.parametrize("waits", [False, True])
async def test_nobody_is_refused_for_an_exchange_that_has_ended(waits: bool) -> None:
    """The next of a key with one request at once, asked for in the very round in which that one ended, is let in; and
    another one is not."""
    noted = Noted()
    gateway = gateway_with(noted)
    store = MemoryStore(Table(bytearray(table_bytes(WAYS, 1))))
    limits = Limits(Waits(store) if waits else store)
    gateway.limit_by(limits.admission)
    gateway.reload(replace(gateway.settings, limits=(Limit(streams=1),)))
    admission, asked = gateway.generation.admission, Asked("/v1/models", None, None, None, None, None)
    assert admission is not None
    assert (admission.admit_now is None) == waits
    verdicts: list[Slot | Refused] = []

    def ask() -> None:
        if admission.admit_now is not None:
            verdicts.append(admission.admit_now(asked))
        else:
            with pytest.raises(StopIteration) as stopped:  # it awaits nothing that waits
                admission.admit(asked).send(None)  # type: ignore[attr-defined]  # a coroutine
            verdicts.append(stopped.value.value)

    ask()
    exchange = begin(gateway, noted, 1)
    assert not isinstance(verdicts[0], Refused)
    exchange.slot = verdicts[0]

    def end_and_ask() -> None:
        ask()
        gateway.end(exchange)
        ask()
        ask()

    await in_one_round(end_and_ask)
    assert [isinstance(verdict, Refused) for verdict in verdicts] == [False, True, False, True]
    assert limits.rejections == {("total", "streams"): 2}
    assert noted.told == ["books 1=r1", "recorder r1"]


async def test_an_exchange_that_ends_in_a_task_is_accounted_for_at_once() -> None:
    """Outside of a round there is no end to wait for."""
    noted = Noted()
    gateway = gateway_with(noted)
    gateway.end(begin(gateway, noted, 1))
    assert noted.told == ["slot r1", "books 1=r1", "recorder r1"]


async def test_accounting_that_fails_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """Slots, books and recorders that raise are logged, each for itself; the others are told all the same."""
    noted = Noted(fails=True)
    gateway = gateway_with(noted)
    ended = [begin(gateway, noted, 1), begin(gateway, noted, 2)]
    with caplog.at_level(logging.ERROR):
        await in_one_round(*(partial(gateway.end, exchange) for exchange in ended))
    assert noted.told == ["slot r1", "slot r2", "books 1=r1 2=r2", "recorder r1", "recorder r2"]
    assert [line.getMessage() for line in caplog.records] == [
        "the accounting failed on the record of r1",
        "the accounting failed on the record of r2",
        "the books failed on the records of 2 exchanges",
        "a recorder failed on the record of r1",
        "a recorder failed on the record of r2",
    ]


async def test_what_ends_after_a_reload_costs_by_the_new_prices() -> None:
    """What was used has its cost in the record; without a price it has none, which is not a cost of nothing."""
    noted = Noted()
    gateway = gateway_with(noted)
    tables = ((), (Price("gpt-*", input=1.0, output=2.0),), (Price("gpt-*", input=3.0, upstream="elsewhere"),))
    for number, prices in enumerate(tables):
        exchange = begin(gateway, noted, number)
        exchange.accounted, exchange.account = True, Told()  # type: ignore[assignment]  # what is looked at of one
        exchange.upstream, exchange.model = "u", "gpt-4o"
        gateway.reload(replace(gateway.settings, prices=prices))
        gateway.end(exchange)
    assert noted.costs == [None, 200_000, None]


async def test_who_waits_until_all_have_ended_waits_for_those_of_now(autojump_clock: trio.testing.MockClock) -> None:
    """Not for one that begins later; and when it goes on, what they left is in the books."""
    noted = Noted()
    gateway = gateway_with(noted)
    one, two = begin(gateway, noted, 1), begin(gateway, noted, 2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(gateway.settled)
        await trio.sleep(60)
        begin(gateway, noted, 3)
        gateway.end(one)
        await trio.sleep(60)
        assert nursery.child_tasks
        gateway.end(two)
        await trio.sleep(2)
        assert not nursery.child_tasks
    assert [one for one in noted.told if one.startswith("books")] == ["books 1=r1", "books 2=r2"]
