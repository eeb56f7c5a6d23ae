"""What users of other gateways complained about in failover, retries and balance (gateways.md, section C), over real
sockets: each complaint a test, named by its symptom."""

from __future__ import annotations

import random
from contextlib import AsyncExitStack
from typing import Any

import pytest
import trio
from kit import RunningGateway, chat, eventually, running_gateway, settings_for
from rawclient import Response

from canal_trio.errors import Kind
from canal_trio.hooks import Outcome
from canal_trio.settings import Balance, Deadlines, Health, Retries, Upstream
from canal_trio.testing.scripts import (
    Cut,
    Script,
    Stall,
    chat_stream,
    cut_after,
    error_event,
    openai_error,
    reply,
    stream,
)
from canal_trio.testing.upstreams import Answer, ScriptedUpstream

GOOD = reply({"ok": True})
HINTS = [
    ("retry-after", "7"),
    ("retry-after-ms", "6500"),
    ("x-should-retry", "true"),
    ("x-ratelimit-limit-requests", "60"),
    ("x-ratelimit-remaining-requests", "0"),
    ("x-ratelimit-reset-requests", "1s"),
    ("x-ratelimit-limit-tokens", "150000"),
    ("x-ratelimit-remaining-tokens", "149984"),
    ("x-ratelimit-reset-tokens", "6m0s"),
]


class Several:
    """A gateway before some scripted upstreams."""

    def __init__(self, gateway: RunningGateway, upstreams: list[ScriptedUpstream]) -> None:
        self.gateway = gateway
        self.upstreams = upstreams

    def asked(self) -> list[int]:
        """How many requests each got."""
        return [len(upstream.requests) for upstream in self.upstreams]

    async def ask(self, raw: bytes = b"") -> Response:
        """One exchange."""
        return await self.gateway.ask(raw or chat())


class several:  # used as a context manager
    """Upstreams u0, u1, … with these scripts and options, and a gateway before them."""

    def __init__(self, *answers: Answer, options: dict[str, Any] | None = None, **settings: Any) -> None:
        self._answers = answers
        self._options = options or {}
        self._settings = settings
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Several:
        upstreams = [await self._stack.enter_async_context(ScriptedUpstream(answer)) for answer in self._answers]
        made = [Upstream(f"u{number}", one.url, **self._options) for number, one in enumerate(upstreams)]
        gateway = await self._stack.enter_async_context(running_gateway(settings_for(*made, **self._settings)))
        return Several(gateway, upstreams)

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.__aexit__(*exc)  # type: ignore[arg-type]  # as they come


@pytest.mark.parametrize("status", [200, 429, 500, 503])
async def test_retry_after_and_rate_limits_were_lost(status: int) -> None:
    """C21: what an upstream says about limits and retries reaches the client, once and as it was said."""
    answer = reply({"ok": True}, headers=HINTS) if status == 200 else openai_error(status, "slow down", headers=HINTS)
    async with several(answer) as here:
        response = await here.ask()
        assert response.status == status
        for name, value in HINTS:
            assert response.all(name) == [value]


async def test_sdks_stormed_because_the_gateway_retried_what_it_was_told_not_to() -> None:
    """C21: after `retry-after` an upstream is not asked again at once, though clients do not wait."""
    async with several(openai_error(429, "slow down", headers=[("retry-after", "30")]), GOOD) as here:
        for _ in range(10):
            assert (await here.ask()).status == 200
        assert here.asked() == [1, 10]


async def test_fallback_after_bytes_were_sent_duplicated_the_text() -> None:
    """C24: once a token was relayed nobody else is asked, whatever is allowed; the break is told, without `[DONE]`."""
    broken = cut_after(chat_stream(10), 3)
    balance = Balance(hold_first_event=True)
    async with several(broken, chat_stream(10), options={"retry_sent": True}, balance=balance) as here:
        response = await here.ask()
        assert response.status == 200
        assert not response.complete
        assert response.body.count(b"chat.completion.chunk") <= 4
        assert b'"code":"upstream_disconnected"' in response.body
        assert b"[DONE]" not in response.body
        assert here.asked() == [1, 0]


async def test_error_in_the_second_event_was_hidden_behind_a_second_answer() -> None:
    """C24: an error behind a relayed event is relayed verbatim and counted; it is too late for another upstream."""
    events = [b'data: {"choices":[{"delta":{"role":"assistant"}}]}\n\n', error_event("out of memory").payload]
    async with several(stream(events, gap=0.05), chat_stream(2), balance=Balance(hold_first_event=True)) as here:
        response = await here.ask()
        assert response.body == b"".join(events)
        record = await here.gateway.records.one()
        assert (record.attempts, record.outcome) == (1, Outcome.UPSTREAM_ERROR)


