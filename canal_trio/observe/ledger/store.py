"""What every store of rows does, and what is asked of it.

Stores are synchronous: a thread calls them. Each call is one transaction. Invariant: `apply` and `interrupt` may be
repeated, with the same result, because nobody knows whether a commit whose answer was lost has happened.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from canal_trio.errors import CanalError
from canal_trio.observe.ledger.rows import COLUMNS, Chunk, Run

__all__ = ["BY", "Store", "StoreError", "Sums", "open_store"]

BY: Final = ("key", "model", "upstream", "outcome", "day")
KEY: Final = ("boot", "worker", "seq")  # the name of a row
ALL: Final = ("instance", "boot", "worker", *COLUMNS)


class StoreError(CanalError):
    """The store cannot be used now. The text says why."""


@dataclass(frozen=True, slots=True)
class Sums:
    """What a group of rows adds up to. `estimated` and `unpriced` count exchanges; `cost` is in billionths."""

    group: str
    exchanges: int
    completed: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    estimated: int
    cost: int
    unpriced: int


class Store(Protocol):
    """Holds the rows. Every method raises `StoreError` if it cannot do its work, and may be tried again."""

    def apply(self, run: Run, chunks: Iterable[Chunk]) -> None:
        """Have all these rows of `run`, or none: open ones where there is none yet, whole ones instead of any. What
        `chunks` raises is passed on."""

    def interrupt(self, run: Run) -> int:
        """The process is gone: mark what it left open; how many those are."""

    def usage(self, by: str, since: float, until: float) -> list[Sums]:
        """Sums of the rows that started in this time (Unix, `until` excluded), by one of `BY`, in its order."""

    def close(self) -> None:
        """Let go of the connection. Idempotent."""


# Money in two sums, of units and of the billionths beside them: 64 bits may not hold the sum of all billionths.
SUMS: Final = """count(*), sum(CASE WHEN outcome = 'completed' THEN 1 ELSE 0 END),
    coalesce(sum(prompt_tokens), 0), coalesce(sum(completion_tokens), 0),
    coalesce(sum(cached_tokens), 0), coalesce(sum(reasoning_tokens), 0),
    sum(CASE WHEN usage_source = 'estimated' THEN 1 ELSE 0 END),
    sum(CASE WHEN prompt_tokens IS NOT NULL AND cost IS NULL THEN 1 ELSE 0 END),
    coalesce(sum(cost / 1000000000), 0), coalesce(sum(cost - cost / 1000000000 * 1000000000), 0)"""
GROUPS: Final = {
    "key": "coalesce(key_name, principal, '-')",
    "model": "coalesce(model, '-')",
    "upstream": "coalesce(upstream, '-')",
    "outcome": "outcome",
}


def sums_of(row: Sequence[Any]) -> Sums:
    """What the store has answered to a question for the group and `SUMS`."""
    *numbers, unpriced, units, billionths = map(int, row[1:])
    numbers += [units * 10**9 + billionths, unpriced]
    return Sums(str(row[0]), *numbers)


def open_store(file: str | None, postgres: str | None) -> Store:
    """The store that the settings name; it connects when it is used. `postgres` needs psycopg."""
    if postgres is not None:
        from canal_trio.observe.ledger.postgres import PostgresStore  # late: an extra

        return PostgresStore(postgres)
    from canal_trio.observe.ledger.sqlite import SqliteStore

    assert file is not None
    return SqliteStore(file)
