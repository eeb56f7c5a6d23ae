"""Another upstream is asked before the first relayed byte and never after, on both paths, in virtual time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kit import request
from rawclient import Response
from several import (
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
from simkit import Conversation, Play, World, failed, only_record

from canal_trio.errors import Kind, Phase, Side
from canal_trio.hooks import Outcome, Tried
from canal_trio.settings import Balance, Bounds, Deadlines, Retries, Upstream

BODY = json.dumps({"model": "m", "stream": True, "messages": [{"role": "user", "content": "hi"}]}).encode()


async def head_breaks_off(upstream: Conversation) -> None:
    """Half a head."""
    await upstream.say(b"HTTP/1.1 200 OK\r\nContent-")
    upstream.stream.close()


async def body_breaks_off(upstream: Conversation) -> None:
    """A head and a part of the body."""
    await upstream.say(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
    upstream.stream.close()


# name: what u0 does, the client's status without and with `retry_sent`, the status or kind in the record
PHASES: dict[str, tuple[Play | None, int, int, str]] = {
    "dial": (None, 200, 200, "refused"),
    "busy": (answers(429), 200, 200, "429"),
    "unavailable": (answers(503), 200, 200, "503"),
    "error": (answers(500), 500, 200, "500"),
    "gateway-timeout": (answers(504), 504, 200, "504"),
    "silent": (silent, 504, 200, "timeout"),
    "vanishes": (vanishes, 502, 200, "cut"),
    "half-a-head": (head_breaks_off, 502, 200, "cut"),
    "not-found": (answers(404), 404, 404, "404"),
    "body": (body_breaks_off, 200, 200, ""),
    "stream": (streams(EVENT, cut=True), 200, 200, ""),
}


@pytest.mark.parametrize("retry_sent", [False, True])
@pytest.mark.parametrize("phase", PHASES)
async def test_each_phase(autojump_clock: Any, handover: bool, phase: str, retry_sent: bool) -> None:
    """Where the first upstream fails decides who answers; the second one gets the whole request, or nothing at all."""
    play, without, with_leave, result = PHASES[phase]
    plays: dict[str, Play] = {"u0": play or ok, "u1": ok}
    async with several(plays, *named(2, retry_sent=retry_sent), handover=handover) as here:
        if play is None:
            here.refusing.add("u0")
        response = await talk(here)
        expected = with_leave if retry_sent else without
        assert response.status == expected
        record = await only_record(here)
        moved = expected == 200 and result != ""
        assert record.attempts == 1 + moved
        assert record.upstream == ("u1" if moved else "u0")
        assert record.tried == ((Tried("u0", result),) if moved else ())
        assert asked(here)["u1"] == moved
        if moved:
            assert response.body == b"ok"
            assert record.outcome is Outcome.COMPLETED
            assert here.conversations[-1].requests[0].endswith(BODY)


async def test_connect_timeout(autojump_clock: Any, handover: bool) -> None:
    """A dial that takes too long is given up, and nothing of it is left."""
    async with several({"u0": ok, "u1": ok}, handover=handover, deadlines=Deadlines(connect=3.0)) as here:
        simulated = here._dial

        async def slow(upstream: Upstream) -> Any:
            if upstream.name == "u0":
                await trio.sleep(100)
            here.dialer = None
            return await simulated(upstream)

        here.dialer = slow
        start = trio.current_time()
        assert (await talk(here)).status == 200
        assert 3 <= trio.current_time() - start < 3.2
        assert (await only_record(here)).tried == (Tried("u0", "timeout"),)


def is_one_answer(raw: bytes) -> bool:
    """There is one status line in it: bodies here have none."""
    return raw.count(b"HTTP/1.1 ") == 1


kinds = st.sampled_from(
    ["ok", "stream", "refused", "429", "503", "500", "silent", "vanishes", "half", "cut", "error-first", "empty"]
)


def play_of(kind: str) -> Play:
    """What is drawn."""
    plays: dict[str, Play] = {
        "ok": ok,
        "stream": streams(EVENT, EVENT),
        "refused": ok,
        "silent": silent,
        "vanishes": vanishes,
        "half": head_breaks_off,
        "cut": streams(EVENT, cut=True),
        "error-first": error_first,
        "empty": streams(done=False),
    }
    return plays.get(kind) or answers(int(kind), b"retry-after: 2")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(kinds, min_size=1, max_size=4),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["in_order", "round_robin", "fewest_streams", "fastest", "hash"]),
    st.integers(1, 4),
)
def test_at_most_one_answer(
    drawn: list[str], retry_sent: bool, hold: bool, handover: bool, strategy: str, attempts: int
) -> None:
    """Whatever upstreams do: one answer, from one of them; nobody is asked twice, or more often than allowed, and each
    gets the whole request."""

    async def scenario() -> None:
        plays = {f"u{number}": play_of(kind) for number, kind in enumerate(drawn)}
        options: Mapping[str, Any] = {
            "balance": Balance(strategy, hold_first_event=hold),
            "retries": Retries(attempts=attempts),
        }
        async with several(plays, *named(len(drawn), retry_sent=retry_sent), handover=handover, **options) as here:
            here.refusing |= {f"u{number}" for number, kind in enumerate(drawn) if kind == "refused"}
            client = here.connect()
            await client.send(hello())
            await here.records.wait(seconds=10_000)
            response = await client.response()
            await client.rest()
            assert is_one_answer(client.seen)
            record = here.records.all[0]
            counts = asked(here)
            assert all(count == 1 for count in counts.values() if count)
            assert record.attempts <= min(attempts, len(drawn))
            assert len(record.tried) + 1 in (record.attempts, record.attempts + 1)
            for conversation in here.conversations:
                assert all(one.endswith(BODY) for one in conversation.requests)
            assert response.status in (200, 429, 500, 502, 503, 504)
            if response.status == 200 and record.upstream is not None:
                kind = drawn[int(record.upstream[1:])]
                assert kind in ("ok", "stream", "cut", "error-first", "empty")
                assert response.complete is (kind != "cut")

    trio.run(scenario, clock=trio.testing.MockClock(autojump_threshold=0))


# -- back-off ----------------------------------------------------------------------------------------------------------

SLOW = Retries(backoff=1000.0, backoff_most=1000.0)


async def backing_off(here: World) -> Any:
    """A client whose exchange waits before its second attempt."""
    client = here.connect()
    await client.send(hello())
    await trio.testing.wait_all_tasks_blocked()
    assert here.gateway.exchanges()[0].phase == "route"
    return client


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_client_left_during_backoff_and_the_retry_was_made(autojump_clock: Any, handover: bool, how: str) -> None:
    """Leaving ends the pause in that very moment: nobody else is asked."""
    async with several({"u0": refuses, "u1": ok}, handover=handover, retries=SLOW) as here:
        client = await backing_off(here)
        start = trio.current_time()
        getattr(client.stream, how)()
        await trio.testing.wait_all_tasks_blocked()
        assert trio.current_time() == start
        record = await here.records.one()
        failed(record, Side.CLIENT, Phase.ROUTE, Kind.GONE)
        assert record.outcome is Outcome.CLIENT_GONE
        assert asked(here)["u1"] == 0


async def test_drain_during_backoff(autojump_clock: Any, handover: bool) -> None:
    """The drain's deadline ends a pause as well, with an answer that says so."""
    async with several({"u0": refuses, "u1": ok}, handover=handover, retries=SLOW) as here:
        client = await backing_off(here)
        here.gateway.drain(trio.current_time() + 1)
        response = await client.response()
        assert response.status == 503
        assert response.error["code"] == "gateway_draining"


