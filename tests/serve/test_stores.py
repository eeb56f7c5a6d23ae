"""Limits across a reload: another file, another Redis, or none, while what was let in before is still in flight."""

from __future__ import annotations

import json
import pathlib
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from redis_kit import fields, in_flight
from redis_server import RedisServer, redis_server

from canal_trio.errors import ConfigError
from canal_trio.observe.metrics import Metrics
from canal_trio.policy.calendar import Calendar
from canal_trio.policy.ratelimit import Ask, Rule
from canal_trio.policy.scopes import Scope
from canal_trio.quota.admission import Verdict
from canal_trio.quota.memory import SharedMemory
from canal_trio.serve.counting import Counting, Stores, show_limits
from canal_trio.settings import Limit, LimitStore, Settings

ONE = Scope("one", Rule(Limit(streams=1, spend_day=100)), "total", "this gateway")
SPENDS = Scope("spends", Rule(Limit(spend_month=100)), "total", "this gateway")


def said(file: pathlib.Path) -> list[list[int]]:
    """What the file says was spent: day, on it, month, in it."""
    return sorted(json.loads(file.read_text())["spent"].values())


def another(file: pathlib.Path) -> None:
    """Another gateway has the file for a moment."""
    Counting(Settings(limit_store=LimitStore(state=str(file)))).close()


def spend(counting: Counting, cost: int, scope: Scope = SPENDS) -> None:
    """An exchange of this cost."""
    moment = Calendar(time.time).moment(time.monotonic())
    counted, why = counting.table.admit((scope,), Ask(), moment)
    assert why is None
    counting.table.settle(counted, Ask(), Ask(0, cost), moment)


