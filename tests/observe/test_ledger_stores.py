"""The stores, SQLite and PostgreSQL, each a real one: the same tests for both."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from ledger_kit import open_row, outcomes, record, rows_in, whole_row
from pgserver import PostgresServer

from canal_trio.observe.ledger import Store, StoreError, open_store
from canal_trio.observe.ledger.rows import LINE_BYTES, Row, Run
from canal_trio.observe.ledger.sqlite import SqliteStore

RUN = Run("gw-1", "b0", 0)


@pytest.fixture(params=["sqlite", "postgres"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store's place."""
    if request.param == "sqlite":
        return str(tmp_path / "ledger.db")
    server: PostgresServer = request.getfixturevalue("postgres")
    with psycopg.connect(server.url) as connection:
        connection.execute("DROP TABLE IF EXISTS exchanges")
    return server.url


@pytest.fixture
def opening(where: str) -> Iterator[Callable[[], Store]]:
    """Opens the store, any number of times; all are closed at the end."""
    made: list[Store] = []

    def one() -> Store:
        postgres = where if where.startswith("postgresql:") else None
        made.append(open_store(None if postgres else where, postgres))
        return made[-1]

    yield one
    for store in made:
        store.close()


def whole(number: int, **changes: object) -> Row:
    """A whole row."""
    exchange = record(number, **changes)
    return whole_row(number, exchange, started_at=exchange.started_at)


def test_a_row_and_its_columns(where: str, opening: Callable[[], Store]) -> None:
    """What is known of an exchange is in its row, under its name, with its unit."""
    ending = record(1, flags=("a", "b"), cancel_latency=0.5, cost=190_000)
    opening().apply(RUN, [([], [whole_row(1, ending)])])
    (row,) = rows_in(where)
    assert row == {
        "instance": "gw-1",
        "boot": "b0",
        "worker": 0,
        "seq": 1,
        "started_at": 1_764_100_001.0,
        "request_id": "req_1",
        "principal": "team-a",
        "key_name": "team-a-1",
        "path": "/v1/chat/completions",
        "model": "gpt-4o-mini",
        "upstream_model": None,
        "upstream": "local",
        "attempts": 1,
        "status": 200,
        "outcome": "completed",
        "phase": "deliver",
        "usage_source": "upstream",
        "prompt_tokens": 100,
        "completion_tokens": 50,
        "cached_tokens": 20,
        "reasoning_tokens": 10,
        "cost": 190_000,
        "request_bytes": 512,
        "response_bytes": 2048,
        "events": 7,
        "first_byte": 0.25,
        "duration": 1.5,
        "cancel_latency": 0.5,
        "flags": "a,b",
    }


def test_applied_twice_is_applied_once(where: str, opening: Callable[[], Store]) -> None:
    """A batch whose commit nobody heard of is applied again, by another connection: nothing changes."""
    started = [open_row(number) for number in range(5)]
    finished = [whole(number) for number in range(3)]
    for _ in range(2):
        opening().apply(RUN, [(started, finished)])
        opening().apply(RUN, [(started, [])])
    assert outcomes(where) == {"completed": 3, "open": 2}


def test_only_ones_own_rows_are_interrupted(where: str, opening: Callable[[], Store]) -> None:
    """What a run left open is marked; rows that have ended, and those of others on the same store, are not."""
    store = opening()
    other = Run("gw-1", "b0", 1)
    another = Run("gw-2", "b9", 0)
    for run in (RUN, other, another):
        store.apply(run, [([open_row(1), open_row(2)], [whole(2)])])
    assert store.interrupt(RUN) == 1
    assert store.interrupt(RUN) == 0
    marked = [(row["boot"], row["worker"], row["seq"]) for row in rows_in(where) if row["outcome"] == "interrupted"]
    assert marked == [("b0", 0, 1)]
    assert outcomes(where) == {"completed": 3, "open": 2, "interrupted": 1}


def test_a_row_that_ended_is_not_opened_again(where: str, opening: Callable[[], Store]) -> None:
    """The open row comes second when a batch is applied again: the whole one stays."""
    store = opening()
    store.apply(RUN, [([], [whole(1)])])
    store.apply(RUN, [([open_row(1)], [])])
    assert outcomes(where) == {"completed": 1}


def test_texts_of_strangers(where: str, opening: Callable[[], Store]) -> None:
    """Whatever a client names, the row is written, and its line is bounded."""
    import msgspec

    wild = "x\0\udc80'; DROP TABLE exchanges; --\U0001f6a2" + "\n" * 10_000
    strange = {"model": wild, "path": wild}
    row = whole_row(1, record(1, **strange), **strange)
    assert len(msgspec.json.encode(row)) < LINE_BYTES
    opening().apply(RUN, [([], [row])])
    (kept,) = rows_in(where)
    assert kept["model"].startswith("x\\0\\udc80'; DROP")


