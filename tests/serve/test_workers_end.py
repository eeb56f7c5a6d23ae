"""How several workers end: drains, signals, deaths of the parent and of a worker."""

from __future__ import annotations

import os
import pathlib
import re
import signal

from serve_fakes import eventually, read_all, refused
from workers_kit import Workers, two_workers


def alive(pid: int) -> bool:
    """Does the process run? A zombie does not."""
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state.rpartition(")")[2].split()[0] != "Z"


async def test_drain() -> None:
    """SIGTERM: nobody new, `/readyz` says so, every stream of both workers comes whole, exit code 0."""
    async with two_workers() as workers:
        process = workers.process
        address = await process.address()
        clients = await workers.spread()
        process.signal(signal.SIGTERM)
        await process.saying("draining: 2 workers")
        await eventually(lambda: refused(address))
        assert await workers.page("/readyz") == b"draining\n"
        assert len(await workers.streams()) == len(clients)
        workers.go.set()
        for client in clients:
            assert b"[DONE]" in await read_all(client)
        assert await process.ended() == 0
        assert "stopped: every worker has drained" in process.said


async def test_a_second_signal_stops_all_workers_now() -> None:
    """No waiting for streams, no made-up end, exit code 1, nothing left."""
    async with two_workers() as workers:
        clients = await workers.spread()
        pids = workers.pids
        workers.process.signal(signal.SIGINT)
        await workers.process.saying("draining: 2 workers")
        workers.process.signal(signal.SIGINT)
        assert await workers.process.ended() == 1
        for client in clients:
            assert not (await read_all(client)).endswith(b"0\r\n\r\n")
        assert not any(map(alive, pids))


async def test_a_worker_killed_while_draining_shows_in_the_exit_code() -> None:
    """Its streams did not end cleanly; it is not started again."""
    async with two_workers() as workers:
        await workers.spread()
        pids = workers.pids
        workers.process.signal(signal.SIGTERM)
        await workers.process.saying("draining: 2 workers")
        await eventually(lambda: refused_by(workers))
        os.kill(pids[0], signal.SIGKILL)
        workers.go.set()
        assert await workers.process.ended() == 1
        assert "a new one starts" not in workers.process.said


def refused_by(workers: Workers) -> bool:
    """Both workers have heard of the drain: they said so."""
    return len(re.findall(r"worker \d: draining: ", workers.process.said)) == 2


async def test_workers_drain_when_their_parent_dies() -> None:
    """SIGKILL of the parent: no new connection, the streams come whole, then nothing is left."""
    async with two_workers() as workers:
        address = await workers.process.address()
        clients = await workers.spread()
        pids = workers.pids
        workers.process.signal(signal.SIGKILL)
        await eventually(lambda: refused(address))
        assert all(map(alive, pids))
        workers.go.set()
        for client in clients:
            assert b"[DONE]" in await read_all(client)
        await eventually(lambda: not any(map(alive, pids)), 20)


async def test_a_terminals_signals_are_the_parents() -> None:
    """SIGINT and SIGHUP to a worker do nothing, SIGTERM drains this one, and a new one takes its place."""
    async with two_workers() as workers:
        first, second = workers.pids
        for number in (signal.SIGINT, signal.SIGHUP):
            os.kill(first, number)
        os.kill(first, signal.SIGTERM)
        found = await workers.process.saying(r"worker (\d) ended with exit code 0; a new one starts")
        assert f"worker {found[1]}: draining: " in workers.process.said
        await workers.reaches("canal_workers", 2)
        assert second in workers.pids
        assert first not in workers.pids
        assert await workers.metric("canal_worker_restarts_total") == 1
