"""What the ledger's tests share: records, and rows read from a store by other means than the product's."""

from __future__ import annotations

import sqlite3
from collections import Counter
from typing import Any

from canal_trio.errors import Phase
from canal_trio.hooks import Admitted, ExchangeRecord, Outcome, Usage, UsageSource
from canal_trio.observe.ledger.rows import Row, decode, ended, lines_of, opened

__all__ = ["admitted", "open_row", "outcomes", "record", "rows_in", "whole_row"]


def admitted(number: int = 1, **changes: Any) -> Admitted:
    """An exchange that is about to go upstream."""
    fields: dict[str, Any] = {
        "request_id": f"req_{number}",
        "started_at": 1_764_100_000.0 + number,
        "path": "/v1/chat/completions",
        "principal": "team-a",
        "key": "team-a-1",
        "model": "gpt-4o-mini",
        "upstream": "local",
    }
    return Admitted(**(fields | changes))


def record(number: int = 1, **changes: Any) -> ExchangeRecord:
    """The same, when it is over."""
    fields: dict[str, Any] = {
        "request_id": f"req_{number}",
        "started_at": 1_764_100_000.0 + number,
        "client": "10.0.0.9",
        "method": "POST",
        "path": "/v1/chat/completions",
        "outcome": Outcome.COMPLETED,
        "phase": Phase.DELIVER,
        "status": 200,
        "principal": "team-a",
        "model": "gpt-4o-mini",
        "upstream": "local",
        "attempts": 1,
        "streamed": True,
        "request_bytes": 512,
        "response_bytes": 2048,
        "events": 7,
        "first_byte": 0.25,
        "duration": 1.5,
        "usage": Usage(100, 50, 20, 10),
        "usage_source": UsageSource.UPSTREAM,
    }
    return ExchangeRecord(**(fields | changes))


def open_row(number: int = 1, **changes: Any) -> Row:
    """The row of an exchange that runs, as its line in the journal says it."""
    row = decode(lines_of([opened(number, admitted(number, **changes))]))
    assert row is not None
    return row


def whole_row(number: int, exchange: ExchangeRecord, **changes: Any) -> Row:
    """The row of an exchange that has ended, as its line in the journal says it."""
    row = decode(lines_of([ended(opened(number, admitted(number, **changes)), exchange)]))
    assert row is not None
    return row


def rows_in(where: str) -> list[dict[str, Any]]:
    """All rows in a SQLite file or at a PostgreSQL URL, as dictionaries, in order."""
    query = "SELECT * FROM exchanges ORDER BY boot, worker, seq"
    if where.startswith("postgresql:"):
        import psycopg
        from psycopg.rows import dict_row

        with psycopg.connect(where, row_factory=dict_row) as connection:
            return connection.execute(query).fetchall()
    connection = sqlite3.connect(where)
    try:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(query)]
    finally:
        connection.close()


def outcomes(where: str) -> Counter[str]:
    """How many rows there are of each outcome; none while there is no table yet."""
    try:
        return Counter(row["outcome"] for row in rows_in(where))
    except sqlite3.OperationalError:
        return Counter()
