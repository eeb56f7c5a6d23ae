"""Which upstream gets what, as they fail and recover: ejection, trials, pauses, strategies; in virtual time."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import trio
import trio.testing
from several import (
    ERROR_AMONG_OTHERS,
    EVENT,
    answers,
    asked,
    error_first,
    hello,
    named,
    ok,
    refuses,
    several,
    silent,
    streams,
    talk,
    vanishes,
)
from simkit import SSE, Conversation, Play, World

from canal_trio.hooks import Outcome
from canal_trio.settings import Balance, Bounds, Deadlines, Health, Key, Model, Retries, Target

HEALTH = Health(failures=3, eject=10.0, slow_start=0.0, set_aside=0.0)
FREELY = Retries(share=1.0, burst=1000.0, backoff=0.0)


async def turns(here: World, count: int, raw: bytes = b"") -> Counter[str]:
    """Who gets `count` exchanges, one after the other."""
    before = asked(here)
    for _ in range(count):
        await talk(here, raw)
    return asked(here) - before


def state(here: World, name: str = "u0") -> str:
    """As the metrics show it."""
    return here.gateway.statistics().upstreams[name].state


FAILING: dict[str, Play] = {
    "503": refuses,
    "500": answers(500),
    "vanishes": vanishes,
    "silent": silent,
    "cut": streams(EVENT, cut=True),
    "in-band": streams(EVENT, b'data: {"error":{"message":"x"}}\n\n'),
    "in-band-among-others": streams(EVENT, ERROR_AMONG_OTHERS),
}


@pytest.mark.parametrize("how", FAILING)
async def test_a_failing_upstream_is_left_alone_and_comes_back(autojump_clock: Any, handover: bool, how: str) -> None:
    """Three failures in a row, whatever they are: not asked for ten seconds, then once, then as before."""
    plays: dict[str, Play] = {"u0": FAILING[how], "u1": ok}
    settings = {"health": HEALTH, "retries": FREELY, "deadlines": Deadlines(first_byte=1.0)}
    async with several(plays, handover=handover, **settings) as here:
        assert (await turns(here, 3))["u0"] == 3
        assert state(here) == "ejected"
        assert await turns(here, 4) == {"u1": 4}
        await trio.sleep(9.9)
        assert await turns(here, 1) == {"u1": 1}
        await trio.sleep(0.2)
        assert state(here) == "trial"
        assert (await turns(here, 2))["u0"] == 1, "one failed trial is enough"
        assert here.gateway.statistics().upstreams["u0"].ejections == 2
        plays["u0"] = ok
        await trio.sleep(15)
        assert await turns(here, 1) == {"u1": 1}, "twice as long the second time"
        await trio.sleep(5.1)
        assert await turns(here, 3) == {"u0": 3}
        assert state(here) == "usable"


async def test_in_band_error_was_taken_for_success(autojump_clock: Any, handover: bool) -> None:
    """gateways.md C10: a 200 with an error in its stream is relayed verbatim, and counts against the upstream."""
    async with several({"u0": error_first, "u1": ok}, handover=handover, health=HEALTH) as here:
        assert (await turns(here, 5)) == {"u0": 3, "u1": 2}
        assert [record.outcome for record in here.records.all][:3] == [Outcome.UPSTREAM_ERROR] * 3


async def test_client_errors_ejected_a_healthy_upstream(autojump_clock: Any, handover: bool) -> None:
    """What clients do wrong (400, 404, 422), or do at all (leaving), says nothing about the upstream."""
    plays: dict[str, Play] = {"u0": answers(422), "u1": ok}
    async with several(plays, handover=handover, health=HEALTH) as here:
        assert await turns(here, 10) == {"u0": 10}
        plays["u0"] = silent
        for _ in range(10):
            client = here.connect()
            await client.send(hello())
            await trio.sleep(1)
            client.stream.close()  # type: ignore[attr-defined]  # a simulated stream
        await trio.testing.wait_all_tasks_blocked()
        assert state(here) == "usable"
        assert asked(here)["u1"] == 0


async def test_one_clients_rate_limit_took_an_upstream_from_everybody(autojump_clock: Any, handover: bool) -> None:
    """A 429 to a key that the client brought is that client's; one to the gateway's own key, or without any, is not."""
    plays: dict[str, Play] = {"u0": answers(429, b"retry-after: 30"), "u1": ok}
    async with several(plays, handover=handover, retries=FREELY) as here:
        for _ in range(3):
            await talk(here, hello("hi", "Authorization: Bearer sk-client"))
        assert asked(here)["u0"] == 3
        assert state(here) == "usable"
        await talk(here)
        assert state(here) == "set_aside"


@pytest.mark.parametrize("own_key", [False, True])
async def test_our_own_key_is_refused(autojump_clock: Any, handover: bool, own_key: bool) -> None:
    """A 401 to the gateway's key ejects, for everybody would get it; one to a client's key is that client's affair."""
    first = replace(named(1)[0], api_key="sk-ours" if own_key else None)
    plays: dict[str, Play] = {"u0": answers(401), "u1": ok}
    async with several(plays, first, named(2)[1], handover=handover, health=HEALTH) as here:
        await turns(here, 3)
        assert state(here) == ("ejected" if own_key else "usable")


