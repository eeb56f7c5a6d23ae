"""The ledgers of a serving process: the present one, and those that a reload has replaced.

Each is opened before anything is noted in it, run beside what is served, and closed behind its last exchange. New
exchanges are noted in the present one from the very step of the swap; those in flight in the one they began with. That
is closed when they have ended and its store has all of its rows: while the store is away it is waited for, until the
process ends. Invariants: a ledger that cannot be opened changes nothing; none is closed while it has open rows; what
the metrics count never goes down.
"""

from __future__ import annotations

import dataclasses
import logging
from types import TracebackType
from typing import Final, Protocol, final

import trio

from canal_trio.errors import ConfigError
from canal_trio.hooks import Bookkeeper
from canal_trio.observe.ledger import JournalError, Ledger, LedgerStatistics, open_store
from canal_trio.observe.metrics import Metrics
from canal_trio.serve.reload import in_a_thread
from canal_trio.settings import Ledger as LedgerSettings
from canal_trio.settings import Settings

__all__ = ["Booked", "Books", "Change", "try_books"]

LOOK: Final = 1.0  # seconds between looks at what a replaced ledger still has to store

_log = logging.getLogger("canal_trio.serve")


class Booked(Protocol):
    """What books need of a gateway."""

    def keep_books(self, books: Bookkeeper | None) -> None:
        """Note each exchange that begins from now on in `books` (None: nowhere)."""

    def drop_books(self, books: Bookkeeper) -> None:
        """Nothing in flight is noted in `books`: forget them."""

    async def settled(self) -> None:
        """Wait until all exchanges that are in flight now have ended and are accounted for."""


@final
class Change:
    """Other books, ready to be kept: `swap` does it, in the block; those that were not swapped in are closed behind it.

    Not a checkpoint, any of it.
    """

    def __init__(self, books: Books, settings: LedgerSettings | None, ledger: Ledger | None) -> None:
        self._books = books
        self._settings = settings
        self._unused = ledger

    def __enter__(self) -> Change:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._unused is not None:
            self._unused.close()

    def swap(self) -> None:
        """Keep these from now on. Without effect when the process ends, or if they are no others."""
        if self._books.swap(self._settings, self._unused):
            self._unused = None


@final
class Books:
    """What the settings' `[ledger]` asks for, in the process of the worker `worker` (0: the only one).

    `kept_by` first, then `run` meanwhile, `finish` behind the last exchange, and `close` whatever happens. Raises
    `JournalError`.
    """

    def __init__(self, settings: Settings, worker: int = 0) -> None:
        self._settings = settings.ledger
        self._worker = worker
        self._ledger = None if settings.ledger is None else Ledger(settings.ledger, worker=worker)
        self._open = {} if self._ledger is None else {self._ledger: trio.CancelScope()}
        self._past = LedgerStatistics(0, 0, 0, 0, 0, 0)  # of those that are closed
        self._shown = self._over = False
        self._gateway: Booked
        self._metrics: Metrics
        self._nursery: trio.Nursery

    def kept_by(self, gateway: Booked, metrics: Metrics) -> None:
        """Have `gateway` note its exchanges here, and `metrics` show how that fares."""
        self._gateway, self._metrics = gateway, metrics
        if self._ledger is not None:
            gateway.keep_books(self._ledger)
            self._show()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Fill the stores, until cancelled."""
        try:
            async with trio.open_nursery() as self._nursery:
                for ledger in self._open:
                    self._nursery.start_soon(self._fill, ledger)
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._over = True

    async def _fill(self, ledger: Ledger) -> None:
        with self._open[ledger]:
            await ledger.run()

    # -- a reload ------------------------------------------------------------------------------------------------------

    async def prepare(self, settings: Settings) -> Change:
        """Open what `settings` ask for, if it is not what there is. Raises `ConfigError`. A checkpoint, and the last
        of what it does, so that who is cancelled has opened nothing."""
        new = settings.ledger
        opened = None if new is None or new == self._settings else await _opened(new, self._worker)
        return Change(self, new, opened)

    def swap(self, settings: LedgerSettings | None, ledger: Ledger | None) -> bool:
        """For `Change`: keep `ledger` from now on. False: it is not needed. Not a checkpoint."""
        if settings == self._settings or self._over:
            return False
        old, self._ledger, self._settings = self._ledger, ledger, settings
        if ledger is not None:
            self._open[ledger] = trio.CancelScope()
            self._nursery.start_soon(self._fill, ledger)
            self._show()
        self._gateway.keep_books(ledger)
        if old is not None:
            self._nursery.start_soon(self._retire, old)
        return True

    async def _retire(self, ledger: Ledger) -> None:
        """Close it, when all that was noted in it has ended and is stored."""
        await self._gateway.settled()
        self._gateway.drop_books(ledger)
        while ledger.statistics().backlog:  # noqa: ASYNC110  # nobody tells, and nobody is in a hurry
            await trio.sleep(LOOK)
        if self._over:
            return  # `finish` is at it
        await ledger.finish()
        self._open.pop(ledger).cancel()
        self._past = _sum(self._past, dataclasses.replace(ledger.statistics(), backlog=0, open=0))
        _log.info("the ledger from before a reload has all of its rows, and is closed")

    # -- the end -------------------------------------------------------------------------------------------------------

    async def finish(self) -> None:
        """No more exchanges will come: see `Ledger.finish`, for all of them at once."""
        self._over = True
        async with trio.open_nursery() as nursery:
            for ledger in self._open:
                nursery.start_soon(ledger.finish)

    def close(self) -> None:
        """Let go of everything, if that was not done in good order. Idempotent; not a checkpoint."""
        self._over = True
        for ledger in self._open:
            ledger.close()

    # -- metrics -------------------------------------------------------------------------------------------------------

    def statistics(self) -> LedgerStatistics:
        """All ledgers together; what they counted includes those that are closed."""
        total = self._past
        for ledger in self._open:
            total = _sum(total, ledger.statistics())
        return total

    def _show(self) -> None:
        """Have a scrape read the state, from the first ledger on."""
        if self._shown:
            return
        self._shown = True
        state, gauge = self.statistics, self._metrics.gauge
        gauge("canal_ledger_backlog_bytes", "Bytes of the journal that the store has not.", lambda: state().backlog)
        gauge("canal_ledger_rows", "Rows that the store took since the start.", lambda: state().rows)
        gauge("canal_ledger_refused", "Exchanges refused: the journal was full.", lambda: state().refused)
        gauge("canal_ledger_interrupted", "Rows of dead processes that were closed.", lambda: state().interrupted)
        gauge("canal_ledger_store_errors", "Tries that the store failed.", lambda: state().store_errors)


async def try_books(old: Settings, new: Settings) -> None:
    """For the parent of workers: raises `ConfigError` if these could not open the ledger of `new`, where it is another
    one than that of `old`. A checkpoint; it leaves nothing behind."""
    if new.ledger is not None and new.ledger != old.ledger:
        (await _opened(new.ledger, 0)).close()


async def _opened(settings: LedgerSettings, worker: int) -> Ledger:
    store = await in_a_thread(open_store, settings.file, settings.postgres)  # PostgreSQL's client is slow to import
    try:
        return Ledger(settings, worker=worker, store=store)
    except JournalError as exc:
        store.close()
        raise ConfigError(str(exc)) from None


def _sum(one: LedgerStatistics, other: LedgerStatistics) -> LedgerStatistics:
    pairs = zip(dataclasses.astuple(one), dataclasses.astuple(other), strict=True)
    return LedgerStatistics(*(a + b for a, b in pairs))
