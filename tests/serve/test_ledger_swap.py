"""The ledgers of a process over reloads: opened before they are used, closed behind their last row, or nothing is."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import final

import pytest
import trio
import trio.testing
from ledger_kit import admitted, outcomes, record
from serve_fakes import eventually

from canal_trio.errors import ConfigError, Failure
from canal_trio.hooks import Bookkeeper
from canal_trio.observe.ledger import JournalError, Ledger
from canal_trio.observe.ledger import ledger as ledger_module
from canal_trio.observe.ledger.journal import claim, left_behind
from canal_trio.observe.metrics import Metrics
from canal_trio.serve import books as books_module
from canal_trio.serve.books import Books, try_books
from canal_trio.settings import Ledger as LedgerSettings
from canal_trio.settings import Settings


@final
class Keeps:
    """As a gateway: exchanges are noted in what is kept, and end where they were noted."""

    def __init__(self) -> None:
        self.kept: Bookkeeper | None = None
        self.dropped: list[Bookkeeper] = []
        self.running: dict[int, tuple[Bookkeeper, int]] = {}

    def keep_books(self, books: Bookkeeper | None) -> None:
        """From now on."""
        self.kept = books

    def drop_books(self, books: Bookkeeper) -> None:
        """Noted."""
        self.dropped.append(books)

    async def settled(self) -> None:
        """Wait for those that run now."""
        now = list(self.running)
        await eventually(lambda: not any(one in self.running for one in now))

    def begin(self, *numbers: int) -> None:
        """These begin."""
        for number in numbers:
            assert self.kept is not None
            (entry,) = self.kept.admitted([admitted(number)])
            assert not isinstance(entry, Failure)
            self.running[number] = self.kept, entry

    def end(self, *numbers: int) -> None:
        """These end, accounted for in the same step."""
        for number in numbers:
            books, entry = self.running.pop(number)
            books.ended([(entry, record(number))])


@final
class Here:
    """Books in a folder, and the gateway that keeps them."""

    def __init__(self, folder: Path, ledger: LedgerSettings | None) -> None:
        self.folder = folder
        self.books = Books(Settings(ledger=ledger))
        self.gateway = Keeps()
        self.metrics = Metrics()
        self.books.kept_by(self.gateway, self.metrics)

    async def change(self, ledger: LedgerSettings | None) -> None:
        """A reload."""
        with await self.books.prepare(Settings(ledger=ledger)) as books:
            books.swap()
        await trio.testing.wait_all_tasks_blocked()

    def metric(self, name: str) -> float | None:
        """Of the page."""
        found = re.search(rf"^canal_ledger_{name} (\S+)$", self.metrics.page().decode(), re.MULTILINE)
        return None if found is None else float(found[1])

    @property
    def counted(self) -> tuple[float | None, float | None]:
        """Rows, and bytes that wait."""
        return self.metric("rows"), self.metric("backlog_bytes")


@asynccontextmanager
async def keeping(folder: Path, ledger: LedgerSettings | None) -> AsyncIterator[Here]:
    """Books at work; behind the block they are finished, and neither task nor file is left of them."""
    before, left = set(os.listdir("/proc/self/fd")), set(left_in(folder))
    here = Here(folder, ledger)
    async with trio.open_nursery() as nursery:
        await nursery.start(here.books.run)
        yield here
        await here.books.finish()
        nursery.cancel_scope.cancel()
    here.books.close()
    await eventually(lambda: set(os.listdir("/proc/self/fd")) <= before)
    assert set(left_in(folder)) <= left


def left_in(folder: Path) -> list[Path]:
    """Runs of which something is left in a journal."""
    return list(folder.glob("*.journal/*"))


def place(folder: Path, name: str) -> LedgerSettings:
    """A ledger with a journal beside it."""
    return LedgerSettings(file=str(folder / f"{name}.db"), journal=str(folder / f"{name}.journal"), instance="gw")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are stored at once: threads do it, for which no virtual time can be waited."""
    for name in ("LOOK", "GATHER", "GATHER_BUSY"):
        monkeypatch.setattr(ledger_module, name, 0.01)
    monkeypatch.setattr(books_module, "LOOK", 0.01)


