"""Limits at the gateway: what is told, what is counted, and that a slot lasts exactly as long as its exchange."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import replace
from typing import Any

import pytest
import trio
import trio.testing
from kit import chat, request
from simkit import OK, SSE, URL, Conversation, World, answer_ok, failed, only_record, world

from canal_trio.errors import Kind, Phase, Side
from canal_trio.hooks import Outcome
from canal_trio.policy.ratelimit import Ask, Rule
from canal_trio.policy.scopes import Scope
from canal_trio.quota.admission import Limits, Verdict
from canal_trio.settings import Key, Limit, LimitStore, Model, Price, Target, Upstream

KEYS = tuple(Key(name, hashlib.sha256(name.encode()).hexdigest()) for name in ("a", "b"))
GET = request("GET", "/v1/models", None, "Authorization: Bearer a")


def in_flight(here: World, name: str = "total") -> int:
    """Exchanges that a scope counts as in flight, by asking as one more would."""
    table = here.limits.store.table  # type: ignore[attr-defined]  # the one in memory
    probe = Scope(name, Rule(Limit()), "total", "")
    counted, _ = table.admit([probe], Ask(), here.limits.store._calendar.moment(trio.current_time()))  # type: ignore[attr-defined]
    streams = int(counted[0][1].streams)
    here.limits.store.settle(counted, Ask(), Ask())
    return streams - 1


def completion(key: str = "a", **body: Any) -> bytes:
    """A chat completion of this key's."""
    text = json.dumps({"model": "m", "messages": []} | body).encode()
    fields = ("Content-Type: application/json", f"Authorization: Bearer {key}")
    return request("POST", "/v1/chat/completions", text, *fields)


async def test_a_key_over_its_limit_is_told_when_to_come_again(autojump_clock: Any, handover: bool) -> None:
    """gateways.md C21: our own 429 has OpenAI's shape, an honest retry-after and x-ratelimit fields; others go on."""
    limits = (Limit(principal="a", requests=2, tokens=None),)
    async with world(answer_ok, handover=handover, keys=KEYS, limits=limits) as here:
        client = here.connect()
        for left in (1, 0):
            await client.send(GET)
            response = await client.response()
            assert response.status == 200
            assert response.header("x-ratelimit-limit-requests") == "2"
            assert response.header("x-ratelimit-remaining-requests") == str(left)
            assert response.header("x-ratelimit-reset-requests") == f"{(2 - left) * 30}s".replace("60s", "1m0s")
            assert response.header("x-ratelimit-limit-tokens") is None
        await client.send(GET)
        response = await client.response()
        assert response.status == 429
        assert response.error == {
            "message": "Rate limit reached for 'a': 2 requests per minute. Try again in 30s.",
            "type": "rate_limit_error",
            "param": None,
            "code": "rate_limit_exceeded",
        }
        assert response.header("retry-after") == "30"
        assert response.header("x-ratelimit-remaining-requests") == "0"
        assert response.header("x-request-id")
        assert len(here.conversations[0].requests) == 2  # nothing upstream was touched
        other = here.connect()
        await other.send(GET.replace(b"Bearer a", b"Bearer b"))
        answer = await other.response()
        assert (answer.status, answer.header("x-ratelimit-limit-requests")) == (200, None)
        await trio.sleep(30)  # as told
        await client.send(GET)
        assert (await client.response()).status == 200
        refused = here.records.all[2]
        assert refused.outcome is Outcome.REJECTED
        failed(refused, Side.CLIENT, Phase.ROUTE, Kind.LIMITED)
        assert here.limits.rejections == {("principal", "requests"): 1}


async def test_a_slot_lasts_as_long_as_the_stream(autojump_clock: Any, handover: bool) -> None:
    """gateways.md C22: a stream holds its place to its last byte, not to its head; then the place is free at once."""

    async def play(upstream: Conversation) -> None:
        await upstream.say(SSE)
        await upstream.chunk(b"data: 1\n\n")
        await trio.sleep(100)
        await upstream.chunk(b"data: [DONE]\n\n")
        await upstream.say(b"0\r\n\r\n")

    async with world(play, handover=handover, limits=(Limit(streams=1),)) as here:
        first, second = here.connect(), here.connect()
        await first.send(chat())
        await first.until(b"data: 1\n\n")
        for _ in range(3):
            await trio.sleep(30)
            await second.send(chat())
            response = await second.response()
            assert (response.status, response.error["code"]) == (429, "rate_limit_exceeded")
            assert response.header("retry-after") == "1"
        await trio.sleep(20)
        await first.until(b"0\r\n\r\n")
        await trio.sleep(0.01)
        await second.send(chat())
        await second.until(b"data: 1\n\n")
        assert in_flight(here) == 1


