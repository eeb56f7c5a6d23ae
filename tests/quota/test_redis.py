"""Limits in a real Redis: the scripts are the arithmetic, gateways count as one, and Redis may go and come."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from redis_server import RedisServer

from canal_trio.policy.calendar import Calendar
from canal_trio.policy.ratelimit import Ask, Rule, State, What, begin, refill, refusal, settle
from canal_trio.policy.scopes import Scope
from canal_trio.quota import scripts
from canal_trio.quota.memory import MemoryStore
from canal_trio.quota.redis import RedisStore
from canal_trio.quota.redis_parts import limit_words, rate_words, verdict_of
from canal_trio.quota.table import Table, table_bytes
from canal_trio.settings import Limit, LimitStore

pytestmark = pytest.mark.real

NONE = Ask()
NAMES = itertools.count()
SEVERAL = [Limit(requests=60, tokens=1000), Limit(streams=3, requests=100), Limit(spend_day=1e-6, spend_month=5e-6)]


def scope(limit: Limit, name: str | None = None) -> Scope:
    """A scope by a name that no other test has."""
    return Scope(name or f"n{next(NAMES)}", Rule(limit), "total", "this gateway")


@asynccontextmanager
async def store(server: RedisServer, *, waits: bool = True, **options: Any) -> AsyncIterator[RedisStore]:
    """A worker's store at this server. `waits` is how long an answer may take on a busy machine."""
    chosen = LimitStore(redis=server.url, timeout=options.pop("timeout", 5.0 if waits else 0.1), **options)
    made = RedisStore(chosen, MemoryStore(Table(bytearray(table_bytes(64, 1)))))
    async with trio.open_nursery() as nursery:
        await nursery.start(made.run)
        yield made
        await made.flush()
        nursery.cancel_scope.cancel()


async def back(here: RedisStore) -> None:
    """Wait until Redis is asked again."""
    with trio.fail_after(20):
        while here.away:  # noqa: ASYNC110  # a real server's start
            await trio.sleep(0.01)


def fields(server: RedisServer, one: Scope, prefix: str = "canal") -> dict[str, float]:
    """What Redis has of a scope."""
    words = re.findall(rb"\$\d+\r\n([^\r]*)\r\n", server.command("HGETALL", f"{{{prefix}}}:{one.id}"))
    return {key.decode(): float(value) for key, value in zip(words[::2], words[1::2], strict=True)}


def in_flight(server: RedisServer, one: Scope) -> int:
    """Exchanges in flight in a scope, all workers together."""
    return int(sum(value for key, value in fields(server, one).items() if key.startswith("s:")))


class Direct:
    """Runs scripts for several workers at a time of the test's own choosing."""

    def __init__(self, server: RedisServer) -> None:
        self.server = server
        self.name = f"d{next(NAMES)}"
        self.numbers = itertools.count(1)

    def run(
        self, script: str, worker: str, now: float, scopes: list[Scope], *arguments: float, session: int = 1
    ) -> Any:
        """The raw answer's words."""
        keys = [f"{self.name}:workers", f"{self.name}:{worker}", *(f"{self.name}:{one.id}" for one in scopes)]
        words = ["-1" if one == float("inf") else repr(one) for one in arguments]
        raw = self.server.command(
            "EVAL", script, str(len(keys)), *keys, str(int(now * 1e6)), worker, str(session), *words
        )
        assert not raw.startswith(b"-"), raw
        return [
            int(number) if number else text for number, text in re.findall(rb":(-?\d+)\r\n|\$\d+\r\n([^\r]*)\r\n", raw)
        ]

    def begin(self, *workers: str, now: float, lives: float = 1e6, session: int = 1) -> None:
        """A session of each."""
        for worker in workers:
            self.run(scripts.BEGIN, worker, now, [], lives * 1e6, session=session)


STEPS = st.lists(
    st.tuples(st.sampled_from("ab"), st.floats(0, 30), st.integers(0, 400), st.integers(0, 900), st.booleans()),
    max_size=25,
)


