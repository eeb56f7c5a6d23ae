"""Limits over several processes: exact for the machine, free again when a worker dies, and money outlives a restart."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import time
from collections.abc import Callable

import pytest
import trio
from serve_fakes import read_all
from serve_process import running
from workers_kit import BODY, CHAT, Workers, two_workers

from canal_trio.config import Flags, load
from canal_trio.errors import ConfigError
from canal_trio.policy.ratelimit import Ask, Moment, Rule, State
from canal_trio.policy.scopes import Scope
from canal_trio.quota.memory import Busy, MemoryStore, SharedMemory, memory_for
from canal_trio.quota.spending import Spending
from canal_trio.quota.table import WAYS
from canal_trio.serve.counting import Counting, stores_of_worker
from canal_trio.settings import Key, Limit, LimitStore, Settings
from canal_trio.testing.scripts import Script, chat_stream
from canal_trio.testing.upstreams import ScriptedUpstream

NOW = Moment(1000.0, 20_000, 24_000, 3600.0, 86_400.0)
ONE = Scope("one", Rule(Limit(streams=1, spend_day=100)), "total", "this gateway")


async def _let_in(workers: Workers, clients: list[trio.SocketStream]) -> bool:
    """One more stream, if the limit lets it in."""
    client = await workers.process.ask(await workers.process.address(), CHAT, BODY)
    data = b""
    with trio.fail_after(20):
        while b"word0" not in data and b"rate_limit_exceeded" not in data:
            piece = await client.receive_some()
            assert piece, data
            data += piece
    if b"word0" in data:
        clients.append(client)
        return True
    return False


async def test_a_killed_workers_places_are_free_again(tmp_path: pathlib.Path) -> None:
    """Two workers let in exactly the limit together; SIGKILL of one frees what it had in flight, and not one more."""
    most = 20  # all in one worker with a probability of 2 to the -19
    async with two_workers(config=f"[[limit]]\nstreams = {most}\n", folder=tmp_path) as workers:
        clients: list[trio.SocketStream] = []
        for _ in range(most):
            assert await _let_in(workers, clients)
        for _ in range(4):
            assert not await _let_in(workers, clients)
        rows = await workers.streams()
        assert len(rows) == most
        os.kill(workers.pids[0], signal.SIGKILL)
        found = await workers.process.saying(r"worker (\d) died of SIGKILL; a new one starts in 0\.1 s")
        lost = sum(row["worker"] == int(found[1]) for row in rows)
        assert 0 < lost < most
        await workers.reaches("canal_workers", 2)
        for _ in range(lost):
            assert await _let_in(workers, clients)
        assert not await _let_in(workers, clients)
        assert await workers.metric('canal_limit_rejections_total{limit="streams",scope="total"}') >= 1
        workers.go.set()
        await workers.reaches("canal_exchanges_in_flight", 0)
        assert await _let_in(workers, clients)


async def test_a_budget_outlives_a_restart(tmp_path: pathlib.Path) -> None:
    """What was spent is in the file when the gateway has ended, and counts when it starts again."""
    async with ScriptedUpstream(Script(chat_stream(2).steps)) as upstream:
        file = tmp_path / "canal.toml"
        file.write_text(
            '[limits]\nstate = "spent.json"\n[[limit]]\nspend_per_month = 0.5\n'
            f'[[price]]\nmodel = "*"\nrequest = 1.0\n[[upstream]]\nname = "up"\nbase_url = "{upstream.base_url}"\n'
        )
        for answer in (b"[DONE]", b"insufficient_quota"):
            async with running("--config", str(file)) as process:
                data = await read_all(await process.ask(await process.address(), CHAT, BODY))
                assert answer in data
                process.signal(signal.SIGTERM)
                assert await process.ended() == 0
            (spent,) = json.loads((tmp_path / "spent.json").read_text())["spent"].values()
            assert spent[3] == 10**9


def test_one_gateway_at_a_time_has_the_file(tmp_path: pathlib.Path) -> None:
    """A second one is told so, and nothing of the first one's is lost; afterwards it may have it."""
    settings = Settings(limit_store=LimitStore(state=str(tmp_path / "spent.json")))
    first = Counting(settings)
    with pytest.raises(ConfigError, match="is in use by another gateway"):
        Counting(settings)
    first.close()
    Counting(settings).close()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"{", "is not what this gateway wrote"),
        (b"\xff", "is not what this gateway wrote"),
        (b'{"version":2,"spent":{}}', "is of version 2"),
        (b'{"version":1,"spent":{"00":[1]}}', "is not what this gateway wrote"),
        (b'{"version":1,"spent":{"%b":[1,2,3,4]}}' % (b"z" * 32), "a name is no digest"),
    ],
)
def test_a_damaged_file_does_not_give_the_budgets_back(tmp_path: pathlib.Path, content: bytes, complaint: str) -> None:
    """The start stops, the file stays as it is."""
    file = tmp_path / "spent.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=complaint):
        Counting(Settings(limit_store=LimitStore(state=str(file))))
    assert file.read_bytes() == content
    with pytest.raises(ConfigError, match="cannot write"):
        Counting(Settings(limit_store=LimitStore(state=str(tmp_path / "nowhere" / "spent.json"))))


