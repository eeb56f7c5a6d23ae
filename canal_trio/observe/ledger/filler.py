"""From the journal into the store: batches, each one transaction, in a thread.

The journal of this process is followed while it is written; those that other processes of this instance have left
behind (each is claimed by its lock, so a living one's never is) are applied to their end, and what they left open is
marked as interrupted. Invariant: a segment is removed only when the store has confirmed all of its rows, so a store may
be away, or die in the middle of a batch, at any time; and applying a batch again changes nothing.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from itertools import chain
from typing import Final, final

from canal_trio.observe.ledger.journal import Journal, JournalReader, claim, left_behind
from canal_trio.observe.ledger.rows import Chunk, Run
from canal_trio.observe.ledger.store import Store, StoreError

__all__ = ["BATCH_BYTES", "Filler", "JournalGone"]

BATCH_BYTES: Final = 4 * 1024 * 1024  # of the journal, for one transaction: some 12,000 exchanges


class JournalGone(StoreError):
    """Somebody has removed this process's own journal. `renew` is due."""


@final
class Filler:
    """Fills `store` from the journals in `folder`. Its methods block, and may be called by one thread at a time."""

    def __init__(self, journal: Journal, store: Store, folder: str) -> None:
        self._journal = journal
        self._store = store
        self._folder = folder
        self._reader = JournalReader(journal.folder, followed=True)
        self._one = threading.Lock()  # a thread that was given up may still be at it
        self.rows = 0  # whole rows that the store took
        self.interrupted = 0
        self.leftovers = True  # there may be journals of processes that are gone

    @property
    def applied(self) -> int:
        """Bytes of this process's journal that the store has."""
        return self._reader.consumed

    @property
    def broken(self) -> int:
        """Lines of this process's journal that were none."""
        return self._reader.broken

    def step(self) -> bool:
        """Apply one batch. True: it was a full one, so another one waits. Raises `StoreError`, with nothing lost.

        What is less than a full one had better gather: a busy gateway writes a few rows while a batch is applied, and
        would have them applied in transactions of a few rows each, without an end.
        """
        with self._one:
            if self.leftovers:
                self._recover()
            self._batch(self._reader, self._journal.run)
            return self._reader.full

    def renew(self) -> int:
        """Begin this process's journal anew: how many bytes of it are lost. Raises `JournalError`."""
        return self._journal.renew(self._reader.number + 1)

    def _batch(self, reader: JournalReader, run: Run) -> bool:
        chunks = _chunks(reader)
        first = next(chunks, None)
        if first is not None:
            self._store.apply(run, chain((first,), chunks))
        try:
            reader.commit()
        except OSError as exc:
            raise _trouble(reader, exc) from None
        self.rows += reader.rows
        return first is not None

    def _recover(self) -> None:
        for path in left_behind(self._folder, self._journal.run.instance, but=self._journal.folder):
            with claim(path) as run:
                if run is None:
                    continue  # alive, or another one's to see to
                reader = JournalReader(path)
                while self._batch(reader, run):
                    pass
                self.interrupted += self._store.interrupt(run)
                shutil.rmtree(path, ignore_errors=True)
        self.leftovers = False

    def finish(self) -> None:
        """The process ends in good order: if the store has all its rows, its journal is removed. Blocks."""
        if not self._one.acquire(blocking=False):
            return  # a thread waits for a store that does not answer: everything stays for the next start
        journal = self._journal
        if journal.open == 0 and journal.retry() and journal.written == self._reader.consumed:
            shutil.rmtree(journal.folder, ignore_errors=True)
        journal.close()
        self._store.close()


def _chunks(reader: JournalReader) -> Iterator[Chunk]:
    try:
        yield from reader.read(BATCH_BYTES)
    except OSError as exc:
        raise _trouble(reader, exc) from None


def _trouble(reader: JournalReader, exc: OSError) -> StoreError:
    kind = JournalGone if reader.followed and isinstance(exc, FileNotFoundError) else StoreError
    return kind(f"the journal in {reader.folder}: {exc.strerror or exc}")