async def test_in_band_error_was_counted_as_success_by_the_breaker() -> None:
    """C10: upstreams that report errors inside of a 200 are ejected like any other."""
    health, refusal = Health(failures=3), error_event("no slot").payload
    async with several(stream([refusal]), chat_stream(2), health=health) as here:
        for _ in range(3):
            assert (await here.ask()).body == refusal
        await eventually(lambda: here.gateway.gateway.statistics().upstreams["u0"].state == "ejected")
        assert (await here.ask()).complete
        assert here.asked() == [3, 1]


async def test_first_token_timeout_was_not_enforced() -> None:
    """C23: a head at once and then silence is a timeout too: it fails over where the first event is held."""
    mute = Script((*stream([b"never"]).steps[:1], Stall()))
    settings: dict[str, Any] = {
        "balance": Balance(hold_first_event=True),
        "deadlines": Deadlines(upstream_idle=0.2),
        "options": {"retry_sent": True},
    }
    async with several(mute, chat_stream(2), **settings) as here:
        response = await here.ask()
        assert response.complete
        assert here.asked() == [1, 1]
        await here.upstreams[0].until(lambda: here.upstreams[0].connections[0].left is not None)


async def test_stale_pooled_connections_opened_the_breaker() -> None:
    """C30: a reused connection that dies is repeated on a fresh one, and says nothing about its upstream."""
    dies = lambda seen: GOOD if len(seen.connection.requests) == 1 else Script((Cut(),))  # noqa: E731  # a script
    async with several(dies, GOOD, health=Health(failures=2)) as here:
        for _ in range(8):
            assert (await here.ask()).status == 200
        records = await here.gateway.records.wait(8)
        assert {record.upstream for record in records} == {"u0"}
        assert sum(record.attempts - 1 for record in records) >= 4
        assert here.gateway.gateway.statistics().upstreams["u0"].state == "usable"


async def test_a_dead_upstream_made_every_second_request_slow() -> None:
    """One of two does not listen: every request succeeds, and after a few nobody tries it any more."""
    async with ScriptedUpstream(GOOD) as alive:
        settings = settings_for("http://127.0.0.1:1", alive.url, balance=Balance("round_robin"))
        async with running_gateway(settings) as gateway:
            for _ in range(40):
                assert (await gateway.ask(chat())).status == 200
            records = await gateway.records.wait(40)
            assert sum(record.attempts - 1 for record in records) == Health().failures
            assert [record.attempts for record in records[20:]] == [1] * 20


async def test_an_upstream_that_was_restarted_never_came_back() -> None:
    """Ejected while it was down, tried when its time has passed, and then asked as before."""
    health = Health(failures=2, eject=0.3, slow_start=0.0)
    async with AsyncExitStack() as stack:
        other = await stack.enter_async_context(ScriptedUpstream(GOOD))
        async with ScriptedUpstream(GOOD) as first:
            port = first.port
        settings = settings_for(f"http://127.0.0.1:{port}", other.url, health=health)
        gateway = await stack.enter_async_context(running_gateway(settings))
        for _ in range(4):
            assert (await gateway.ask(chat())).status == 200
        assert gateway.gateway.statistics().upstreams["u0"].state == "ejected"
        first = await stack.enter_async_context(ScriptedUpstream(GOOD, port=port))
        await trio.sleep(0.35)
        for _ in range(5):
            assert (await gateway.ask(chat())).status == 200
        assert len(first.requests) == 5


async def test_slots_of_the_balancer_leaked_in_a_cancel_storm() -> None:
    """C22: after clients that left at any moment nobody is believed to have anything in flight."""
    chance = random.Random(22)
    answers = [chat_stream(50, gap=0.002), openai_error(503, headers=[("retry-after", "0")]), Script((Stall(),))]
    settings: dict[str, Any] = {
        "balance": Balance("fewest_streams"),
        "health": Health(failures=10**6, error_rate=1.0, error_count=10**6),
        "retries": Retries(burst=1000.0),
    }
    async with several(*answers, **settings) as here:

        async def leave() -> None:
            client = await here.gateway.connect()
            await client.send(chat())
            await trio.sleep(chance.random() * 0.2)
            client.fin()

        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(leave)
        await here.gateway.records.wait(100)
        statistics = here.gateway.gateway.statistics().upstreams
        assert {name: one.in_flight for name, one in statistics.items()} == {"u0": 0, "u1": 0, "u2": 0}
        assert sum(here.asked()) > 0


@pytest.mark.parametrize("count", [1, 2])
async def test_a_timeout_was_answered_with_a_retry_hint(count: int) -> None:
    """Nobody answered in time: 504, and `x-should-retry: false`, for a generation may be under way."""
    async with several(*[Script((Stall(),))] * count, deadlines=Deadlines(first_byte=0.1)) as here:
        response = await here.ask()
        assert response.status == 504
        assert response.header("x-should-retry") == "false"
        record = await here.gateway.records.one()
        assert record.failure is not None
        assert (record.failure.kind, record.attempts) == (Kind.TIMEOUT, 1)