@pytest.fixture
def files(tmp_path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Two names of files, of which the second one has a gateway's past: 5 for `one`, 9 for `spends`."""
    past = Counting(Settings(limit_store=LimitStore(state=str(tmp_path / "b.json"))))
    spend(past, 5, ONE)
    spend(past, 9)
    past.close()
    return tmp_path / "a.json", tmp_path / "b.json"


# -- the file ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alone", [True, False])
async def test_another_file_gives_no_budget_back(files: tuple[pathlib.Path, pathlib.Path], alone: bool) -> None:
    """What was counted stays counted and is in the new file when the change is done; what that said beyond counts from
    then on; the former one was written a last time, is another's to have, and is not written any more."""
    first, second = files
    counting = Counting(Settings(limit_store=LimitStore(state=str(first))), 1 if alone else 2)
    if alone:
        counting.stores(Settings())
    spend(counting, 7)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(counting.run)
        await trio.testing.wait_all_tasks_blocked()
        await counting.change(str(second))
        assert [row[3] for row in said(first)] == [7]
        assert [row[3] for row in said(second)] == [5, 9]
        another(first)
        with pytest.raises(ConfigError, match="is in use by another gateway"):
            another(second)
        spend(counting, 20)
        await counting.change(str(first))  # and back: nothing is counted twice
        assert [row[3] for row in said(first)] == [row[3] for row in said(second)] == [5, 29]
        spend(counting, 1)
        with trio.fail_after(20):
            while [row[3] for row in said(first)] != [5, 30]:  # noqa: ASYNC110  # a thread, once a second
                await trio.sleep(0.05)
        before = first.stat().st_mtime_ns
        await counting.change(str(first))
        assert first.stat().st_mtime_ns == before, "nothing has changed, so nothing is done"
        nursery.cancel_scope.cancel()
    counting.close()
    assert [row[3] for row in said(second)] == [5, 29]


async def test_a_file_is_begun_and_left_while_running(files: tuple[pathlib.Path, pathlib.Path]) -> None:
    """Without one before, the new one knows at once what was counted; without one after, the last one does."""
    first, second = files
    counting = Counting(Settings())
    spend(counting, 7)
    await counting.change(str(second))
    assert [row[3] for row in said(second)] == [5, 9]
    spend(counting, 1)
    await counting.change(None)
    assert [row[3] for row in said(second)] == [5, 10]
    another(second)
    await counting.change(str(first))
    assert [row[3] for row in said(first)] == [5, 10]
    counting.close()


async def test_a_file_that_cannot_be_used_changes_nothing(files: tuple[pathlib.Path, pathlib.Path]) -> None:
    """Damaged, or another gateway's: the reason is that of the start, it stays as it is, and the old one is kept."""
    first, second = files
    counting = Counting(Settings(limit_store=LimitStore(state=str(first))))
    spend(counting, 7)
    other = Counting(Settings(limit_store=LimitStore(state=str(second))))
    with pytest.raises(ConfigError, match="is in use by another gateway"):
        await counting.change(str(second))
    other.close()
    second.write_bytes(b"{")
    with pytest.raises(ConfigError, match="is not what this gateway wrote"):
        await counting.change(str(second))
    assert second.read_bytes() == b"{"
    second.unlink()
    another(second)
    with pytest.raises(ConfigError, match="is in use by another gateway"):
        another(first)
    counting.close()
    assert [row[3] for row in said(first)] == [7]


async def test_a_file_is_not_taken_while_a_worker_holds_the_lock(
    files: tuple[pathlib.Path, pathlib.Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the file says could not be counted, and would be given back: refused, and the file is free again."""
    first, second = files
    counting = Counting(Settings(limit_store=LimitStore(state=str(first))), 2)
    monkeypatch.setattr(counting, "_patiently", lambda _: False)
    with pytest.raises(ConfigError, match="a worker holds the lock"):
        await counting.change(str(second))
    another(second)
    await counting.change(str(first))
    counting.close()


async def test_a_file_that_cannot_be_written_at_the_change_is_written_later(
    files: tuple[pathlib.Path, pathlib.Path], caplog: pytest.LogCaptureFixture
) -> None:
    """The disk does not take it just then: that is told, and what was counted is in it as soon as it does, at the
    latest at the end, though nothing was spent since."""
    first, second = files
    counting = Counting(Settings(limit_store=LimitStore(state=str(first))))
    spend(counting, 70)
    blocker = second.with_name("b.json.new")
    blocker.mkdir()
    await counting.change(str(second))
    assert [row[3] for row in said(second)] == [5, 9]
    assert "cannot write what was spent" in caplog.text
    blocker.rmdir()
    counting.close()
    assert [row[3] for row in said(second)] == [5, 70]


async def test_an_end_in_the_middle_of_a_change_leaves_both_files_written(
    files: tuple[pathlib.Path, pathlib.Path]
) -> None:
    """The process ends between the swap and what follows it: the new file knows all, the old one is free."""
    first, second = files
    counting = Counting(Settings(limit_store=LimitStore(state=str(first))))
    spend(counting, 70)
    counting.keep(await counting.opened(str(second)))
    counting.close()
    assert [row[3] for row in said(first)] == [70]
    assert [row[3] for row in said(second)] == [5, 70]
    another(first)
    another(second)


# -- the store ---------------------------------------------------------------------------------------------------------


class Reloads:
    """A process's stores, changed as a reload changes them; `end` has those that were in flight at a swap ended."""

    def __init__(self, chosen: LimitStore) -> None:
        self.counting = Counting(Settings(limit_store=chosen))
        self.stores = self.counting.stores(Settings(limit_store=chosen))
        self.end = trio.Event()
        self.metrics = Metrics()
        show_limits(self.metrics, self.stores)

    async def to(self, **options: Any) -> None:
        """A reload with these settings."""
        self.stores.swap(await self.stores.prepare(LimitStore(**options)))
        await self.stores.swapped()

    async def ask(self, scope: Scope = ONE, cost: int = 0) -> Verdict:
        """By the store of now."""
        verdict = await self.stores.limits.store.admit((scope,), Ask(0, cost))
        assert verdict is not None
        return verdict

    async def left(self) -> None:
        """Wait until no former store is there any more, and none runs (memory has nothing to run)."""
        with trio.fail_after(20):
            while self.stores._former or self.stores._scopes:  # noqa: ASYNC110  # by the time it takes
                await trio.sleep(0.01)

    def metric(self, name: str) -> float:
        """What a scrape finds."""
        found = re.search(rf"^{name} (\S+)$", self.metrics.page().decode(), re.MULTILINE)
        assert found is not None
        return float(found[1])


@asynccontextmanager
async def reloads(**options: Any) -> AsyncIterator[Reloads]:
    """In a nursery of services; when that is cancelled nothing is left."""
    here = Reloads(LimitStore(**options))
    try:
        async with trio.open_nursery() as nursery:
            await here.stores.begin(nursery, lambda: here.end.wait())
            yield here
            await here.stores.flush()
            nursery.cancel_scope.cancel()
    finally:
        here.counting.close()


@pytest.fixture
def redis(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RedisServer]:
    """A Redis of this test's own, which is soon missed."""
    monkeypatch.setattr("canal_trio.quota.redis.BEAT", 0.2)
    with redis_server(tmp_path) as server:
        yield server


async def clients(server: RedisServer, count: int) -> None:
    """Wait until so many clients are connected, this one not counted."""
    with trio.fail_after(20):
        while server.command("CLIENT", "LIST").count(b" laddr=") != count + 1:  # noqa: ASYNC110  # a real server's
            await trio.sleep(0.05)


async def test_what_memory_has_counted_stays_where_only_a_number_changes() -> None:
    """With memory before and after it is the same: what is in flight is, and the place that it has."""
    async with reloads() as here:
        verdict = await here.ask()
        store = here.stores.limits.store
        await here.to(output_tokens=5, timeout=2.0, fail="open", prefix="other")
        assert here.stores.limits.store is store
        assert (await here.ask()).why is not None
        verdict.keeper.settle(verdict.counted, Ask(), Ask())
        assert (await here.ask()).why is None


async def test_a_redis_that_stays_goes_on_with_new_numbers(redis: RedisServer) -> None:
    """The same URL and prefix: the connection, what is in flight and what is owed stay; `fail` and `timeout` change."""
    async with reloads(redis=redis.url, timeout=5.0, fail="closed") as here:
        verdict = await here.ask()
        store = here.stores.limits.store
        await here.to(redis=redis.url, timeout=0.1, fail="local")
        assert here.stores.limits.store is store
        assert (await here.ask()).why is not None
        redis.freeze()
        with trio.fail_after(4):
            assert (await here.ask()).why is None  # by this machine's memory, from nothing on
        redis.thaw()
        verdict.keeper.settle(verdict.counted, Ask(), Ask())


async def test_a_redis_that_was_left_hears_what_ends_later(redis: RedisServer) -> None:
    """To memory, and to another prefix, while exchanges last: each settles where it was let in, the next one where it
    is counted now; a Redis that nothing is in flight in any more is left."""
    async with reloads() as here:
        old = await here.ask(cost=10)
        for prefix in ("a", "b"):
            await here.to(redis=redis.url, prefix=prefix, timeout=5.0)
            verdict = await here.ask(cost=10)
            assert verdict.why is None, "another store counts from nothing"
            assert in_flight(redis, ONE, prefix) == 1
            assert (await here.ask()).why is not None
            if prefix == "a":
                first = verdict
        await here.to()
        assert (await here.ask()).why is not None, "memory has it in flight all the time"
        await clients(redis, 2)
        for number, one in enumerate((first, verdict), 1):
            one.keeper.settle(one.counted, Ask(0, 10), Ask(0, number))
        here.end.set()
        await clients(redis, 0)
        for number, prefix in enumerate("ab", 1):
            assert fields(redis, ONE, prefix)["sd"] == number
            assert in_flight(redis, ONE, prefix) == 0
        old.keeper.settle(old.counted, Ask(0, 10), Ask(0, 3))
        assert (await here.ask()).why is None
        await here.left()


async def test_the_end_of_the_process_tells_a_redis_that_was_left(redis: RedisServer) -> None:
    """What settles in it at the very end is flushed like that of the present one."""
    async with reloads(redis=redis.url, timeout=5.0) as here:
        verdict = await here.ask(cost=10)
        await here.to()
        verdict.keeper.settle(verdict.counted, Ask(0, 10), Ask(0, 7))
    assert fields(redis, ONE)["sd"] == 7
    assert in_flight(redis, ONE) == 0


@pytest.mark.parametrize("back", [True, False])
async def test_a_redis_that_was_left_while_it_was_away(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, back: bool
) -> None:
    """It is told when it is back, or, after a while, given up with one line; its errors stay counted."""
    caplog.set_level("INFO", "canal_trio.quota")
    monkeypatch.setattr("canal_trio.quota.redis.LAST", 20.0 if back else 0.3)
    async with reloads(redis=redis.url, timeout=5.0) as here:
        verdict = await here.ask(cost=10)
        redis.kill()
        with trio.fail_after(10):
            while not here.stores.limits.store.away:  # noqa: ASYNC110  # by the time it takes
                await trio.sleep(0.01)
        assert here.metric("canal_limit_store_away") == 1
        await here.to()
        assert here.metric("canal_limit_store_away") == 0
        errors = here.metric("canal_limit_store_errors")
        assert errors >= 1
        verdict.keeper.settle(verdict.counted, Ask(0, 10), Ask(0, 7))
        here.end.set()
        if back:
            redis.start()
        await here.left()
        assert here.metric("canal_limit_store_errors") >= errors
    if back:
        assert fields(redis, ONE)["sd"] == 7
    found = "limits: the former Redis is back" if back else "the former Redis is still away: what was spent there last"
    assert found in caplog.text


async def test_a_redis_that_is_left_and_goes_away_is_not_taken_for_the_present_one(
    redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The line says which it is: this one lets nobody in any more."""
    async with reloads(redis=redis.url, timeout=5.0) as here:
        await here.to()
        redis.kill()
        with trio.fail_after(10):
            while "limits: the former Redis is away (" not in caplog.text:  # noqa: ASYNC110  # by the time it takes
                await trio.sleep(0.01)
        assert "it does not hear what was spent there last until it is back" in caplog.text
        here.end.set()
        await here.left()
        assert "still away" not in caplog.text, "there was nothing to tell"


async def test_a_redis_that_is_not_there_does_not_refuse_a_reload(redis: RedisServer) -> None:
    """It is away, as at the start, and is counted in as soon as it is there."""
    redis.kill()
    async with reloads() as here:
        await here.to(redis=redis.url, timeout=5.0)
        assert here.stores.limits.store.away
        assert (await here.ask(SPENDS)).why is None
        redis.start()
        with trio.fail_after(20):
            while here.stores.limits.store.away:  # noqa: ASYNC110  # a real server's start
                await trio.sleep(0.01)
        assert in_flight(redis, SPENDS) == 1


async def test_a_reload_that_is_cancelled_while_redis_is_tried_leaves_nothing(
    redis: RedisServer, tmp_path: pathlib.Path
) -> None:
    """The file that it would have had is free, no store runs, and everything is as before."""
    redis.freeze()
    async with reloads() as here:
        store, new = here.stores.limits.store, tmp_path / "new.json"
        with trio.move_on_after(1) as scope:
            await here.stores.prepare(LimitStore(redis=redis.url, state=str(new), timeout=5.0))
        assert scope.cancelled_caught
        another(new)
        await here.left()
        assert here.stores.limits.store is store
        redis.thaw()
        await here.to(redis=redis.url, state=str(new), timeout=5.0)
        assert not here.stores.limits.store.away


async def test_a_redis_that_hangs_holds_up_no_reload(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it may take to answer: the reload is done after some seconds, and it is away until it does."""
    monkeypatch.setattr("canal_trio.serve.counting.PATIENCE", 0.2)
    redis.freeze()
    async with reloads() as here:
        with trio.fail_after(10):
            await here.to(redis=redis.url, timeout=60.0)
        assert here.stores.limits.store.away
        assert (await here.ask(SPENDS)).why is None
        redis.thaw()
        with trio.fail_after(20):
            while here.stores.limits.store.away:  # noqa: ASYNC110  # as the other program likes
                await trio.sleep(0.01)
        assert in_flight(redis, SPENDS) == 1


async def test_a_file_that_is_refused_leaves_redis_alone(redis: RedisServer, tmp_path: pathlib.Path) -> None:
    """Both change, and the file cannot be used: neither does, and Redis is not even asked."""
    new = tmp_path / "new.json"
    new.write_bytes(b"{")
    async with reloads() as here:
        store = here.stores.limits.store
        with pytest.raises(ConfigError, match="is not what this gateway wrote"):
            await here.to(redis=redis.url, state=str(new))
        assert here.stores.limits.store is store
        await clients(redis, 0)


async def test_a_worker_leaves_the_file_to_its_parent(tmp_path: pathlib.Path) -> None:
    """It has the same settings, and no file."""
    stores = Stores(Settings(), SharedMemory.make(32, 2).table(1))
    async with trio.open_nursery() as nursery:
        await stores.begin(nursery, trio.lowlevel.checkpoint)
        stores.swap(await stores.prepare(LimitStore(state=str(tmp_path / "nowhere" / "x.json"))))
        await stores.swapped()
        await stores.flush()