async def test_the_pause_is_bounded(autojump_clock: Any, handover: bool) -> None:
    """Two pauses, each at most what is said."""
    retries = Retries(backoff=2.0, backoff_most=3.0)
    async with several({"u0": refuses, "u1": refuses, "u2": ok}, handover=handover, retries=retries) as here:
        start = trio.current_time()
        assert (await talk(here)).status == 200
        assert trio.current_time() - start <= 5.0


# -- the last honest answer --------------------------------------------------------------------------------------------

HINTS = (
    b"retry-after: 7",
    b"retry-after-ms: 6500",
    b"x-should-retry: false",
    b"x-ratelimit-remaining-requests: 0",
    b"x-ratelimit-reset-tokens: 6m0s",
)
REFUSAL = b'{"error":{"message":"slow down","type":"rate_limit","param":null,"code":"busy"}}'


def is_the_refusal(response: Response) -> None:
    """All of what the upstream said is there."""
    assert (response.status, response.body, response.complete) == (429, REFUSAL, True)
    for hint in HINTS:
        name, _, value = hint.decode().partition(": ")
        assert response.all(name) == [value]


async def test_429_became_a_502_because_the_fallback_was_down(autojump_clock: Any, handover: bool) -> None:
    """An upstream's own refusal, its hints included, is better than our word about one that could not be reached."""
    plays = {"u0": answers(429, *HINTS, body=REFUSAL), "u1": ok}
    async with several(plays, handover=handover) as here:
        here.refusing.add("u1")
        is_the_refusal(await talk(here))
        record = await only_record(here)
        assert (record.upstream, record.attempts, record.outcome) == ("u0", 2, Outcome.COMPLETED)
        assert record.tried == (Tried("u0", "429"), Tried("u1", "refused"))


