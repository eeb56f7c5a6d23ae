"""The gateway and its books: noted before anything goes upstream, ended once, whatever becomes of the exchange."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import trio
from kit import chat, request
from simkit import OK, SSE, URL, Conversation, World, only_record, world

from canal_trio.errors import Failure, Kind, Phase, Side
from canal_trio.hooks import Admitted, ExchangeRecord, Outcome
from canal_trio.settings import Key, Upstream

FULL = Failure(Side.GATEWAY, Phase.ROUTE, Kind.UNBOOKED, "Full.")


class Books:
    """A `Bookkeeper` that remembers, and looks at what the upstream has seen by then."""

    def __init__(self, here: World) -> None:
        self._here = here
        self.full = False
        self.noted: list[Admitted] = []
        self.over: dict[int, ExchangeRecord] = {}
        here.gateway.keep_books(self)

    def admitted(self, exchanges: Sequence[Admitted]) -> Sequence[int | Failure]:
        """Their places in the list."""
        if self.full:
            return [FULL] * len(exchanges)
        assert not self._here.conversations or len(self._here.conversations[-1].requests) == len(self.noted)
        first = len(self.noted)
        self.noted += exchanges
        return range(first, len(self.noted))

    def ended(self, endings: Sequence[tuple[int, ExchangeRecord]]) -> None:
        """Once for each."""
        for number, record in endings:
            assert number not in self.over
            self.over[number] = record


async def answers(upstream: Conversation) -> None:
    """A whole answer."""
    await upstream.say(OK)


async def test_noted_before_anything_goes_upstream(autojump_clock: Any, handover: bool) -> None:
    """Each exchange is noted with what is known of it, before the upstream sees a byte, and ended with its record."""
    async with world(answers, handover=handover) as here:
        books = Books(here)
        client = here.connect()
        for path in ("/v1/chat/completions", "/v1/files?secret=1"):
            await client.send(request("POST", path, b"{}"))
            assert (await client.response()).body == b"ok"
        records = await here.records.wait(2)
        assert [books.over[number] for number in range(2)] == records
        assert [noted.path for noted in books.noted] == ["/v1/chat/completions", "/v1/files"]
        assert [noted.request_id for noted in books.noted] == [record.request_id for record in records]
        assert {(noted.upstream, noted.principal, noted.key) for noted in books.noted} == {("u0", None, None)}
        assert books.noted[0].started_at == records[0].started_at


async def test_what_cannot_be_noted_is_not_done(autojump_clock: Any, handover: bool) -> None:
    """With full books the client has a 503 that says so, the upstream nothing; and then it goes on."""
    async with world(answers, handover=handover) as here:
        books = Books(here)
        client = here.connect()
        books.full = True
        await client.send(chat())
        response = await client.response()
        assert (response.status, response.header("retry-after")) == (503, "5")
        assert b'"ledger_unavailable"' in response.body
        assert here.conversations == []
        books.full = False
        await client.send(chat())
        assert (await client.response()).status == 200
        await here.records.wait(2)
        assert len(books.over) == len(books.noted) == 1


async def test_what_is_not_admitted_is_not_noted(autojump_clock: Any, handover: bool) -> None:
    """A wrong key, a broken head: answered by the gateway itself, and no row."""
    keys = (Key("team-a", "0" * 64),)
    async with world(answers, handover=handover, keys=keys) as here:
        books = Books(here)
        for data in (chat("Authorization: Bearer wrong"), b"nonsense\r\n\r\n"):
            client = here.connect()
            await client.send(data)
            assert (await client.response()).status in (400, 401)
        await here.records.wait(2)
        assert (books.noted, books.over) == ([], {})


@pytest.mark.parametrize("heartbeat", [None, 50.0], ids=["straight", "pair"])
@pytest.mark.parametrize("when", ["dial", "head", "stream", "stop"])
async def test_ended_whatever_happens(autojump_clock: Any, handover: bool, heartbeat: float | None, when: str) -> None:
    """A client that leaves in any phase, and a gateway that stops, end the row as they end the exchange."""

    async def halts(upstream: Conversation) -> None:
        if when != "head":
            await upstream.say(SSE)
            await upstream.chunk(b"data: x\n\n")
        await trio.sleep_forever()

    async with world(halts, handover=handover, upstream=Upstream("u0", URL, heartbeat=heartbeat)) as here:
        books = Books(here)
        if when == "dial":
            here.dialer = _never
        client = here.connect()
        await client.send(chat())
        await trio.sleep(3)
        if when == "stop":
            here.gateway.drain(trio.current_time() + 1)
        else:
            client.stream.close()  # type: ignore[attr-defined]
        record = await only_record(here)
        assert books.over == {0: record}
        assert record.outcome is (Outcome.DRAINED if when == "stop" else Outcome.CLIENT_GONE)


async def _never(_upstream: Upstream) -> None:
    await trio.sleep_forever()


async def test_books_stay_over_a_reload(autojump_clock: Any, handover: bool) -> None:
    """Another configuration has the same books."""
    async with world(answers, handover=handover) as here:
        books = Books(here)
        here.gateway.reload(here.gateway.settings)
        client = here.connect()
        await client.send(chat())
        await client.response()
        assert len(books.noted) == 1