async def test_another_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What runs ends in the old one, which is then closed while the gateway goes on; the next is in the new one; and
    what the metrics count goes on from where it was."""
    old, new = place(tmp_path, "a"), place(tmp_path, "b")
    with caplog.at_level(logging.INFO, "canal_trio"):
        async with keeping(tmp_path, old) as here:
            here.gateway.begin(1, 2)
            here.gateway.end(1)
            first = here.gateway.kept
            await eventually(lambda: here.counted == (1, 0))
            await here.change(new)
            here.gateway.begin(3)
            await eventually(lambda: outcomes(new.file or "") == {"open": 1})
            assert outcomes(old.file or "") == {"completed": 1, "open": 1}
            assert here.gateway.dropped == []
            here.gateway.end(2)
            await eventually(lambda: not os.listdir(old.journal))
            assert outcomes(old.file or "") == {"completed": 2}
            assert here.gateway.dropped == [first]
            await eventually(lambda: "closed" in caplog.text)
            assert here.metric("rows") == 2
            here.gateway.end(3)
            await eventually(lambda: here.counted == (3, 0))
    assert outcomes(new.file or "") == {"completed": 1}
    assert [line.getMessage() for line in caplog.records] == [
        "the ledger from before a reload has all of its rows, and is closed"
    ]


async def test_on_and_off_and_on_again(tmp_path: Path) -> None:
    """Off: no books are kept, and what runs ends in those that were; on: as at a start. Its own file again, while its
    old self is not closed yet: neither marks, or removes, what is the other's."""
    ledger = place(tmp_path, "a")
    async with keeping(tmp_path, None) as here:
        assert here.gateway.kept is None
        assert here.metric("rows") is None
        await here.change(ledger)
        here.gateway.begin(1)
        await here.change(None)
        assert here.gateway.kept is None
        await here.change(ledger)
        here.gateway.begin(2)
        await eventually(lambda: outcomes(ledger.file or "") == {"open": 2})
        assert len(os.listdir(ledger.journal)) == 2
        here.gateway.end(2)
        await eventually(lambda: outcomes(ledger.file or "") == {"open": 1, "completed": 1})
        here.gateway.end(1)
        await eventually(lambda: len(os.listdir(ledger.journal)) == 1)
        assert outcomes(ledger.file or "") == {"completed": 2}
        assert here.metric("interrupted") == 0


async def test_journals_of_one_process_are_locked_from_one_another(tmp_path: Path) -> None:
    """An old and a new ledger in one journal folder: the locks are of the open files, not of the process, so neither
    takes the other for one whose process is gone; and what such a claim closes does not give the lock back."""
    ledger = place(tmp_path, "a")
    old, new = Ledger(ledger), Ledger(ledger)
    folders = [os.path.join(ledger.journal, f"{one.run_name.boot}.0") for one in (old, new)]
    assert left_behind(ledger.journal, "gw", but=folders[1]) == folders[:1]
    for _ in range(2):
        with claim(folders[0]) as run:
            assert run is None
    old.close()
    assert left_behind(ledger.journal, "gw") == folders[1:]
    with claim(folders[1]) as run:
        assert run is None
    new.close()
    assert os.listdir(ledger.journal) == []


@pytest.mark.parametrize("change", [{"journal_bytes": 4096 * 1024}, {"instance": "other"}, {"journal": "x.journal"}])
async def test_whatever_is_changed_of_it(tmp_path: Path, change: dict[str, object]) -> None:
    """The same file with another journal, another bound or another name: what runs has its row in the old run's name,
    and none is interrupted."""
    old = place(tmp_path, "a")
    new = replace(old, **(change | ({"journal": str(tmp_path / "x.journal")} if "journal" in change else {})))  # type: ignore[arg-type]
    async with keeping(tmp_path, old) as here:
        here.gateway.begin(1)
        await here.change(new)
        here.gateway.begin(2)
        await eventually(lambda: outcomes(old.file or "") == {"open": 2})
        here.gateway.end(1, 2)
        await eventually(lambda: outcomes(old.file or "") == {"completed": 2})


async def test_what_is_the_same_stays(tmp_path: Path) -> None:
    """A reload that changes something else has the same ledger, and opens no other."""
    ledger = place(tmp_path, "a")
    async with keeping(tmp_path, ledger) as here:
        kept, journals = here.gateway.kept, os.listdir(ledger.journal)
        await here.change(place(tmp_path, "a"))
        assert here.gateway.kept is kept
        assert os.listdir(ledger.journal) == journals
    async with keeping(tmp_path, None) as here:
        await here.change(None)
        assert here.gateway.kept is None


async def test_several_that_are_replaced_while_their_streams_last(tmp_path: Path) -> None:
    """Each keeps what it has until that ends, in whatever order; at the end of the process all are finished."""
    ledgers = [place(tmp_path, name) for name in "abcd"]
    async with keeping(tmp_path, ledgers[0]) as here:
        here.gateway.begin(0)
        for number, ledger in enumerate(ledgers[1:], 1):
            await here.change(ledger)
            here.gateway.begin(number)
        here.gateway.end(1)
        await eventually(lambda: outcomes(ledgers[1].file or "") == {"completed": 1})
        here.gateway.end(0)
        await eventually(lambda: not any(os.listdir(ledger.journal) for ledger in ledgers[:2]))
        assert all(os.listdir(ledger.journal) for ledger in ledgers[2:])
        here.gateway.end(3, 2)
    assert [outcomes(ledger.file or "") for ledger in ledgers] == [{"completed": 1}] * 4
    assert here.counted == (4, 0)