@hypothesis_settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # fmt: skip
@given(STEPS, st.integers(0, 4_000_000_000))
def test_the_scripts_are_the_arithmetic(
    shared_redis: RedisServer, steps: list[tuple[str, float, int, int, bool]], start: int
) -> None:
    """Whichever worker asks and settles, whenever it is, Redis says what the arithmetic says of one state."""
    direct, now = Direct(shared_redis), float(start)
    direct.begin("a", "b", now=now)
    scopes = [scope(limit) for limit in SEVERAL]
    today = Calendar(lambda: now).moment(now)
    states = [State(day=today.day, month=today.month) for _ in scopes]
    running: list[tuple[str, Ask]] = []
    for worker, gap, tokens, cost, ends in steps:
        now = round(now + gap, 6)
        moment = Calendar(lambda at=now: at).moment(now)  # type: ignore[misc]  # a clock that stands
        if ends and running:
            owner, ask = running.pop()
            used = Ask(tokens, cost)
            words = [ask.tokens, ask.cost, used.tokens, used.cost, *rate_words(scopes, burst=True)]
            assert direct.run(scripts.SETTLE, owner, now, scopes, next(direct.numbers), *words) == [1]
            for one, state in zip(scopes, states, strict=True):
                refill(one.rule, state, moment)
                settle(one.rule, state, ask, used)
            continue
        ask = Ask(tokens, cost)
        after = [replace(state) for state in states]
        for one, state in zip(scopes, after, strict=True):
            refill(one.rule, state, moment)
        reasons = [refusal(one.rule, state, ask, moment) for one, state in zip(scopes, after, strict=True)]
        answer = direct.run(scripts.ADMIT, worker, now, scopes, ask.tokens, ask.cost, *limit_words(scopes))
        verdict = verdict_of(scopes, ask, answer, None)  # type: ignore[arg-type]  # nobody settles it
        assert (verdict.why is None) == (reasons == [None] * 3)
        if verdict.why is None:
            running.append((worker, ask))
            states = after
            assert begin(list(zip(scopes, states, strict=True)), ask, moment) is None
        else:
            assert verdict.why[1].what is max(filter(None, reasons), key=lambda reason: reason.wait).what
        for (one, got), state in zip(verdict.counted, after, strict=True):
            assert (got.streams, got.reserved, got.spent_day, got.spent_month, got.day, got.month) == (
                state.streams, state.reserved, state.spent_day, state.spent_month, state.day, state.month
            )  # fmt: skip
            if one.rule.requests is not None:  # else the level is nobody's
                assert got.requests == pytest.approx(state.requests, abs=1e-3)
            if one.rule.tokens is not None:
                assert got.tokens == pytest.approx(state.tokens, abs=1e-2)


def test_a_gateway_that_died_holds_no_places(shared_redis: RedisServer) -> None:
    """Who has not been heard of for its time is dead: its places are free, what it had set aside counts as spent."""
    direct, one = Direct(shared_redis), scope(Limit(streams=1, spend_day=1.0))
    direct.begin("a", "b", now=1000.0, lives=15.0)
    admit = (scripts.ADMIT, "b")
    words = [0, 70, *limit_words([one])]
    assert direct.run(scripts.ADMIT, "a", 1000.0, [one], *words)[0] == 1
    assert direct.run(*admit, 1014.0, [one], *words)[0] == 0
    answer = direct.run(*admit, 1015.1, [one], *words)
    ((_, state),) = verdict_of([one], Ask(0, 70), answer, None).counted  # type: ignore[arg-type]  # nobody settles it
    assert (answer[0], state.streams, state.reserved, state.spent_day) == (1, 1, 70, 70)