@pytest.mark.parametrize(
    ("field", "seconds"),
    [(b"retry-after: 7", 7.0), (b"retry-after-ms: 2500", 2.5), (b"retry-after: 86400", 60.0), (b"x: y", 1.0)],
)
@pytest.mark.parametrize("status", [429, 503])
async def test_retry_after_was_ignored(
    autojump_clock: Any, handover: bool, status: int, field: bytes, seconds: float
) -> None:
    """An upstream that says when to come back is not asked before, within bounds; without a word it has a second."""
    plays: dict[str, Play] = {"u0": answers(status, field), "u1": ok}
    async with several(plays, handover=handover, retries=FREELY) as here:
        await talk(here)
        plays["u0"] = ok
        await trio.sleep(seconds - 0.1)
        assert await turns(here, 2) == {"u1": 2}
        await trio.sleep(0.2)
        assert await turns(here, 2) == {"u0": 2}


async def test_a_single_upstream_is_always_asked(autojump_clock: Any, handover: bool) -> None:
    """However it fails: nobody can do better than to ask it, and ready is what that is."""
    async with several({"u0": refuses}, handover=handover, health=HEALTH) as here:
        assert await turns(here, 20) == {"u0": 20}
        assert state(here) == "ejected"
        assert here.gateway.ready()


async def test_everything_is_avoided(autojump_clock: Any, handover: bool) -> None:
    """Where all may be avoided: 503 with the time until one is tried, not ready; then a trial, and ready again."""
    plays: dict[str, Play] = {"u0": answers(500), "u1": answers(500)}
    settings = {"health": replace(HEALTH, most_ejected=1.0), "balance": Balance("round_robin")}
    async with several(plays, handover=handover, **settings) as here:
        while here.gateway.ready():
            await talk(here)
            await trio.sleep(0.5)
        count = len(here.records.all)
        response = await talk(here)
        assert response.status == 503
        assert response.error["code"] == "upstream_unavailable"
        assert 1 <= int(response.header("retry-after") or 0) <= 10
        assert response.header("x-should-retry") == "true"
        assert here.records.all[count].attempts == 0
        plays["u0"] = plays["u1"] = ok
        await trio.sleep(10)
        assert here.gateway.ready()
        assert (await talk(here)).status == 200


async def test_one_trial_at_a_time(autojump_clock: Any, handover: bool) -> None:
    """While one exchange tries, the others go elsewhere; if its client leaves, the next one may."""
    plays: dict[str, Play] = {"u0": answers(500), "u1": ok}
    async with several(plays, handover=handover, health=HEALTH) as here:
        await turns(here, 3)
        await trio.sleep(10)
        plays["u0"] = silent
        trial = here.connect()
        await trial.send(hello())
        await trio.sleep(1)
        assert await turns(here, 3) == {"u1": 3}
        trial.stream.close()  # type: ignore[attr-defined]  # a simulated stream
        await trio.testing.wait_all_tasks_blocked()
        plays["u0"] = ok
        assert await turns(here, 3) == {"u0": 3}


async def test_a_long_stream_is_trial_enough(autojump_clock: Any, handover: bool) -> None:
    """The head of an answer ends the trial: a stream of minutes does not keep all others away."""
    plays: dict[str, Play] = {"u0": answers(500), "u1": ok}
    async with several(plays, handover=handover, health=HEALTH) as here:
        await turns(here, 3)
        await trio.sleep(10)
        plays["u0"] = streams(*[EVENT] * 100, gap=1.0)
        client = here.connect()
        await client.send(hello())
        await trio.sleep(5)
        plays["u0"] = ok
        assert await turns(here, 3) == {"u0": 3}