async def test_a_store_that_is_away_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old one's rows wait for it though nothing runs any more, and the page says so, until it is back."""
    monkeypatch.setattr(ledger_module, "BACK_OFF_LAST", 0.02)
    far = tmp_path / "far"
    old, new = replace(place(tmp_path, "a"), file=str(far / "a.db")), place(tmp_path, "b")
    async with keeping(tmp_path, old) as here:
        here.gateway.begin(1)
        here.gateway.end(1)
        await here.change(new)
        await eventually(lambda: here.gateway.dropped)
        await eventually(lambda: (here.metric("store_errors") or 0) > 3)
        rows, backlog = here.counted
        assert rows == 0
        assert backlog
        far.mkdir()
        await eventually(lambda: here.counted == (1, 0))
        await eventually(lambda: not os.listdir(old.journal))
        assert (here.metric("store_errors") or 0) > 3
    assert outcomes(old.file or "") == {"completed": 1}


async def test_a_journal_that_cannot_be_kept_changes_nothing(tmp_path: Path) -> None:
    """As at a start it is refused, in one line; the old ledger is kept, and nothing is left of the new one."""
    old, new = place(tmp_path, "a"), place(tmp_path, "b")
    (tmp_path / "b.journal").symlink_to("nowhere/b")
    with pytest.raises(JournalError, match="cannot be kept in"):
        Books(Settings(ledger=new))
    async with keeping(tmp_path, old) as here:
        kept = here.gateway.kept
        for refuses in (here.change(new), try_books(Settings(ledger=old), Settings(ledger=new))):
            with pytest.raises(ConfigError, match=r"\Athe ledger's journal cannot be kept in [^\n]*b.journal: .*\Z"):
                await refuses
        assert here.gateway.kept is kept
        here.gateway.begin(1)
        here.gateway.end(1)
    assert outcomes(old.file or "") == {"completed": 1}


async def test_a_journal_that_breaks_off_in_its_beginning_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locked, and then its first file cannot be made: neither the lock nor the folder stays."""
    before = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(fcntl, "flock", lambda *_: os.open(tmp_path / "nowhere" / "x", os.O_RDONLY))
    with pytest.raises(JournalError):
        Ledger(place(tmp_path, "a"))
    assert os.listdir(tmp_path / "a.journal") == []
    assert set(os.listdir("/proc/self/fd")) <= before


async def test_what_was_opened_and_is_not_used_is_closed(tmp_path: Path) -> None:
    """Where the rest of a reload fails, and where the process has begun to end: the old one stays."""
    old, new = place(tmp_path, "a"), place(tmp_path, "b")
    async with keeping(tmp_path, old) as here:
        kept = here.gateway.kept
        with suppress(ZeroDivisionError), await here.books.prepare(Settings(ledger=new)):
            assert len(os.listdir(new.journal)) == 1
            raise ZeroDivisionError
        assert os.listdir(new.journal) == []
        await here.books.finish()
        await here.change(new)
        assert os.listdir(new.journal) == []
        assert here.gateway.kept is kept


async def test_a_parent_tries_what_its_workers_will_open(tmp_path: Path) -> None:
    """It opens another ledger and closes it again, and does nothing about one that stays or goes."""
    old, new = Settings(ledger=place(tmp_path, "a")), Settings(ledger=place(tmp_path, "b"))
    before = set(os.listdir("/proc/self/fd"))
    await try_books(old, old)
    await try_books(old, Settings())
    assert os.listdir(tmp_path) == []
    await try_books(old, new)
    assert os.listdir(tmp_path) == ["b.journal"]
    assert os.listdir(tmp_path / "b.journal") == []
    assert set(os.listdir("/proc/self/fd")) <= before


async def test_cancelled_it_lets_go_of_its_files(tmp_path: Path) -> None:
    """Nothing was finished: what is open stays in the journals for the next start, which nobody holds any more."""
    ledgers = [place(tmp_path, name) for name in "ab"]
    here = Here(tmp_path, ledgers[0])
    async with trio.open_nursery() as nursery:
        await nursery.start(here.books.run)
        here.gateway.begin(1)
        await here.change(ledgers[1])
        here.gateway.begin(2)
        await eventually(lambda: all(outcomes(one.file or "") == {"open": 1} for one in ledgers))
        nursery.cancel_scope.cancel()
    here.books.close()
    here.books.close()
    for ledger in ledgers:
        (left,) = left_behind(ledger.journal, "gw")
        with claim(left) as run:
            assert run is not None
        async with keeping(tmp_path, ledger):
            await eventually(lambda ledger=ledger: outcomes(ledger.file or "") == {"interrupted": 1})


async def test_postgres_is_imported_in_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client takes long to import, and a stream would have to wait for it."""
    threads: list[object] = []
    real = books_module.open_store

    def opens(file: str | None, postgres: str | None):
        threads.append(trio.lowlevel.in_trio_run())
        return real(file, None)

    monkeypatch.setattr(books_module, "open_store", opens)
    async with keeping(tmp_path, None) as here:
        await here.change(place(tmp_path, "a"))
    assert threads == [False]
    assert sys.getswitchinterval() == pytest.approx(0.005)