@pytest.mark.parametrize("seed", range(6))
async def test_no_slot_leaks_or_is_released_early_in_a_cancel_storm(
    autojump_clock: Any, handover: bool, seed: int
) -> None:
    """gateways.md C22: clients that leave in every phase, at once and again and again, leave every place free; never
    more exchanges than allowed are upstream."""
    dice = random.Random(seed)
    playing: set[int] = set()
    most = 0

    async def play(upstream: Conversation) -> None:
        nonlocal most
        playing.add(upstream.number)
        most = max(most, sum(here.conversations[number].left is None for number in playing))
        try:
            await trio.sleep(dice.random() * 3)
            await upstream.say(SSE)
            for _ in range(dice.randrange(4)):
                await upstream.chunk(b"data: x\n\n")
                await trio.sleep(dice.random())
            await upstream.say(b"0\r\n\r\n")
        finally:
            playing.discard(upstream.number)

    async def storm(here: World) -> None:
        for _ in range(6):
            client = here.connect()
            await client.send(chat()[: dice.choice([20, 150, None, None, None])])
            with trio.move_on_after(dice.random() * 5):
                await client.fill()
                await trio.sleep(dice.random() * 3)
            client.stream.close()  # type: ignore[attr-defined]  # a simulated stream
            await trio.sleep(dice.random())

    async with world(play, handover=handover, limits=(Limit(streams=5), Limit(model="*", streams=5))) as here:
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(storm, here)
        await trio.sleep(60)
        assert (in_flight(here), in_flight(here, "model:1:m")) == (0, 0)
        assert most == 5
        assert any(record.outcome is Outcome.CLIENT_GONE for record in here.records.all)
        assert here.limits.rejections