def test_an_older_session_says_nothing_any_more(shared_redis: RedisServer) -> None:
    """What a broken connection still delivers is ignored, and no settlement counts twice."""
    direct, one = Direct(shared_redis), scope(Limit(streams=5, spend_day=1.0))
    direct.begin("a", now=1000.0)
    words = [0, 0, *limit_words([one])]
    assert direct.run(scripts.ADMIT, "a", 1000.0, [one], *words)[0] == 1
    spent = [0, 0, 0, 50, *rate_words([one], burst=True)]
    assert direct.run(scripts.SETTLE, "a", 1000.0, [one], 7, *spent) == [1]
    direct.begin("a", now=1000.0, session=2)
    again = [50, *rate_words([one], burst=False)]
    assert direct.run(scripts.ADMIT, "a", 1000.0, [one], *words) == [b"stale"]
    assert direct.run(scripts.SETTLE, "a", 1000.0, [one], 8, *spent) == [b"stale"]
    assert direct.run(scripts.COUNT, "a", 1000.0, [one], 3, 9) == [b"stale"]
    assert direct.run(scripts.SPEND, "a", 1000.0, [one], 7, *again, session=2) == [0]
    assert direct.run(scripts.SPEND, "a", 1000.0, [one], 8, *again, session=2) == [1]
    assert direct.run(scripts.COUNT, "a", 1000.0, [one], 3, 9, session=2) == [1]
    answer = direct.run(scripts.ADMIT, "a", 1000.0, [one], *words, session=2)
    ((_, state),) = verdict_of([one], NONE, answer, None).counted  # type: ignore[arg-type]  # nobody settles it
    assert (state.streams, state.reserved, state.spent_day) == (4, 9, 100)
    assert direct.run(scripts.BEAT, "a", 1000.0, [], 1e6, session=1) == [b"stale"]
    assert direct.run(scripts.BEAT, "a", 1000.0, [], 1e6, session=2) == [1]


async def test_two_gateways_count_as_one(shared_redis: RedisServer) -> None:
    """Exactly the limit is let in by both together, however their questions mix; all places come back."""
    one = scope(Limit(requests=1e-3, burst=3600.0, streams=10_000))
    many = scope(Limit(streams=40))
    async with store(shared_redis) as first, store(shared_redis) as second:
        running: list[Any] = []

        async def ask(here: RedisStore) -> None:
            for _ in range(30):
                verdict = await here.admit((many,), NONE)
                assert verdict is not None
                if verdict.why is None:
                    running.append(verdict)

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(ask, first)
                nursery.start_soon(ask, second)
        assert len(running) == 40
        for verdict in running:
            verdict.keeper.settle(verdict.counted, NONE, NONE)
        verdicts = [await here.admit((one,), NONE) for here in (first, second, first)]
        assert [verdict.why is None for verdict in verdicts if verdict] == [True, False, False]
        assert verdicts[1] is not None
        assert verdicts[1].why is not None
        assert verdicts[1].why[1].what is What.REQUESTS
        await first.flush()
        await second.flush()
        assert in_flight(shared_redis, many) == 0


async def test_two_gateways_let_in_what_one_would_within_one(shared_redis: RedisServer) -> None:
    """However fast both ask: the burst, and the rate for the time that it took by the server's clock."""
    one = scope(Limit(requests=1000, burst=12.0))  # 200 at once
    times: list[float] = []
    admitted = 0

    async def ask(here: RedisStore) -> None:
        nonlocal admitted
        for _ in range(60):
            verdict = await here.admit((one,), NONE)
            assert verdict is not None
            times.append(verdict.counted[0][1].at)
            if verdict.why is None:
                admitted += 1
                verdict.keeper.settle(verdict.counted, NONE, NONE)

    async with store(shared_redis) as first, store(shared_redis) as second, trio.open_nursery() as nursery:
        for here in (first, second) * 5:
            nursery.start_soon(ask, here)
    exact = 200 + (max(times) - min(times)) * 1000 / 60
    assert len(times) == 600
    assert exact - 1 <= admitted <= exact + 1e-6


@pytest.mark.parametrize("seed", range(3))
async def test_a_cancel_storm_leaves_no_place_taken(shared_redis: RedisServer, seed: int) -> None:
    """gateways.md C22: whoever is cancelled while it asks, before or after the answer, leaves nothing behind."""
    dice, one = random.Random(seed), scope(Limit(streams=10, spend_day=1.0))
    async with store(shared_redis) as here:

        async def client() -> None:
            for _ in range(10):
                verdict = None
                with trio.move_on_after(dice.choice([0, 0.0005, 0.002, 1])):
                    verdict = await here.admit((one,), Ask(0, 5))
                if verdict is not None and verdict.why is None:
                    await trio.sleep(dice.random() * 0.002)
                    verdict.keeper.settle(verdict.counted, Ask(0, 5), NONE)

        async with trio.open_nursery() as nursery:
            for _ in range(30):
                nursery.start_soon(client)
        for _ in range(2):  # what comes for those who have gone is settled when it comes
            await here.flush()
        assert in_flight(shared_redis, one) == 0
        assert not here._held
        assert not [key for key in fields(shared_redis, one) if key.startswith("c:")]


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