async def test_a_client_that_leaves_after_the_last_event_is_a_success(autojump_clock: Any, handover: bool) -> None:
    """As openai-python 2.15 does each time: it ends a row of failures."""

    async def play(upstream: Conversation) -> None:
        await upstream.say(SSE)
        await upstream.chunk(EVENT, b"data: [DONE]\n\n")
        await trio.sleep_forever()

    plays: dict[str, Play] = {"u0": answers(500), "u1": ok}
    async with several(plays, handover=handover, health=HEALTH) as here:
        for _ in range(3):
            plays["u0"] = answers(500)
            await turns(here, 2)
            plays["u0"] = play
            client = here.connect()
            await client.send(hello())
            await trio.sleep(0.5)
            client.stream.close()  # type: ignore[attr-defined]  # a simulated stream
            await trio.testing.wait_all_tasks_blocked()
        assert state(here) == "usable"


async def test_an_upstream_with_a_mended_key_stayed_ejected(autojump_clock: Any, handover: bool) -> None:
    """An upstream that refused our key is asked again when the configuration has another key for it, or a proxy."""
    async with several({"u0": refuses, "u1": ok}, handover=handover, health=HEALTH, retries=FREELY) as here:
        await turns(here, 3)
        assert state(here) == "ejected"
        for change in ({"api_key": "sk-new"}, {"api_key": "sk-new", "proxy": "http://proxy.test:3128"}):
            first, second = here.gateway.settings.upstreams
            here.gateway.reload(replace(here.gateway.settings, upstreams=(replace(first, **change), second)))
            assert state(here) == "trial"
            await turns(here, 2)  # it still fails
            assert state(here) == "ejected"


async def test_a_reload_does_not_forgive(autojump_clock: Any, handover: bool) -> None:
    """How an upstream stands outlives the configuration, unless it is another one by now."""
    async with several({"u0": refuses, "u1": ok}, handover=handover, health=HEALTH, retries=FREELY) as here:
        await turns(here, 3)
        here.gateway.reload(replace(here.gateway.settings, pseudonym="other"))
        assert state(here) == "ejected"
        assert await turns(here, 2) == {"u1": 2}
        first, second = named(2)
        moved = replace(first, base_url="http://elsewhere.test/v1")
        here.gateway.reload(replace(here.gateway.settings, upstreams=(moved, second)))
        assert state(here) == "usable"


async def test_retries_made_an_overload_three_times_worse(autojump_clock: Any, handover: bool) -> None:
    """When everybody refuses, what upstreams bear is a fifth more than what clients ask, and the floor and burst."""
    plays: dict[str, Play] = {f"u{number}": answers(503, b"retry-after: 0") for number in range(3)}
    retries = Retries(share=0.2, floor=1.0, burst=5.0, backoff=0.0)
    health = Health(failures=10**6, error_rate=1.0, error_count=10**6)
    async with several(plays, handover=handover, retries=retries, health=health) as here:
        for _ in range(200):
            assert (await talk(here)).status == 503
            await trio.sleep(0.01)
        extra = sum(asked(here).values()) - 200
        assert 40 <= extra <= 0.2 * 200 + 1.0 * 2.5 + 5
        statistics = here.gateway.statistics()
        assert sum(one.retries for one in statistics.upstreams.values()) == extra
        assert statistics.retries_refused >= 200 - extra


async def test_no_free_connection_costs_no_budget(autojump_clock: Any, handover: bool) -> None:
    """Nothing was asked of an upstream without a free connection: another one may always be asked."""
    first, second = named(2)
    settings = {"retries": Retries(share=0, floor=0, burst=0), "deadlines": Deadlines(lease=0.1)}
    plays = {"u0": silent, "u1": ok}
    async with several(plays, replace(first, connections=1), second, handover=handover, **settings) as here:
        holder = here.connect()
        await holder.send(hello())
        await trio.sleep(1)
        assert await turns(here, 5) == {"u1": 5}


# -- strategies --------------------------------------------------------------------------------------------------------


async def test_round_robin_by_weight_and_tier(autojump_clock: Any, handover: bool) -> None:
    """Each has its part; the second tier has nothing while the first is well, and everything while it is not."""
    model = Model("m", (Target("u0", weight=3), Target("u1"), Target("u2", tier=1)), Balance("round_robin"))
    plays: dict[str, Play] = {"u0": ok, "u1": ok, "u2": ok}
    settings = {"models": (model,), "health": replace(HEALTH, most_ejected=0.7), "retries": FREELY}
    async with several(plays, handover=handover, **settings) as here:
        counts = await turns(here, 40)
        assert abs(counts["u0"] - 30) <= 1
        assert counts["u2"] == 0
        plays["u0"] = plays["u1"] = refuses
        await turns(here, 20)
        assert await turns(here, 5) == {"u2": 5}