@pytest.mark.parametrize("by", ["key", "model", "upstream", "outcome", "day"])
def test_sums(opening: Callable[[], Store], by: str) -> None:
    """Sums by each grouping, in order, and only of the time that was asked for."""
    store = opening()
    day = 86_400.0
    rows = [
        whole(1, started_at=0 * day + 5),
        whole(2, started_at=1 * day + 5, model="b", upstream="u2"),
        whole_row(3, record(3, usage=None), key=None, principal=None, started_at=day + 9),
        open_row(4, started_at=3 * day),
    ]
    rows[2] = rows[2]._replace(outcome="client_gone", principal=None)
    store.apply(RUN, [([], rows)])
    groups = {
        "key": [("-", 1), ("team-a-1", 3)],
        "model": [("b", 1), ("gpt-4o-mini", 3)],
        "upstream": [("local", 3), ("u2", 1)],
        "outcome": [("client_gone", 1), ("completed", 2), ("open", 1)],
        "day": [("1970-01-01", 1), ("1970-01-02", 2), ("1970-01-04", 1)],
    }
    sums = store.usage(by, 0, float("inf"))
    assert [(one.group, one.exchanges) for one in sums] == groups[by]
    assert sum(one.prompt_tokens for one in sums) == 200
    assert sum(one.unpriced for one in sums) == 2
    assert [one.exchanges for one in store.usage("day", day, 3 * day)] == [2]


def test_sums_of_money_beyond_64_bits_are_exact(opening: Callable[[], Store]) -> None:
    """Costs add up to the last billionth, however much it is together."""
    store = opening()
    store.apply(RUN, [([], [whole(number, cost=6_000_000_000_123_456_789) for number in (1, 2, 3)])])
    (one,) = store.usage("key", 0, float("inf"))
    assert one.cost == 18_000_000_000_370_370_367


def test_an_estimate_is_counted_as_one(opening: Callable[[], Store]) -> None:
    """How many of a sum's exchanges are guesses is said with it."""
    from canal_trio.hooks import UsageSource

    store = opening()
    store.apply(RUN, [([], [whole(1), whole(2, usage_source=UsageSource.ESTIMATED)])])
    (one,) = store.usage("key", 0, float("inf"))
    assert (one.exchanges, one.completed, one.estimated, one.completion_tokens) == (2, 2, 1, 100)


def test_a_server_that_goes_and_comes(postgres: PostgresServer) -> None:
    """While PostgreSQL is away each use says so; when it is back, the same store works on."""
    with psycopg.connect(postgres.url) as connection:
        connection.execute("DROP TABLE IF EXISTS exchanges")
    store = open_store(None, postgres.url)
    try:
        store.apply(RUN, [([open_row(1)], [])])
        postgres.stop()
        for use in (
            lambda: store.apply(RUN, [([], [whole(1)])]),
            lambda: store.interrupt(RUN),
            lambda: store.usage("day", 0, 1),
        ):
            with pytest.raises(StoreError, match=r"^PostgreSQL: "):
                use()
        postgres.start()
        store.apply(RUN, [([], [whole(1)])])
        assert outcomes(postgres.url) == {"completed": 1}
    finally:
        postgres.start()
        store.close()


def test_a_file_that_is_taken_away(tmp_path: Path) -> None:
    """A database that is moved away is not made anew: it is away, and written to again when it is back."""
    path = tmp_path / "ledger.db"
    store = SqliteStore(str(path))
    store.apply(RUN, [([open_row(1)], [])])
    store.close()
    moved = tmp_path / "elsewhere"
    path.rename(moved)
    with pytest.raises(StoreError, match="put it back"):
        store.apply(RUN, [([], [whole(1)])])
    assert not path.exists()
    moved.rename(path)
    store.apply(RUN, [([], [whole(1)])])
    assert outcomes(str(path)) == {"completed": 1}
    # Another file in its place is used, too: somebody wanted it there.
    os.replace(path, moved)
    sqlite3.connect(path).close()
    store.apply(RUN, [([], [whole(2)])])
    store.close()
    assert [row["seq"] for row in rows_in(str(path))] == [2]


def test_a_file_that_is_none(tmp_path: Path) -> None:
    """What is not a database, is locked, or lies nowhere, is a `StoreError` that names it."""
    (tmp_path / "text").write_text("no database, but long enough to be looked at" * 50)
    with pytest.raises(StoreError, match="text: file is not a database"):
        SqliteStore(str(tmp_path / "text")).interrupt(RUN)
    with pytest.raises(StoreError, match="unable to open"):
        SqliteStore(str(tmp_path / "no" / "where")).usage("day", 0, 1)
    store = SqliteStore(str(tmp_path / "ledger.db"), busy=0.01)
    store.apply(RUN, [([], [])])
    other = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StoreError, match="locked"):
        store.apply(RUN, [([], [whole(1)])])
    other.execute("ROLLBACK")
    other.close()
    store.apply(RUN, [([], [whole(1)])])
    store.close()
