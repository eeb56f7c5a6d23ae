"""The ledger of a process: every admitted exchange has one row, whatever the store and the process go through."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from ledger_kit import admitted, outcomes, record, rows_in

from canal_trio.errors import Failure, Kind, Side
from canal_trio.hooks import Outcome
from canal_trio.observe.ledger import Ledger, StoreError
from canal_trio.observe.ledger import ledger as ledger_module
from canal_trio.observe.ledger.rows import Chunk, Run
from canal_trio.observe.ledger.sqlite import SqliteStore
from canal_trio.policy.exchange import answer_for
from canal_trio.settings import Ledger as LedgerSettings


class Fragile(SqliteStore):
    """A store that can be away, or hang."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.away = False
        self.tries = 0
        self.hang: threading.Event | None = None

    def apply(self, run: Run, chunks: Iterable[Chunk]) -> None:
        """As told."""
        self.tries += 1
        if self.hang is not None:
            self.hang.wait(20)
        if self.away:
            raise StoreError("away")
        super().apply(run, chunks)

    def interrupt(self, run: Run) -> int:
        """As told."""
        if self.away:
            raise StoreError("away")
        return super().interrupt(run)


@pytest.fixture
def place(tmp_path: Path) -> LedgerSettings:
    """Settings of a ledger in a new folder."""
    return LedgerSettings(file=str(tmp_path / "ledger.db"), journal=str(tmp_path / "j"), instance="gw")


async def until(condition: object, seconds: float = 10) -> None:
    """Wait for a thread's work: nothing can be awaited."""
    with trio.fail_after(seconds):
        while not condition():  # type: ignore[operator]  # noqa: ASYNC110
            await trio.sleep(0.005)


@asynccontextmanager
async def running(
    place: LedgerSettings, store: SqliteStore | None = None, *, finish: float | None = 5.0
) -> AsyncIterator[Ledger]:
    """A ledger at work; `finish` None: it is killed at the end."""
    ledger = Ledger(place, store=store)
    async with trio.open_nursery() as nursery:
        await nursery.start(ledger.run)
        yield ledger
        if finish is not None:
            await ledger.finish(finish)
        nursery.cancel_scope.cancel()
    if finish is None:
        ledger._journal.close()  # the kernel does that for a process that is gone


def begin(ledger: Ledger, number: int) -> int:
    """Admit one."""
    (entry,) = ledger.admitted([admitted(number)])
    assert isinstance(entry, int)
    return entry


def journals(place: LedgerSettings) -> list[str]:
    """The runs that have left something behind."""
    return os.listdir(place.journal)


async def test_rows_are_the_admitted_exchanges(place: LedgerSettings) -> None:
    """In good order: as many rows as exchanges, while it runs and at the end, and no journal is left."""
    async with running(place) as ledger:
        entries = [begin(ledger, number) for number in range(50)]
        for number, entry in enumerate(entries[:40]):
            ledger.ended([(entry, record(number))])
        await until(lambda: outcomes(place.file or "") == {"completed": 40, "open": 10})
        for number, entry in enumerate(entries[40:]):
            ledger.ended([(entry, record(number, outcome=Outcome.CLIENT_GONE))])
    assert outcomes(place.file or "") == {"completed": 40, "client_gone": 10}
    assert ledger.statistics().rows == 50
    assert journals(place) == []


