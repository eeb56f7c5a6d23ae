"""Rows in a SQLite file: write-ahead log, one transaction for each batch.

Several processes of one machine may share it. A file that was there and is not any more is *away*, not to be made anew:
somebody may be about to put it back.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Final, final

from canal_trio.observe.ledger.rows import COLUMNS, INTERRUPTED, OPEN, Chunk, Row, Run
from canal_trio.observe.ledger.store import ALL, GROUPS, KEY, SUMS, StoreError, Sums, sums_of

__all__ = ["SqliteStore"]

BUSY: Final = 5.0  # seconds to wait for another process's transaction

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS exchanges (
    instance TEXT NOT NULL, boot TEXT NOT NULL, worker INTEGER NOT NULL, seq INTEGER NOT NULL,
    started_at REAL NOT NULL, request_id TEXT NOT NULL, principal TEXT, key_name TEXT, path TEXT NOT NULL, model TEXT,
    upstream_model TEXT, upstream TEXT, attempts INTEGER NOT NULL, status INTEGER, outcome TEXT NOT NULL,
    phase TEXT NOT NULL, usage_source TEXT NOT NULL, prompt_tokens INTEGER, completion_tokens INTEGER,
    cached_tokens INTEGER, reasoning_tokens INTEGER, cost INTEGER, request_bytes INTEGER NOT NULL,
    response_bytes INTEGER NOT NULL, events INTEGER NOT NULL, first_byte REAL, duration REAL, cancel_latency REAL,
    flags TEXT NOT NULL, PRIMARY KEY (boot, worker, seq)
);
CREATE INDEX IF NOT EXISTS exchanges_started ON exchanges (started_at);
"""
_INTO: Final = f"INSERT INTO exchanges ({', '.join(ALL)}) VALUES "
_ROW: Final = f"(?1, ?2, ?3, {', '.join('?' * len(COLUMNS))})"  # the run's name is the same for all of them
_CONFLICT: Final = f" ON CONFLICT ({', '.join(KEY)}) DO "
_OPEN: Final = _CONFLICT + "NOTHING"
_WHOLE: Final = _CONFLICT + "UPDATE SET " + ", ".join(f"{name} = excluded.{name}" for name in ALL if name not in KEY)
# Rows of one statement. sqlite3 lets go of the interpreter's lock for each statement, and to get it back from a busy
# loop costs both of them their caches: with one statement for each row a small exchange cost 100 microseconds more, and
# with 256 rows in one 13 more than with 1024. (26,627 parameters; SQLite takes 32,766.)
_AT_ONCE: Final = (1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1)


def _insert(connection: sqlite3.Connection, run: Run, rows: Sequence[Row], conflict: str) -> None:
    at = 0
    for count in _AT_ONCE:
        while len(rows) - at >= count:
            statement = _INTO + ",".join([_ROW] * count) + conflict
            values = chain.from_iterable(rows[at : at + count])
            connection.execute(statement, (run.instance, run.boot, run.worker, *values))
            at += count


@final
class SqliteStore:
    """A `Store` in the file `path`, which is made with its first use."""

    def __init__(self, path: str, *, busy: float = BUSY) -> None:
        self._path = path
        self._busy = busy
        self._connection: sqlite3.Connection | None = None
        self._inode: int | None = None  # of the file, once it was seen

    def _connected(self) -> sqlite3.Connection:
        if self._inode is not None:
            try:
                inode = os.stat(self._path).st_ino
            except OSError as exc:
                self.close()
                raise StoreError(
                    f"{self._path}: {exc.strerror or exc}; put it back, or restart to begin anew"
                ) from None
            if inode != self._inode:
                self.close()
        if self._connection is None:
            connection = sqlite3.connect(self._path, timeout=self._busy, isolation_level=None, check_same_thread=False)
            try:
                # A row has some 200 bytes: in pages of 4 KiB it cost half as much again. An old file keeps its own.
                connection.execute("PRAGMA page_size = 8192")
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")
                connection.executescript(_SCHEMA)
                self._inode = os.stat(self._path).st_ino
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _trouble(self, exc: Exception) -> StoreError:
        self.close()
        return StoreError(f"{self._path}: {exc}")

    def apply(self, run: Run, chunks: Iterable[Chunk]) -> None:
        """See `Store`."""
        try:
            connection = self._connected()
            connection.execute("BEGIN IMMEDIATE")
            try:
                for started, finished in chunks:
                    _insert(connection, run, started, _OPEN)
                    _insert(connection, run, finished, _WHOLE)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
        except (sqlite3.Error, OSError) as exc:
            raise self._trouble(exc) from None

    def interrupt(self, run: Run) -> int:
        """See `Store`."""
        try:
            found = self._connected().execute(
                "UPDATE exchanges SET outcome = ? WHERE boot = ? AND worker = ? AND outcome = ?",
                (INTERRUPTED, run.boot, run.worker, OPEN),
            )
        except (sqlite3.Error, OSError) as exc:
            raise self._trouble(exc) from None
        return found.rowcount

    def usage(self, by: str, since: float, until: float) -> list[Sums]:
        """See `Store`."""
        group = GROUPS.get(by, "strftime('%Y-%m-%d', started_at, 'unixepoch')")
        try:
            rows = self._connected().execute(
                f"SELECT {group} AS grouped, {SUMS} FROM exchanges WHERE started_at >= ? AND started_at < ?"
                " GROUP BY grouped ORDER BY grouped",
                (since, until),
            )
            return [sums_of(row) for row in rows]
        except (sqlite3.Error, OSError) as exc:
            raise self._trouble(exc) from None

    def close(self) -> None:
        """See `Store`."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
