"""A first event that is held: an error is asked of somebody else, anything else is delivered as if nothing had been."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing
from kit import request
from several import ERROR_AMONG_OTHERS, ERROR_EVENT, EVENT, error_first, hello, named, ok, several, streams, talk
from simkit import SSE, Conversation, Play, failed, only_record, since

from canal_trio.errors import Kind, Phase, Side
from canal_trio.hooks import ExchangeRecord, Outcome, Tried
from canal_trio.settings import Balance, Bounds

HOLD = Balance(hold_first_event=True)


async def test_error_in_the_first_event_was_relayed_as_the_answer(autojump_clock: Any, handover: bool) -> None:
    """A 200 whose first event is an error is asked of another upstream, whose stream is the answer."""
    async with several({"u0": error_first, "u1": streams(EVENT)}, handover=handover, balance=HOLD) as here:
        response = await talk(here)
        assert response.body == EVENT + b"data: [DONE]\n\n"
        assert response.complete
        record = await only_record(here)
        assert record.tried == (Tried("u0", "200"),)
        assert (record.upstream, record.outcome, record.events) == ("u1", Outcome.COMPLETED, 2)


async def test_an_error_that_is_not_the_first_member_was_no_error(autojump_clock: Any, handover: bool) -> None:
    """OpenRouter's error stands in a chunk, behind its id and model: another upstream is asked all the same."""
    plays = {"u0": streams(ERROR_AMONG_OTHERS), "u1": streams(EVENT)}
    async with several(plays, handover=handover, balance=HOLD) as here:
        assert (await talk(here)).body == EVENT + b"data: [DONE]\n\n"
        assert (await only_record(here)).tried == (Tried("u0", "200"),)


async def test_without_being_told_the_error_is_relayed(autojump_clock: Any, handover: bool) -> None:
    """An upstream's error is its answer, unless the model says otherwise."""
    async with several({"u0": error_first, "u1": ok}, handover=handover) as here:
        assert (await talk(here)).body == ERROR_EVENT
        assert (await only_record(here)).outcome is Outcome.UPSTREAM_ERROR


@pytest.mark.parametrize("plays", [{"u0": error_first}, {"u0": error_first, "u1": error_first}], ids=["one", "two"])
async def test_an_error_from_everybody_is_relayed(autojump_clock: Any, handover: bool, plays: dict[str, Play]) -> None:
    """When nobody else is left the last one's error is the answer, verbatim."""
    async with several(plays, handover=handover, balance=HOLD) as here:
        assert (await talk(here)).body == ERROR_EVENT
        record = await only_record(here)
        assert (record.attempts, record.outcome) == (len(plays), Outcome.UPSTREAM_ERROR)


async def test_held_events_are_delivered_whole_and_at_once(autojump_clock: Any, handover: bool) -> None:
    """What was held goes out when the first event is complete, in the very moment; the rest comes as it comes."""

    async def play(upstream: Conversation) -> None:
        await upstream.say(SSE)
        await trio.sleep(3)
        await upstream.chunk(EVENT[:9])
        await trio.sleep(2)
        await upstream.chunk(EVENT[9:])
        await trio.sleep(10)
        await upstream.chunk(EVENT)
        await upstream.say(b"0\r\n\r\n")

    async with several({"u0": play, "u1": ok}, handover=handover, balance=HOLD) as here:
        client = here.connect()
        start = trio.current_time()
        await client.send(hello())
        await client.final_head()
        assert since(start) == 5.0
        record = await only_record(here)
        await trio.testing.wait_all_tasks_blocked()
        client.stream.close()  # type: ignore[attr-defined]  # a simulated stream
        assert record.first_byte == pytest.approx(5.0, abs=0.01)
        assert record.events == 2


@pytest.mark.parametrize("retry_sent", [False, True])
async def test_cut_before_the_first_event(autojump_clock: Any, handover: bool, retry_sent: bool) -> None:
    """Nothing was relayed: 502 and not a broken 200; another upstream only where a second generation is allowed."""
    plays = {"u0": streams(EVENT[:5], cut=True), "u1": streams(EVENT)}
    async with several(plays, *named(2, retry_sent=retry_sent), handover=handover, balance=HOLD) as here:
        response = await talk(here)
        assert response.status == (200 if retry_sent else 502)
        record = await only_record(here)
        assert record.attempts == 1 + retry_sent
        if not retry_sent:
            failed(record, Side.UPSTREAM, Phase.FIRST_EVENT, Kind.CUT)


@pytest.mark.parametrize(
    ("events", "done"), [((), False), ((b"data: " + b"x" * 50_000 + b"\n\n",), True), ((b": ping\n\n", EVENT), True)]
)
async def test_streams_that_are_no_error(
    autojump_clock: Any, handover: bool, events: tuple[bytes, ...], done: bool
) -> None:
    """An empty stream, a first event larger than what is held, a comment before it: relayed byte for byte."""
    async with several({"u0": streams(*events, done=done), "u1": ok}, handover=handover, balance=HOLD) as here:
        response = await talk(here)
        assert response.body == b"".join(events) + (b"data: [DONE]\n\n" if done else b"")
        assert response.complete
        assert (await only_record(here)).attempts == 1


async def test_client_left_while_the_first_event_is_held(autojump_clock: Any, handover: bool) -> None:
    """Its upstream is closed in that very moment, and nobody else is asked."""
    async with several({"u0": streams(EVENT, gap=100.0), "u1": ok}, handover=handover, balance=HOLD) as here:
        client = here.connect()
        await client.send(hello())
        await trio.sleep(1)
        start = trio.current_time()
        client.stream.close()  # type: ignore[attr-defined]  # a simulated stream
        await trio.testing.wait_all_tasks_blocked()
        assert here.conversations[0].left == trio.current_time() == start
        record: ExchangeRecord = await here.records.one()
        assert record.outcome is Outcome.CLIENT_GONE
        assert record.attempts == 1


async def test_an_error_became_a_502_because_the_upload_went_on(autojump_clock: Any, handover: bool) -> None:
    """When it is here, more of the upload has been sent on than is held: nobody else can be asked, so it is relayed."""

    async def play(upstream: Conversation) -> None:
        data = await upstream.stream.receive_some()
        await upstream.say(SSE)
        while not data.endswith(b"!"):
            data += await upstream.stream.receive_some()
        await upstream.chunk(ERROR_EVENT)
        await upstream.say(b"0\r\n\r\n")

    bounds = Bounds(held_body_bytes=10_000, held_total_bytes=20_000)
    async with several({"u0": play, "u1": ok}, handover=handover, balance=HOLD, bounds=bounds) as here:
        here.by_request = False
        client = here.connect()
        await client.send(request("POST", "/v1/files", None, "Content-Length: 60000") + b"a" * 5_000)
        await trio.sleep(1)
        await client.send(b"b" * 54_999 + b"!")
        response = await client.response()
        assert (response.status, response.body) == (200, ERROR_EVENT)
        assert (await only_record(here)).attempts == 1
