"""The ledger of a real process: kills under load, several workers, and the command that reads it."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from serve_fakes import read_all
from serve_process import Process, running
from workers_kit import BODY, CHAT, two_workers

from canal_trio.testing.scripts import Pause, Script, chat_stream
from canal_trio.testing.upstreams import ScriptedUpstream

KILLS = 3  # `python -m loadtest ledger` does fifty
CLIENTS = 8
LEDGER = '[ledger]\nfile = "ledger.db"\ninstance = "gw"\n'


def rows_in(file: Path) -> list[tuple[str, str]]:
    """(request id, outcome) of all rows; none while there is no table yet."""
    connection = sqlite3.connect(file)
    try:
        return connection.execute("SELECT request_id, outcome FROM exchanges").fetchall()
    except sqlite3.OperationalError:
        return []
    finally:
        connection.close()


async def keep_asking(process: Process, nursery: trio.Nursery) -> None:
    """Clients that ask again and again, until the gateway dies under them."""
    address = await process.address()

    async def client() -> None:
        while True:
            try:
                stream = await process.ask(address, CHAT, BODY)
                while await stream.receive_some():
                    pass
            except OSError:
                return
            except trio.BrokenResourceError:
                continue
            finally:
                await trio.lowlevel.checkpoint()

    for _ in range(CLIENTS):
        nursery.start_soon(client)


@asynccontextmanager
async def booked(tmp_path: Path, upstream: ScriptedUpstream) -> AsyncIterator[tuple[Process, Path]]:
    """A gateway with a ledger in front of this upstream."""
    config = tmp_path / "canal.toml"
    config.write_text(f'{LEDGER}[[upstream]]\nname = "up"\nbase_url = "{upstream.base_url}"\n')
    async with running("--config", str(config)) as process:
        yield process, config


async def test_killed_under_load_every_admitted_request_has_one_row(tmp_path: Path) -> None:
    """SIGKILL under load, again and again: whatever the upstream has seen has exactly one row, and none stays open."""
    whole = chat_stream(3)
    script = Script((*whole.steps[:2], Pause(0.02), *whole.steps[2:]))
    async with ScriptedUpstream(script) as upstream:
        for number in range(KILLS):
            async with booked(tmp_path, upstream) as (process, _), trio.open_nursery() as nursery:
                await keep_asking(process, nursery)
                before = len(upstream.requests)
                await upstream.until(lambda before=before, number=number: len(upstream.requests) > before + 20 + number)
                process.signal(signal.SIGKILL)
                assert await process.ended() == -signal.SIGKILL
                nursery.cancel_scope.cancel()
        async with booked(tmp_path, upstream) as (process, config):
            await process.address()
            with trio.fail_after(20):
                while len(os.listdir(tmp_path / "ledger.db.journal")) > 1:  # noqa: ASYNC110  # another process
                    await trio.sleep(0.05)
            process.signal(signal.SIGTERM)
            assert await process.ended() == 0
        seen = [request.header("x-request-id") for request in upstream.requests]
    rows = Counter(request_id for request_id, _ in rows_in(tmp_path / "ledger.db"))
    outcomes = Counter(outcome for _, outcome in rows_in(tmp_path / "ledger.db"))
    assert set(rows.values()) == {1}
    assert set(seen) <= set(rows)
    assert len(rows) - len(set(seen)) <= KILLS * CLIENTS, "noted, and killed before it was sent"
    assert outcomes["open"] == 0
    assert 0 < outcomes["interrupted"] <= KILLS * CLIENTS
    assert outcomes["completed"] > KILLS * 10
    assert os.listdir(tmp_path / "ledger.db.journal") == []
    _reads(config, len(rows))


def _reads(config: Path, count: int) -> None:
    """The command counts them all."""
    command = [sys.executable, "-m", "canal_trio", "usage", "-c", str(config), "--by", "outcome", "--format", "json"]
    said = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
    assert sum(group["exchanges"] for group in json.loads(said)) == count


async def test_a_worker_that_is_killed_leaves_interrupted_rows(tmp_path: Path) -> None:
    """Its successor marks what it had open; the other worker's stream, and its row, go on to their end."""
    file = tmp_path / "ledger.db"
    async with two_workers(config=LEDGER, folder=tmp_path) as workers:
        clients = await workers.spread()
        victim = workers.pids[0]
        os.kill(victim, signal.SIGKILL)
        with trio.fail_after(30):
            # The other worker's rows gather for a second before they are there.
            while (found := Counter(o for _, o in rows_in(file)))["interrupted"] == 0 or found.total() < len(clients):  # noqa: ASYNC110  # as above
                await trio.sleep(0.05)
        open_now = Counter(outcome for _, outcome in rows_in(file))
        assert open_now["interrupted"] >= 1
        assert open_now["interrupted"] + open_now["open"] == len(clients)
        await workers.reaches("canal_ledger_interrupted", open_now["interrupted"])
        workers.go.set()
        for client in clients:
            await read_all(client)
        workers.process.signal(signal.SIGTERM)
        await workers.process.ended()
    ended = Counter(outcome for _, outcome in rows_in(file))
    assert ended == {"interrupted": open_now["interrupted"], "completed": len(clients) - open_now["interrupted"]}
    assert os.listdir(tmp_path / "ledger.db.journal") == []


async def test_a_journal_that_cannot_be_kept_is_said_at_once(tmp_path: Path) -> None:
    """A gateway that could not account for anything does not start, and says why in one line."""
    (tmp_path / "j").symlink_to("nowhere/j")
    config = tmp_path / "canal.toml"
    config.write_text(
        '[ledger]\nfile = "l.db"\njournal = "j"\n[[upstream]]\nname = "a"\nbase_url = "http://127.0.0.1:1"\n'
    )
    async with running("--config", str(config)) as process:
        assert await process.ended() == 1
        assert "the ledger's journal cannot be kept in" in process.said
        assert "Traceback" not in process.said


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test writes into the working directory."""
    monkeypatch.chdir(Path(__file__).parent.parent.parent)
