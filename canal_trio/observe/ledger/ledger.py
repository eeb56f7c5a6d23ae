"""The ledger of one process: a `hooks.Bookkeeper` in front, and the task that fills the store behind.

On the loop's thread an exchange costs two lines written to the journal. Everything else happens in one thread at a
time: the task wakes when something was written, waits a moment so that one transaction takes many rows, and has batches
applied until nothing is left. While the store is away it tries again, less and less often, and the journal grows to its
bound; then `admitted` answers with a failure. Invariant: the task never raises for a store's or a disk's sake.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import trio

from canal_trio.errors import CanalError, Failure, Kind, Phase, Side
from canal_trio.hooks import Admitted, ExchangeRecord
from canal_trio.observe.ledger import rows
from canal_trio.observe.ledger.filler import Filler, JournalGone
from canal_trio.observe.ledger.journal import Journal, JournalError
from canal_trio.observe.ledger.store import Store, StoreError, open_store
from canal_trio.settings import Ledger as LedgerSettings

__all__ = ["Ledger", "LedgerStatistics"]

GATHER: Final = 1.0  # seconds in which rows gather for one transaction: each costs a busy loop some stumbles
GATHER_BUSY: Final = 3.0  # seconds, behind a time in which `MANY` rows came
MANY: Final = 1024
LOOK: Final = 1.0  # seconds after which the disk is asked again for what it did not take
BACK_OFF_FIRST, BACK_OFF_LAST = 0.1, 5.0  # seconds between tries while the store is away
FINISH: Final = 5.0  # seconds for the last rows, when the process ends

_FULL = "The ledger's journal takes no more: its store is away, or its disk is full."

_log = logging.getLogger("canal_trio.ledger")


@dataclass(frozen=True, slots=True)
class LedgerStatistics:
    """Counts of one ledger."""

    rows: int  # whole rows that the store took
    backlog: int  # bytes that it has not
    open: int  # rows whose exchanges have not ended
    refused: int  # exchanges that were not admitted for its sake
    interrupted: int  # rows that processes which are gone had left open
    store_errors: int


@final
class Ledger:
    """Keeps the rows of one process. Made before `trio.run` or in it; raises `JournalError`."""

    def __init__(self, settings: LedgerSettings, *, worker: int = 0, store: Store | None = None) -> None:
        self._journal = Journal(
            settings.journal, instance=settings.instance, worker=worker, most_bytes=settings.journal_bytes
        )
        self._filler = Filler(self._journal, store or open_store(settings.file, settings.postgres), settings.journal)
        self._open: dict[int, rows.Begun] = {}
        self._written = trio.Event()
        self._fresh = False  # that event is set
        self._finishing = trio.Event()
        self._finished = trio.Event()
        self._refused = self._store_errors = 0
        self._one_thread = trio.CapacityLimiter(1)
        self._away = False  # the store is, as far as was said
        self._closed = False

    @property
    def run_name(self) -> rows.Run:
        """Whose rows these are."""
        return self._journal.run

    # -- hooks.Bookkeeper ----------------------------------------------------------------------------------------------

    def admitted(self, exchanges: Sequence[Admitted]) -> Sequence[int | Failure]:
        """One write(2) for all of them. Their numbers, or the failure: the journal is full. Not a checkpoint."""
        numbers = self._journal.numbers(len(exchanges))
        begun = list(map(rows.opened, numbers, exchanges))
        taken = self._journal.admit(begun)
        self._open.update(zip(numbers[:taken], begun[:taken], strict=True))
        if not self._fresh:
            self._wake()
        if taken == len(begun):
            return numbers
        self._refused += len(begun) - taken
        full = Failure(Side.GATEWAY, Phase.ROUTE, Kind.UNBOOKED, _FULL)
        return [*numbers[:taken], *[full] * (len(begun) - taken)]

    def ended(self, endings: Sequence[tuple[int, ExchangeRecord]]) -> None:
        """One write(2) for all of them. Not a checkpoint."""
        pop = self._open.pop
        self._journal.end([rows.ended(pop(number), record) for number, record in endings])
        if not self._fresh:
            self._wake()

    def _wake(self) -> None:
        self._fresh = True
        self._written.set()

    # -- the store -----------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Fill the store until cancelled, or until `finish` was asked for and done."""
        task_status.started()
        back_off = BACK_OFF_FIRST
        while True:
            last, before = self._finishing.is_set(), self._filler.rows
            if await self._fill():
                back_off = BACK_OFF_FIRST
                if last:
                    break
                with trio.move_on_after(LOOK):
                    await self._written.wait()
                self._written, self._fresh = trio.Event(), False
                busy = self._filler.rows - before >= MANY
                with trio.move_on_after(GATHER_BUSY if busy else GATHER):
                    await self._finishing.wait()
            else:
                if last:
                    await trio.sleep(BACK_OFF_FIRST)
                else:
                    with trio.move_on_after(back_off):
                        await self._finishing.wait()
                back_off = min(back_off * 2, BACK_OFF_LAST)
        self._finished.set()

    async def _fill(self) -> bool:
        """Have everything applied that is there. False: the store cannot take it now."""
        self._journal.retry()
        step = self._filler.step
        try:
            more = True
            while more:
                more = await trio.to_thread.run_sync(step, abandon_on_cancel=True, limiter=self._one_thread)
                self._journal.applied = self._filler.applied
        except JournalGone as exc:
            try:
                _log.error("%s: %d bytes of rows are lost, it is begun anew", exc, self._filler.renew())
            except JournalError as why:
                self._failed("nothing is admitted: %s", why)
            return False
        except StoreError as exc:
            self._failed("the ledger's store is away, rows wait in the journal: %s", exc)
            return False
        if self._away:
            self._away = False
            _log.warning("the ledger's store is back")
        return True

    def _failed(self, text: str, why: CanalError) -> None:
        """Count it, and say it once."""
        self._store_errors += 1
        if not self._away:
            self._away = True
            _log.error(text, why)

    async def finish(self, within: float = FINISH) -> None:
        """No more exchanges will come: have the store take what there is, for at most `within` seconds, and close.

        What it does not take in time is taken at the next start. Not shielded; cancelled, it is the same as late.
        """
        self._finishing.set()
        try:
            with trio.move_on_after(within):
                await self._finished.wait()
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the files and the store, without waiting for either; what is left is taken at the next start. It
        blocks for a moment. Idempotent; not a checkpoint."""
        if self._closed:
            return
        self._closed = True
        backlog = self._journal.backlog
        self._filler.finish()
        if backlog:
            _log.warning("%d bytes wait for the next start, in the ledger's journal %s", backlog, self._journal.folder)

    def statistics(self) -> LedgerStatistics:
        """A snapshot of its counters."""
        return LedgerStatistics(
            self._filler.rows,
            self._journal.backlog,
            self._journal.open,
            self._refused,
            self._filler.interrupted,
            self._store_errors,
        )
