"""Rows in PostgreSQL, where several machines share them. Needs psycopg, whose synchronous side a thread calls: its
asynchronous one does not run on Trio.

One connection, made when it is needed and given up at the first error. The server is never waited for without a limit.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, final

import psycopg

from canal_trio.observe.ledger.rows import INTERRUPTED, OPEN, Chunk, Run
from canal_trio.observe.ledger.store import ALL, GROUPS, KEY, SUMS, StoreError, Sums, sums_of

__all__ = ["PostgresStore"]

CONNECT: Final = 5  # seconds
STATEMENT: Final = 20_000  # milliseconds
SILENCE: Final = 10_000  # milliseconds without the server's kernel taking what we sent

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS exchanges (
    instance text NOT NULL, boot text NOT NULL, worker integer NOT NULL, seq bigint NOT NULL,
    started_at double precision NOT NULL, request_id text NOT NULL, principal text, key_name text, path text NOT NULL,
    model text, upstream_model text, upstream text, attempts integer NOT NULL, status integer, outcome text NOT NULL,
    phase text NOT NULL, usage_source text NOT NULL, prompt_tokens bigint, completion_tokens bigint,
    cached_tokens bigint, reasoning_tokens bigint, cost bigint, request_bytes bigint NOT NULL,
    response_bytes bigint NOT NULL, events bigint NOT NULL, first_byte double precision, duration double precision,
    cancel_latency double precision, flags text NOT NULL, PRIMARY KEY (boot, worker, seq)
);
CREATE INDEX IF NOT EXISTS exchanges_started ON exchanges (started_at);
"""
_LOCK: Final = 0x63616E616C  # any number: gateways that start at once must not make the table twice
_INSERT: Final = (
    f"INSERT INTO exchanges ({', '.join(ALL)}) VALUES ({', '.join(['%s'] * len(ALL))})"
    f" ON CONFLICT ({', '.join(KEY)}) DO "
)
_OPEN: Final = _INSERT + "NOTHING"
_WHOLE: Final = _INSERT + "UPDATE SET " + ", ".join(f"{name} = excluded.{name}" for name in ALL if name not in KEY)


@final
class PostgresStore:
    """A `Store` in the database at `url`, in the table `exchanges` of its default schema."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._connection: psycopg.Connection[tuple[Any, ...]] | None = None

    def _connected(self) -> psycopg.Connection[tuple[Any, ...]]:
        if self._connection is None:
            connection = psycopg.connect(
                self._url,
                connect_timeout=CONNECT,
                tcp_user_timeout=SILENCE,
                options=f"-c statement_timeout={STATEMENT} -c application_name=canal-trio",
            )
            try:
                with connection.transaction():
                    connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
                    connection.execute(_SCHEMA)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _trouble(self, exc: Exception) -> StoreError:
        self.close()
        return StoreError(f"PostgreSQL: {' '.join(str(exc).split()) or type(exc).__name__}")

    def apply(self, run: Run, chunks: Iterable[Chunk]) -> None:
        """See `Store`."""
        name = (run.instance, run.boot, run.worker)
        try:
            connection = self._connected()
            with connection.transaction(), connection.cursor() as cursor:
                for started, finished in chunks:
                    if started:
                        cursor.executemany(_OPEN, [name + row for row in started])
                    if finished:
                        cursor.executemany(_WHOLE, [name + row for row in finished])
        except (psycopg.Error, OSError) as exc:
            raise self._trouble(exc) from None

    def interrupt(self, run: Run) -> int:
        """See `Store`."""
        try:
            connection = self._connected()
            with connection.transaction():
                return connection.execute(
                    "UPDATE exchanges SET outcome = %s WHERE boot = %s AND worker = %s AND outcome = %s",
                    (INTERRUPTED, run.boot, run.worker, OPEN),
                ).rowcount
        except (psycopg.Error, OSError) as exc:
            raise self._trouble(exc) from None

    def usage(self, by: str, since: float, until: float) -> list[Sums]:
        """See `Store`."""
        group = GROUPS.get(by, "to_char(to_timestamp(started_at) AT TIME ZONE 'UTC', 'YYYY-MM-DD')")
        query = (
            f'SELECT ({group}) COLLATE "C" AS grouped, {SUMS} FROM exchanges'
            " WHERE started_at >= %s AND started_at < %s GROUP BY grouped ORDER BY grouped"
        )
        try:
            connection = self._connected()
            with connection.transaction():
                rows = connection.execute(query.encode(), (since, until)).fetchall()
        except (psycopg.Error, OSError) as exc:
            raise self._trouble(exc) from None
        return [sums_of(row) for row in rows]

    def close(self) -> None:
        """See `Store`."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