async def test_tokens_are_set_aside_before_and_settled_after(autojump_clock: Any, handover: bool) -> None:
    """What a request may generate counts while it runs; what it has generated counts when it has ended."""

    async def play(upstream: Conversation) -> None:
        await trio.sleep(0.001)
        await upstream.say(OK)

    async with world(play, handover=handover, keys=KEYS, limits=(Limit(principal="*", tokens=1000),)) as here:
        client = here.connect()
        body = completion(max_tokens=900)
        size = -(-len(body.partition(b"\r\n\r\n")[2]) // 4)
        await client.send(body)
        response = await client.response()
        assert response.header("x-ratelimit-limit-tokens") == "1000"
        assert response.header("x-ratelimit-remaining-tokens") == str(100 - size)
        await client.send(body)  # 2 bytes of answer were one token: nearly everything is there again
        assert (await client.response()).status == 200
        await client.send(completion(max_tokens=10**6))
        response = await client.response()
        assert response.status == 429
        assert "1000 tokens per minute" in response.error["message"]
        await client.send(completion("b", max_tokens=900))
        assert (await client.response()).status == 200


async def test_a_spent_budget_is_insufficient_quota(autojump_clock: Any, handover: bool) -> None:
    """A budget that is spent is told in OpenAI's words; no SDK is invited to try again before the next day."""
    settings: dict[str, Any] = {
        "limits": (Limit(spend_day=0.05),),
        "prices": (Price("m", request=0.03, output=1.0),),
    }
    async with world(answer_ok, handover=handover, **settings) as here:
        client = here.connect()
        for _ in range(2):
            await client.send(completion())
            assert (await client.response()).status == 200
        await client.send(completion())
        response = await client.response()
        assert response.status == 429
        assert (response.error["type"], response.error["code"]) == ("insufficient_quota", "insufficient_quota")
        assert response.error["message"].startswith("The budget of this gateway, 0.05 a day (UTC), is spent.")
        assert response.header("x-should-retry") == "false"
        assert response.header("retry-after") == "43200"
        assert here.limits.rejections == {("total", "spend_day"): 1}


async def test_what_failed_upstream_costs_no_tokens_and_no_money(autojump_clock: Any, handover: bool) -> None:
    """gateways.md C5: an upstream's error is not billed; the request counts, its tokens come back."""

    async def play(upstream: Conversation) -> None:
        await upstream.say(b"HTTP/1.1 500 Oops\r\nContent-Length: 2\r\n\r\nno")

    settings: dict[str, Any] = {"limits": (Limit(spend_day=0.05, tokens=1000),), "prices": (Price("m", request=0.04),)}
    async with world(play, handover=handover, **settings) as here:
        client = here.connect()
        for _ in range(5):
            await client.send(completion(max_tokens=900))
            assert (await client.response()).status == 500


async def test_a_stream_that_is_cut_short_is_not_free(autojump_clock: Any, handover: bool) -> None:
    """gateways.md C5: a client that leaves just before the usage pays for what it got, by estimate."""

    async def play(upstream: Conversation) -> None:
        await upstream.say(SSE)
        for _ in range(50):
            await upstream.chunk(b"data: x\n\n")
        await trio.sleep_forever()

    limits, prices = (Limit(tokens=6000, spend_month=1),), (Price("m", output=1000.0),)
    async with world(play, handover=handover, limits=limits, prices=prices) as here:
        client = here.connect()
        await client.send(completion(stream=True, max_tokens=3000))
        for _ in range(50):
            await client.until(b"data: x\n\n")
        client.stream.close()  # type: ignore[attr-defined]  # a simulated stream
        await only_record(here)
        moment = here.limits.store._calendar.moment(0)  # type: ignore[attr-defined]  # the one in memory
        ((_, _, _, spent),) = here.limits.store.table.spent(moment).values()  # type: ignore[attr-defined]  # as above
        assert 45_000_000 <= spent <= 50_000_000  # nanos: a thousandth for each token


async def test_ours_replace_the_upstreams_fields_of_the_same_name(autojump_clock: Any, handover: bool) -> None:
    """gateways.md C21: the upstream's own limits are not this client's, but its 429 and its other fields are passed."""
    own = (
        b"X-RateLimit-Limit-Requests: 9999\r\nx-ratelimit-remaining-requests: 7\r\nx-ratelimit-reset-requests: 1ms\r\n"
        b"x-ratelimit-remaining-tokens: 5\r\nretry-after-ms: 12\r\n"
    )
    status = [b"200 OK"]

    async def play(upstream: Conversation) -> None:
        await upstream.say(b"HTTP/1.1 %b\r\nContent-Length: 2\r\n%b\r\nok" % (status[0], own))

    async with world(play, handover=handover, limits=(Limit(requests=10),)) as here:
        client = here.connect()
        await client.send(GET)
        response = await client.response()
        assert response.all("x-ratelimit-limit-requests") == ["10"]
        assert response.all("x-ratelimit-remaining-requests") == ["9"]
        assert response.all("x-ratelimit-reset-requests") == ["6s"]
        assert response.all("x-ratelimit-remaining-tokens") == ["5"]
        status[0] = b"429 Slow Down"
        await client.send(GET)
        response = await client.response()
        assert response.status == 429
        assert response.all("x-ratelimit-limit-requests") == ["9999"]
        assert (response.header("retry-after-ms"), response.body) == ("12", b"ok")


async def test_an_exchange_counts_once_however_often_it_is_tried(autojump_clock: Any, handover: bool) -> None:
    """Failover does not use up the client's limit."""

    async def play(upstream: Conversation) -> None:
        status = b"503 No" if upstream.number == 0 else b"200 OK"
        await upstream.say(b"HTTP/1.1 %b\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % status)

    models = (Model("m", (Target("u0"), Target("u1"))),)
    settings: dict[str, Any] = {"upstreams": (Upstream("u0", URL), Upstream("u1", URL)), "models": models}
    async with world(play, handover=handover, limits=(Limit(requests=10),)) as here:
        here.gateway.reload(replace(here.gateway.settings, **settings))
        client = here.connect()
        await client.send(completion())
        response = await client.response()
        assert (response.status, response.header("x-ratelimit-remaining-requests")) == (200, "9")
        assert (await only_record(here)).attempts == 2


async def test_a_reload_changes_the_limits_and_keeps_the_count(autojump_clock: Any, handover: bool) -> None:
    """What was used under the old limits counts under the new ones; without any nothing is asked or told."""
    async with world(answer_ok, handover=handover) as here:
        client = here.connect()

        async def remaining(*limits: Limit) -> str | None:
            here.gateway.reload(replace(here.gateway.settings, limits=limits))
            await client.send(GET)
            response = await client.response()
            return response.header("x-ratelimit-remaining-requests") if response.status == 200 else "refused"

        assert await remaining() is None
        assert here.gateway.generation.admission is None
        assert await remaining(Limit(requests=10)) == "9"
        assert await remaining(Limit(requests=20)) == "18"
        assert await remaining(Limit(requests=1)) == "refused"
        assert await remaining(Limit(principal="nobody", requests=1)) is None


class Away:
    """A store that does not answer."""

    away = True
    admit_now = None
    errors = 0

    async def admit(self, scopes: tuple[Scope, ...], ask: Ask) -> Verdict | None:
        """Nobody can tell."""
        return None

    async def flush(self) -> None:
        """Nothing is settled."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Nothing to do."""
        task_status.started()


@pytest.mark.parametrize(("fail", "status"), [("open", 200), ("closed", 503)])
async def test_a_store_that_is_away_lets_in_what_was_chosen(
    autojump_clock: Any, handover: bool, fail: str, status: int
) -> None:
    """With `open` everything, uncounted; with `closed` nothing, and the answer says whose fault it is."""
    settings: dict[str, Any] = {"limits": (Limit(requests=1),), "limit_store": LimitStore(fail=fail)}
    async with world(answer_ok, handover=handover, counting=Limits(Away()), **settings) as here:
        client = here.connect()
        for _ in range(2):
            await client.send(GET)
            response = await client.response()
            assert response.status == status
            if status == 503:
                assert response.error["code"] == "limits_unavailable"
                assert (response.header("retry-after"), response.header("x-should-retry")) == ("1", "true")


async def test_files_are_not_held_for_the_limits(autojump_clock: Any, handover: bool) -> None:
    """They name no model and stream through; JSON that cannot be read is refused, whatever an upstream makes of it."""
    arrived = trio.Event()

    async def play(upstream: Conversation) -> None:
        data = b""
        while b"half" not in data:
            data += await upstream.stream.receive_some()
        arrived.set()
        while b"rest" not in data:
            data += await upstream.stream.receive_some()
        await upstream.say(OK)

    async with world(play, handover=handover, limits=(Limit(tokens=1000, model="*"),)) as here:
        here.by_request = False
        client = here.connect()
        head = b"POST /v1/files HTTP/1.1\r\nHost: g\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        head += b"Content-Length: 8\r\n\r\n"
        await client.send(head + b"half")
        await arrived.wait()
        await client.send(b"rest")
        assert (await client.response()).status == 200
    async with world(answer_ok, handover=handover, limits=(Limit(tokens=1000),)) as here:
        client = here.connect()
        await client.send(request("POST", "/v1/x", b"[1", "Content-Type: application/json"))
        assert (await client.response()).status == 400


@pytest.mark.parametrize("kind", ["text/plain", "application/octet-stream", ""])
async def test_a_content_type_does_not_lead_around_a_budget(autojump_clock: Any, handover: bool, kind: str) -> None:
    """Many upstreams read JSON whatever it is called: so do the limits, of models and of money."""
    settings: dict[str, Any] = {
        "limits": (Limit(model="m", requests=1), Limit(spend_day=0.05)),
        "prices": (Price("m", request=0.05),),
    }
    async with world(answer_ok, handover=handover, **settings) as here:
        client = here.connect()
        fields = [f"Content-Type: {kind}"] if kind else []
        for status in (200, 429):
            await client.send(request("POST", "/v1/chat/completions", b'{"model":"m","messages":[]}', *fields))
            assert (await client.response()).status == status
        assert here.limits.rejections == {("total", "spend_day"): 1}