async def test_client_was_told_to_come_back_while_its_answer_was_generated(autojump_clock: Any, handover: bool) -> None:
    """After a refusal by one, another does not answer in time: it may be generating, so the client is not invited."""
    plays = {"u0": answers(429, *HINTS, body=REFUSAL), "u1": silent}
    async with several(plays, handover=handover) as here:
        response = await talk(here)
        assert (response.status, response.header("x-should-retry")) == (504, "false")
        assert response.header("retry-after") is None


async def test_the_last_refusal_counts(autojump_clock: Any, handover: bool) -> None:
    """The last upstream's own answer is relayed as it is, hints included."""
    plays = {"u0": answers(503), "u1": answers(429, *HINTS, body=REFUSAL)}
    async with several(plays, handover=handover) as here:
        is_the_refusal(await talk(here))


@pytest.mark.parametrize("what", ["large", "slow", "cut"])
async def test_a_refusal_that_cannot_be_kept(autojump_clock: Any, handover: bool, what: str) -> None:
    """A refusal too large, too slow or broken is given up: then the failure that came last is told."""

    async def play(upstream: Conversation) -> None:
        await upstream.say(b"HTTP/1.1 429 X\r\nContent-Length: 100000\r\n\r\n")
        if what == "large":
            await upstream.say(b"x" * 100_000)
        elif what == "cut":
            upstream.stream.close()
        else:
            await trio.sleep_forever()

    async with several({"u0": play, "u1": ok}, handover=handover) as here:
        here.refusing.add("u1")
        start = trio.current_time()
        response = await talk(here)
        assert trio.current_time() - start < 1.2
        assert response.status == 502
        assert response.error["code"] == "upstream_unreachable"
        assert response.header("x-should-retry") == "true"


async def test_the_connection_of_a_refusal_serves_again(autojump_clock: Any) -> None:
    """What was read whole leaves its connection fit for the next exchange."""
    plays: dict[str, Play] = {"u0": answers(503, b"retry-after: 0"), "u1": ok}
    async with several(plays, handover=True) as here:
        assert (await talk(here)).status == 200
        plays["u0"] = ok
        assert (await talk(here)).status == 200
        assert len([one for one in here.conversations if one.upstream == "u0"]) == 1


