"""What the journal's tests share: rows that are admitted and ended, and everything that can be read."""

from __future__ import annotations

from ledger_kit import admitted, record

from canal_trio.observe.ledger.journal import Journal, JournalReader
from canal_trio.observe.ledger.rows import Row, ended, opened

__all__ = ["MUCH", "admit", "finish", "read", "read_all", "start"]

MUCH = 10**9


def start(journal: Journal) -> int:
    """Admit one more; its number."""
    number = admit(journal)
    assert number is not None
    return number


def admit(journal: Journal) -> int | None:
    """Try to admit one more; its number, if it was."""
    (number,) = journal.numbers(1)
    return number if journal.admit([opened(number, admitted(number))]) else None


def finish(journal: Journal, number: int) -> None:
    """End it."""
    journal.end([ended(opened(number, admitted(number)), record(number))])


def read(reader: JournalReader, most: int = MUCH) -> tuple[list[Row], list[Row]]:
    """What one read finds, all chunks together."""
    chunks = list(reader.read(most))
    return [row for started, _ in chunks for row in started], [row for _, finished in chunks for row in finished]


def read_all(reader: JournalReader, most: int = 10_000) -> dict[int, str]:
    """Everything there is, applied as a store would: number -> outcome."""
    kept: dict[int, str] = {}
    while True:
        started, finished = read(reader, most)
        if not started and not finished:
            return kept
        for row in started:
            kept.setdefault(row.seq, row.outcome)
        kept |= {row.seq: row.outcome for row in finished}
        reader.commit()