async def test_many_rows_gather_for_longer(place: LedgerSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind few rows the next ones are soon stored, behind many they are left to become more; none is missing."""
    gather, busy = 0.011, 0.012
    for name, value in (("LOOK", 0.02), ("GATHER", gather), ("GATHER_BUSY", busy), ("MANY", 5)):
        monkeypatch.setattr(ledger_module, name, value)
    real = trio.move_on_after
    told: list[tuple[float, int]] = []  # how long it waits, and behind how many rows in all
    async with running(place) as ledger:

        def waits(seconds: float) -> trio.CancelScope:
            told.append((seconds, ledger.statistics().rows))
            return real(seconds)

        monkeypatch.setattr(trio, "move_on_after", waits)
        for total, count in ((4, 4), (9, 5), (10, 1)):
            ledger.ended([(entry, record(entry)) for entry in [begin(ledger, number) for number in range(count)]])
            await until(lambda total=total: any(pause != 0.02 and rows == total for pause, rows in told))
    first = [next(pause for pause, rows in told if pause != 0.02 and rows == total) for total in (4, 9, 10)]
    assert first == [gather, busy, gather]
    assert outcomes(place.file or "") == {"completed": 10}


async def test_a_store_that_is_away_and_back(place: LedgerSettings, caplog: pytest.LogCaptureFixture) -> None:
    """Rows wait in the journal, it is said once when the store goes and once when it is back, and none is missing."""
    store = Fragile(place.file or "")
    store.away = True
    with caplog.at_level(logging.WARNING, "canal_trio.ledger"):
        async with running(place, store) as ledger:
            entries = [begin(ledger, number) for number in range(5)]
            await until(lambda: ledger.statistics().store_errors >= 2)
            ledger.ended([(entries[0], record(0))])
            store.away = False
            await until(lambda: ledger.statistics().rows == 1)
            for number, entry in enumerate(entries[1:]):
                ledger.ended([(entry, record(number))])
    assert outcomes(place.file or "") == {"completed": 5}
    said = [line.message for line in caplog.records]
    assert len(said) == 2
    assert "away" in said[0]
    assert "back" in said[1]


async def test_a_full_journal_is_a_503(tmp_path: Path) -> None:
    """Full means no: the exchange is refused with a failure that can be answered, and later the next one is not."""
    place = LedgerSettings(file=str(tmp_path / "l.db"), journal=str(tmp_path / "j"), journal_bytes=8000)
    store = Fragile(place.file or "")
    store.away = True
    async with running(place, store) as ledger:
        entries = []
        while not isinstance(entry := ledger.admitted([admitted(len(entries))])[0], Failure):
            entries.append(entry)
        assert (entry.side, entry.kind) == (Side.GATEWAY, Kind.UNBOOKED)
        answer = answer_for(entry)
        assert (answer.status, answer.code, answer.should_retry) == (503, "ledger_unavailable", True)
        assert answer.retry_after
        for number, entry in enumerate(entries):
            ledger.ended([(entry, record(number))])
        assert ledger.statistics().refused == 1
        store.away = False
        await until(lambda: ledger.statistics().backlog == 0)
        ledger.ended([(begin(ledger, 100), record(100))])
    assert outcomes(place.file or "") == {"completed": len(entries) + 1}


async def test_what_a_kill_left_open_is_interrupted(place: LedgerSettings) -> None:
    """The next start of the same instance applies what the dead one had written, and marks what it left open."""
    store = Fragile(place.file or "")
    store.away = True
    async with running(place, store, finish=None) as ledger:
        entries = [begin(ledger, number) for number in range(4)]
        ledger.ended([(entries[0], record(0))])
        await until(lambda: store.tries)
    assert len(journals(place)) == 1
    store.away = False
    async with running(place) as successor:
        await until(lambda: successor.statistics().interrupted == 3)
        mine = begin(successor, 9)
        await until(lambda: outcomes(place.file or "")["open"] == 1)
        successor.ended([(mine, record(9))])
    assert outcomes(place.file or "") == {"completed": 2, "interrupted": 3}
    assert len({row["boot"] for row in rows_in(place.file or "")}) == 2
    assert journals(place) == []


async def test_another_gateway_marks_nothing_of_ours(tmp_path: Path, place: LedgerSettings) -> None:
    """A second gateway on the same store, and a second worker of the same instance, leave a living one's rows alone."""
    other = LedgerSettings(file=place.file, journal=str(tmp_path / "j2"), instance="gw")
    async with running(place) as ledger:
        entry = begin(ledger, 1)
        await until(lambda: outcomes(place.file or "")["open"] == 1)
        for settings in (other, place):
            async with running(settings) as second:
                second.ended([(begin(second, 2), record(2))])
        assert outcomes(place.file or "") == {"open": 1, "completed": 2}
        ledger.ended([(entry, record(1))])
    assert outcomes(place.file or "") == {"completed": 3}


async def test_the_store_is_away_at_start_and_end(place: LedgerSettings) -> None:
    """Rows that could not be stored stay for the next start, and the next; nothing is lost between."""
    for number in range(3):
        store = Fragile(place.file or "")
        store.away = True
        async with running(place, store, finish=0.3) as ledger:
            ledger.ended([(begin(ledger, number), record(number))])
    assert len(journals(place)) == 3
    async with running(place) as ledger:
        await until(lambda: ledger.statistics().rows == 3)
    assert outcomes(place.file or "") == {"completed": 3}
    assert journals(place) == []


async def test_a_store_that_hangs_does_not_hold_up_the_end(place: LedgerSettings) -> None:
    """The process ends in time with its journal left, and the thread that was given up does no harm when it wakes."""
    store = Fragile(place.file or "")
    store.hang = threading.Event()
    with trio.fail_after(5):
        async with running(place, store, finish=0.2) as ledger:
            ledger.ended([(begin(ledger, 1), record(1))])
            await until(lambda: store.tries)
    assert len(journals(place)) == 1
    store.hang.set()
    await until(lambda: not ledger._filler._one.locked())
    ledger._journal.close()
    store.close()
    async with running(place):
        pass
    assert outcomes(place.file or "") == {"completed": 1}


async def test_a_journal_that_cannot_be_read(place: LedgerSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that does not give back what it took is as a store that is away: later it goes on."""
    async with running(place) as ledger:
        reader = ledger._filler._reader
        with monkeypatch.context() as patched:
            patched.setattr(reader, "read", lambda _most: (_ for _ in ()).throw(OSError(5, "Input/output error")))
            entry = begin(ledger, 1)
            await until(lambda: ledger.statistics().store_errors)
        ledger.ended([(entry, record(1))])
    assert outcomes(place.file or "") == {"completed": 1}


async def test_rows_vanished_unsaid_where_the_journal_was_removed(
    place: LedgerSettings, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said how much is lost, the journal is begun anew, and rows that end later are whole; where it cannot be,
    nothing is admitted meanwhile."""

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "no")

    assert place.file is not None
    file = place.file
    async with running(place) as ledger:
        one = begin(ledger, 1)
        await until(lambda: outcomes(file) == {"open": 1})
        shutil.rmtree(place.journal)
        await until(lambda: "0 bytes of rows are lost, it is begun anew" in caplog.text)
        two = begin(ledger, 2)
        ledger.ended([(one, record(1)), (two, record(2))])
        await until(lambda: outcomes(file) == {"completed": 2} and not ledger.statistics().backlog)
        monkeypatch.setattr(os, "makedirs", refused)
        shutil.rmtree(place.journal)
        await until(lambda: "nothing is admitted: the ledger's journal cannot be kept in" in caplog.text)
        (none,) = ledger.admitted([admitted(3)])
        assert isinstance(none, Failure)
        monkeypatch.undo()
        await until(lambda: isinstance(ledger.admitted([admitted(4)])[0], int))
    assert "wait for the next start" not in caplog.text