async def test_all_unreachable(autojump_clock: Any, handover: bool) -> None:
    """Without any answer of theirs it is our 502, and trying again is safe."""
    async with several({"u0": ok, "u1": ok}, handover=handover) as here:
        here.refusing |= {"u0", "u1"}
        response = await talk(here)
        assert (response.status, response.header("x-should-retry")) == (502, "true")
        assert (await only_record(here)).tried == (Tried("u0", "refused"),)


# -- bodies ------------------------------------------------------------------------------------------------------------


async def test_an_upload_that_goes_on_is_replayed_whole(autojump_clock: Any, handover: bool) -> None:
    """A refusal in the middle of the upload: the next upstream gets what was held and what still comes, once."""
    async with several({"u0": ok, "u1": ok}, handover=handover) as here:
        here.refusing.add("u0")
        client = here.connect()
        await client.send(request("POST", "/v1/files", None, "Content-Length: 90000") + b"a" * 40_000)
        await trio.sleep(1)
        await client.send(b"b" * 50_000)
        assert (await client.response()).status == 200
        body = here.conversations[-1].requests[0].partition(b"\r\n\r\n")[2]
        assert body == b"a" * 40_000 + b"b" * 50_000


async def test_what_is_no_longer_held_is_not_sent_twice(autojump_clock: Any, handover: bool) -> None:
    """A body beyond the bound that was begun to be sent is not offered to another upstream: the refusal is relayed."""

    async def early(upstream: Conversation) -> None:
        while not upstream.requests:
            data = await upstream.stream.receive_some()
            upstream.requests += [data] if data.endswith(b"!") else []
        await upstream.say(b"HTTP/1.1 503 X\r\nContent-Length: 0\r\n\r\n")

    small = Bounds(held_body_bytes=10_000, held_total_bytes=20_000)
    async with several({"u0": early, "u1": ok}, handover=handover, bounds=small) as here:
        here.by_request = False
        client = here.connect()
        await client.send(request("POST", "/v1/files", None, "Content-Length: 60000") + b"a" * 59_999 + b"!")
        assert (await client.response()).status == 503
        assert (await only_record(here)).attempts == 1


@pytest.mark.parametrize("size", [5, 70_000], ids=["kept", "too-large-to-be-kept"])
async def test_429_became_a_502_because_the_upload_went_on(autojump_clock: Any, handover: bool, size: int) -> None:
    """While a refusal is read, the upstream that refused gets no more of the upload: all of it is for the next one."""

    async def early(upstream: Conversation) -> None:
        data = b""
        while b"\r\n\r\n" not in data:
            data += await upstream.stream.receive_some()
        if upstream.upstream == "u0":
            await upstream.say(b"HTTP/1.1 429 X\r\nContent-Length: %d\r\n\r\n" % size)
            with trio.move_on_after(0.5), suppress(trio.BrokenResourceError):
                while True:
                    data += await upstream.stream.receive_some()
            assert len(data) < 10_000
            await upstream.say(b"x" * size)
            await trio.sleep_forever()
        while not data.endswith(b"!"):
            data += await upstream.stream.receive_some()
        upstream.requests.append(data)
        await ok(upstream)

    small = Bounds(held_body_bytes=10_000, held_total_bytes=20_000)
    async with several({"u0": early, "u1": early}, handover=handover, bounds=small) as here:
        here.by_request = False
        client = here.connect()
        await client.send(request("POST", "/v1/files", None, "Content-Length: 60000") + b"a" * 5_000)
        await trio.sleep(0.25)
        await client.send(b"b" * 54_999 + b"!")
        assert (await client.response()).status == 200
        assert here.conversations[-1].requests[0].partition(b"\r\n\r\n")[2] == b"a" * 5_000 + b"b" * 54_999 + b"!"
        assert (await only_record(here)).tried == (Tried("u0", "429"),)