async def _at_last(condition: Callable[[], bool]) -> None:
    """Wait until it holds: a thread works in real time, whatever the clock says."""
    end = time.monotonic() + 20
    while not condition():  # as above
        assert time.monotonic() < end
        await trio.sleep(0.5)


async def test_what_is_spent_is_written_every_second(
    autojump_clock: trio.testing.MockClock, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In a thread, only if there is something new; a disk that does not take it is told once, and tried again."""
    caplog.set_level("INFO", "canal_trio.quota")
    table = SharedMemory.make(WAYS, 1).table(0)
    path = tmp_path / "folder" / "spent.json"
    path.parent.mkdir()
    spending = Spending(str(path), table, lambda: NOW)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(spending.run)
        await trio.sleep(5)
        assert not path.exists()
        table.admit([ONE], Ask(0, 7), NOW)
        path.with_name("spent.json.new").mkdir()
        await _at_last(lambda: spending.failed >= 2)
        assert not path.exists()
        path.with_name("spent.json.new").rmdir()
        await _at_last(lambda: not spending.failed)
        assert b"[20000,7,24000,7]" in path.read_bytes()
        nursery.cancel_scope.cancel()
    table.settle([(ONE, State())], Ask(0, 7), Ask(0, 9), NOW)
    spending.close()
    assert b"[20000,9,24000,9]" in path.read_bytes()
    said = [record.getMessage() for record in caplog.records]
    assert ["cannot write" in said[0], "again" in said[1], len(said)] == [True, True, 2]


def _hold(memory: SharedMemory, *, die: bool) -> tuple[int, int]:
    """A process that holds the lock: its id, and the pipe that lets it go on. If it is to `die`, it was killed."""
    ready, say = os.pipe()
    wait, go = os.pipe()
    pid = os.fork()
    if not pid:  # pragma: no cover - another process
        with memory.table(1)._lock:
            os.close(go)
            os.write(say, b"x")
            os.read(wait, 1)  # until the test closes the other end, or ends
        os._exit(0)
    os.read(ready, 1)
    if die:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    for end in (ready, say, wait):
        os.close(end)
    return pid, go


async def test_the_lock_of_a_dead_process_is_free() -> None:
    """Whoever dies with it, by whatever signal, does not keep it."""
    memory = SharedMemory.make(WAYS, 2)
    _, go = _hold(memory, die=True)
    os.close(go)
    verdict = await MemoryStore(memory.table(0)).admit((ONE,), Ask())
    assert verdict is not None
    assert verdict.why is None
    memory.close()


async def test_a_stopped_holder_of_the_lock_is_not_waited_for_for_ever() -> None:
    """A short time, once; nobody can tell then, what ends meanwhile is settled when it can be."""
    memory = SharedMemory.make(WAYS, 2)
    store = MemoryStore(memory.table(0))
    verdict = await store.admit((ONE,), Ask())
    assert verdict is not None
    pid, go = _hold(memory, die=False)
    assert await store.admit((ONE,), Ask()) is None
    store.settle(verdict.counted, Ask(), Ask())
    assert store.errors == 2
    with pytest.raises(Busy):
        memory.table(0).admit([ONE], Ask(), NOW)
    os.close(go)
    await trio.to_thread.run_sync(os.waitpid, pid, 0)
    again = await store.admit((ONE,), Ask())  # the place that was given back in between
    assert again is not None
    assert again.why is None
    memory.close()


async def test_workers_share_what_the_owner_made() -> None:
    """Each maps the owner's memory by its descriptor; the owner buries; without a descriptor a worker has its own."""
    settings = Settings(limits=(Limit(streams=1),))
    owner = Counting(settings, 2)
    first, second = (stores_of_worker(settings, os.dup(owner.memory.fd), column, 2).limits.store for column in (0, 1))
    verdicts = [await store.admit((ONE,), Ask()) for store in (first, second)]
    assert [verdict.why is None for verdict in verdicts if verdict] == [True, False]
    owner.bury(0)
    again = await second.admit((ONE,), Ask())
    assert again is not None
    assert again.why is None
    alone = await stores_of_worker(settings, None, 0, 1).limits.store.admit((ONE,), Ask())
    assert alone is not None
    assert alone.why is None
    await second.flush()
    owner.close()
    many = tuple(Key(f"k{number}", "") for number in range(10_000))
    assert memory_for(Settings(keys=many)) >= 40_000
    assert memory_for(Settings(keys=many)) % WAYS == 0


def test_redis_needs_its_extra_only_where_it_is_configured(tmp_path: pathlib.Path) -> None:
    """`check` is content with a Redis that is not there: it is away then."""
    (tmp_path / "c.toml").write_text(
        '[limits]\nredis = "redis://127.0.0.1:1/0"\n[[upstream]]\nname = "a"\nbase_url = "http://127.0.0.1:1/v1"\n'
    )
    assert load(Flags(config=str(tmp_path / "c.toml")), {}).limit_store.redis == "redis://127.0.0.1:1/0"