async def test_fewest_streams_sees_what_runs(autojump_clock: Any, handover: bool) -> None:
    """Streams that go on count; a new one goes where fewer are."""
    plays: dict[str, Play] = {name: streams(*[EVENT] * 50, gap=1.0) for name in ("u0", "u1", "u2")}
    async with several(plays, handover=handover, balance=Balance("fewest_streams")) as here:
        for _ in range(9):
            client = here.connect()
            await client.send(hello())
            await trio.sleep(0.1)
        assert asked(here) == {"u0": 3, "u1": 3, "u2": 3}


async def test_fastest_goes_by_the_first_token(autojump_clock: Any, handover: bool) -> None:
    """Heads come at once from both; the one whose first token takes longer gets what the other cannot bear."""
    plays: dict[str, Play] = {"u0": streams(EVENT, gap=5.0), "u1": streams(EVENT, gap=0.5)}
    async with several(plays, handover=handover, balance=Balance("fastest", memory=1000.0)) as here:
        counts = await turns(here, 12)
        assert counts["u0"] <= 2
        statistics = here.gateway.statistics().upstreams
        assert statistics["u1"].first_token == pytest.approx(0.5, abs=0.1)


async def test_an_upstream_that_fails_at_once_attracted_everybody(autojump_clock: Any, handover: bool) -> None:
    """A failure is not a fast answer."""
    plays: dict[str, Play] = {"u0": answers(500), "u1": streams(EVENT, gap=0.5)}
    settings = {"balance": Balance("fastest", memory=1000.0), "health": replace(HEALTH, failures=1000)}
    async with several(plays, handover=handover, **settings) as here:
        counts = await turns(here, 20)
        assert counts["u0"] <= 2


KEYS = tuple(
    Key(f"team-{number}", hashlib.sha256(f"sk-{number}".encode()).hexdigest(), principal=f"team-{number}")
    for number in range(12)
)


@pytest.mark.parametrize("hash_by", ["principal", "header:x-session", "prompt"])
async def test_the_same_key_goes_to_the_same_upstream(autojump_clock: Any, handover: bool, hash_by: str) -> None:
    """Principals, sessions or conversations stay where they are; together they are everywhere."""
    plays: dict[str, Play] = {f"u{number}": ok for number in range(3)}
    balance = Balance("hash", hash_by=hash_by)
    seen: set[str] = set()
    async with several(plays, handover=handover, balance=balance, keys=KEYS) as here:
        for number in range(12):
            fields = [f"Authorization: Bearer sk-{number if hash_by == 'principal' else 0}"]
            fields += [f"X-Session: s{number}"] if hash_by.startswith("header") else []
            text = f"question {number}" if hash_by == "prompt" else "hi"
            counts = await turns(here, 3, hello(text, *fields))
            assert len(counts) == 1
            seen |= set(counts)
    assert seen == set(plays)


async def test_a_conversation_moves_only_while_its_upstream_is_away(autojump_clock: Any, handover: bool) -> None:
    """Its upstream fails: another one takes it, always the same; it comes back: so does the conversation."""
    plays: dict[str, Play] = {f"u{number}": ok for number in range(4)}
    settings = {"balance": Balance("hash", hash_by="prompt"), "health": HEALTH, "retries": FREELY}
    async with several(plays, handover=handover, **settings) as here:
        (home,) = await turns(here, 1)
        plays[home] = refuses
        await turns(here, 3)
        (other,) = await turns(here, 5)
        assert other != home
        plays[home] = ok
        await trio.sleep(10)
        assert await turns(here, 5) == {home: 5}


async def test_a_prompt_that_still_arrives_is_waited_for(autojump_clock: Any, handover: bool) -> None:
    """A body that comes in two parts goes where it would go in one."""
    plays: dict[str, Play] = {f"u{number}": ok for number in range(5)}
    async with several(plays, handover=handover, balance=Balance("hash", hash_by="prompt")) as here:
        (home,) = await turns(here, 1, hello("a question"))
        raw = hello("a question")
        client = here.connect()
        await client.send(raw[:-20])
        await trio.sleep(1)
        await client.send(raw[-20:])
        assert (await client.response()).status == 200
        assert asked(here)[home] == 2


async def test_a_prompt_that_is_more_than_may_be_held(autojump_clock: Any, handover: bool) -> None:
    """What has to be read whole to find its home is bounded: 413, and nobody is asked."""
    plays: dict[str, Play] = {"u0": ok, "u1": ok}
    settings: dict[str, Any] = {
        "balance": Balance("hash", hash_by="prompt"),
        "bounds": Bounds(held_body_bytes=10_000, held_total_bytes=50_000),
    }
    async with several(plays, handover=handover, **settings) as here:
        client = here.connect()
        await client.send(hello("x" * 30_000))
        assert (await client.response()).status == 413
        assert not asked(here)
