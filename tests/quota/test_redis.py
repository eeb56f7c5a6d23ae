"""Limits in a real Redis: the scripts are the arithmetic, gateways count as one, and Redis may go and come."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import replace
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from redis_kit import NAMES, fields, in_flight, scope, store
from redis_server import RedisServer

from canal_trio.policy.calendar import Calendar
from canal_trio.policy.ratelimit import Ask, State, What, begin, refill, refusal, settle
from canal_trio.policy.scopes import Scope
from canal_trio.quota import scripts
from canal_trio.quota.redis import RedisStore
from canal_trio.quota.redis_parts import limit_words, rate_words, verdict_of
from canal_trio.settings import Limit

pytestmark = pytest.mark.real

NONE = Ask()
SEVERAL = [Limit(requests=60, tokens=1000), Limit(streams=3, requests=100), Limit(spend_day=1e-6, spend_month=5e-6)]


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
