"""Redis goes, comes, is emptied, and is not there at all: nobody waits for it, and it hears what it missed."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from redis_kit import back, fields, in_flight, scope, store
from redis_server import RedisServer

from canal_trio.policy.ratelimit import Ask
from canal_trio.settings import Limit

pytestmark = pytest.mark.real

NONE = Ask()


@pytest.mark.parametrize("fail", ["open", "closed", "local"])
async def test_nobody_waits_for_a_redis_that_does_not_answer(redis: RedisServer, fail: str) -> None:
    """One answer is waited for, as long as configured; from then on it is away, until it answers again."""
    one = scope(Limit(streams=2, requests=1000))
    async with store(redis, waits=False, fail=fail) as here:
        before = await here.admit((one,), NONE)
        assert before is not None
        redis.freeze()
        verdicts: list[Any] = []

        async def ask() -> None:
            verdicts.append(await here.admit((one,), NONE))

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(ask)
            assert here.away
            for _ in range(100):
                await ask()
        if fail == "local":  # from nothing on: two places of this machine's
            assert sum(verdict.why is None for verdict in verdicts) == 2
        elif fail == "open":  # counted nowhere
            assert [(verdict.counted, verdict.why) for verdict in verdicts] == [((), None)] * 105
        else:
            assert verdicts == [None] * 105
        redis.thaw()
        await back(here)
        assert here.errors == 1
        await here.flush()
        # All of this worker's, those of the memory's included: Redis was told.
        held = {"local": 3, "open": 106, "closed": 1}[fail]
        assert in_flight(redis, one) == held
        for verdict in [before, *(verdict for verdict in verdicts if verdict and verdict.why is None)]:
            verdict.keeper.settle(verdict.counted, NONE, NONE)
        await here.flush()
        assert in_flight(redis, one) == 0


@pytest.mark.parametrize("fail", ["open", "local"])
async def test_what_was_spent_while_redis_was_away_was_given_away_where_it_fails_open(
    redis: RedisServer, fail: str
) -> None:
    """What was let in while it was away is no gift: Redis hears what it cost, and of what is still in flight."""
    one = scope(Limit(spend_day=1.0, streams=100))
    async with store(redis, fail=fail) as here:
        redis.kill()
        with trio.fail_after(10):
            while not here.away:  # noqa: ASYNC110  # by the time it takes
                await trio.sleep(0.01)
        first, second = [await here.admit((one,), Ask(5, 10)) for _ in range(2)]
        assert first is not None
        assert second is not None
        first.keeper.settle(first.counted, Ask(5, 10), Ask(5, 700))
        redis.start()
        await back(here)
        assert fields(redis, one)["sd"] == 700
        assert in_flight(redis, one) == 1
        second.keeper.settle(second.counted, Ask(5, 10), Ask(5, 70))
        await here.flush()
        assert fields(redis, one)["sd"] == 770
        assert in_flight(redis, one) == 0


async def test_what_is_remembered_for_a_redis_that_is_away_is_bounded(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many models clients invent meanwhile; beyond, they are let in and forgotten."""
    monkeypatch.setattr("canal_trio.quota.redis.REMEMBERED", 3)
    redis.kill()
    async with store(redis, fail="open") as here:
        verdicts = [await here.admit((scope(Limit(streams=1)),), NONE) for _ in range(5)]
        assert [verdict is not None for verdict in verdicts] == [True, True, True, False, False]


async def test_what_was_spent_while_redis_was_away_is_told_exactly_once(redis: RedisServer) -> None:
    """Settled before, in the very moment, and after: the sum is there when it is back, and no place is left taken."""
    one = scope(Limit(spend_month=1.0, streams=100))
    async with store(redis, waits=False) as here:
        verdicts = [await here.admit((one,), Ask(0, 10)) for _ in range(9)]
        for verdict in verdicts[:3]:
            assert verdict is not None
            verdict.keeper.settle(verdict.counted, Ask(0, 10), Ask(0, 1))
        await here.flush()
        redis.freeze()
        for verdict in verdicts[3:6]:  # sent, and never answered on this connection
            assert verdict is not None
            verdict.keeper.settle(verdict.counted, Ask(0, 10), Ask(0, 100))
        with trio.fail_after(10):
            while not here.away:  # noqa: ASYNC110  # by the time it takes
                await trio.sleep(0.01)
        verdicts[6].keeper.settle(verdicts[6].counted, Ask(0, 10), Ask(0, 10_000))  # type: ignore[union-attr]  # it was let in
        redis.thaw()  # ... now it does all it was told, on both connections
        await back(here)
        for verdict in verdicts[7:]:
            assert verdict is not None
            verdict.keeper.settle(verdict.counted, Ask(0, 10), Ask(0, 1_000_000))
        await here.flush()
        found = fields(redis, one)
        assert found["sm"] == found["sd"] == 3 + 300 + 10_000 + 2_000_000
        assert [key for key in found if key[1:2] == ":"] == []


async def test_a_redis_that_was_emptied_did_not_hear_of_what_was_in_flight(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nobody asks anything more: the next settlement, or the next beat, finds out, nothing of it is lost,
    and what is still in flight is told."""
    monkeypatch.setattr("canal_trio.quota.redis.BEAT", 0.05)
    one = scope(Limit(spend_day=1.0, streams=3))
    async with store(redis, fail="local") as here:
        first, second = [await here.admit((one,), Ask(0, 10)) for _ in range(2)]
        assert first is not None
        assert second is not None
        redis.command("FLUSHALL")
        with trio.fail_after(10):
            while not in_flight(redis, one):  # noqa: ASYNC110  # a beat
                await trio.sleep(0.01)
        await back(here)
        assert in_flight(redis, one) == 2
        redis.command("FLUSHALL")
        first.keeper.settle(first.counted, Ask(0, 10), Ask(0, 700))
        with trio.fail_after(10):
            while not fields(redis, one).get("sd"):  # noqa: ASYNC110  # a session
                await trio.sleep(0.01)
        await back(here)
        assert fields(redis, one)["sd"] == 700
        assert in_flight(redis, one) == 1
        second.keeper.settle(second.counted, Ask(0, 10), NONE)


async def test_a_redis_that_was_restarted_is_used_again(redis: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """Killed in the middle and started again: what was spent is there, what is in flight is told, one line each."""
    caplog.set_level("INFO", "canal_trio.quota")
    one = scope(Limit(spend_day=1.0, streams=3))
    async with store(redis, fail="local") as here:
        first = await here.admit((one,), Ask(0, 10))
        second = await here.admit((one,), Ask(0, 10))
        assert first is not None
        assert second is not None
        first.keeper.settle(first.counted, Ask(0, 10), Ask(0, 700))
        await here.flush()
        redis.kill()
        with trio.fail_after(10):
            while not here.away:  # by the time it takes
                await here.admit((one,), NONE)
                await trio.sleep(0.01)
        redis.start()
        await back(here)
        assert fields(redis, one)["sd"] == 700
        assert in_flight(redis, one) == sum(held.streams for held in here._held.values())
        second.keeper.settle(second.counted, Ask(0, 10), NONE)
    lines = [record.getMessage() for record in caplog.records if record.name == "canal_trio.quota"]
    assert [line.partition(" (")[0] for line in lines] == ["limits: Redis is away", "limits: Redis is back"]


async def test_a_redis_that_is_not_there_does_not_hold_up_the_start(redis: RedisServer) -> None:
    """The gateway starts without it, as was chosen for then, and uses it as soon as it is there."""
    redis.kill()
    one = scope(Limit(streams=1))
    with trio.fail_after(20):
        async with store(redis, fail="local") as here:
            assert here.away
            assert (await here.admit((one,), NONE)) is not None
            redis.start()
            await back(here)
            assert in_flight(redis, one) == 1
