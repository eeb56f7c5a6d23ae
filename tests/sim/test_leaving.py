"""A client that leaves, in every phase and on both paths: the upstream is closed in that very moment.

Over real sockets the same is in `tests/net/test_cancellation.py`; here are also streams whose hang-up can only be read.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import trio
import trio.testing
from kit import Client, chat, request
from simkit import SSE, Conversation, OneEnded, World, read_request, world

from canal_trio.errors import Kind, Phase
from canal_trio.hooks import ExchangeRecord, Outcome
from canal_trio.settings import Upstream
from canal_trio.testing.simstream import SimLink, SimStream, sim_stream_pair

EVENT = b"data: 1\n\n"
DONE = b"data: [DONE]\n\n"
UPGRADE = request("GET", "/v1/realtime", None, "Connection: Upgrade", "Upgrade: websocket")
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"

how_it_leaves = pytest.mark.parametrize("how", ["close", "reset"])


async def silent(_upstream: Conversation) -> None:
    """No answer."""
    await trio.sleep_forever()


async def head_only(upstream: Conversation) -> None:
    """A head, then nothing."""
    await upstream.say(SSE)
    await trio.sleep_forever()


async def half_an_event(upstream: Conversation) -> None:
    """An event and a half."""
    await upstream.say(SSE)
    await upstream.chunk(EVENT, b"data: ha")
    await trio.sleep_forever()


async def switches(upstream: Conversation) -> None:
    """A tunnel, in which nothing is said until the client's end."""
    await upstream.say(SWITCH)
    async for _ in upstream.stream:
        pass
    upstream.stream.close()


PHASES: dict[str, tuple[bytes, Any, Phase]] = {
    "upload": (request("POST", "/", None, "Content-Length: 1000") + b"x" * 10, silent, Phase.UPLOAD),
    "first-byte": (chat(), silent, Phase.FIRST_BYTE),
    "plain": (chat(stream=False), silent, Phase.FIRST_BYTE),
    "upgrade": (UPGRADE, silent, Phase.FIRST_BYTE),
    "first-event": (chat(), head_only, Phase.FIRST_EVENT),
    "mid-event": (chat(), half_an_event, Phase.STREAM),
}


async def leave(here: World, client: Client, how: str) -> ExchangeRecord:
    """The client leaves; no virtual time may pass until the record is there."""
    start = trio.current_time()
    getattr(client.stream, how)()
    await trio.testing.wait_all_tasks_blocked()
    assert trio.current_time() == start
    return await here.records.one()


@how_it_leaves
@pytest.mark.parametrize("phase", PHASES)
async def test_phases(autojump_clock: Any, handover: bool, how: str, phase: str) -> None:
    """Gone, in its phase, with the cancel's latency; the upstream's connection is closed."""
    raw, play, expected = PHASES[phase]
    async with world(play, handover=handover) as here:
        client = here.connect()
        await client.send(raw)
        await trio.sleep(1)
        record = await leave(here, client, how)
        assert record.outcome is Outcome.CLIENT_GONE
        assert record.phase is expected
        assert record.cancel_latency is not None
        assert here.conversations[0].left == trio.current_time()


@how_it_leaves
async def test_tunnel(autojump_clock: Any, handover: bool, how: str) -> None:
    """In a tunnel an end is passed on, and a reset ends it at once."""
    async with world(switches, handover=handover) as here:
        client = here.connect()
        await client.send(UPGRADE)
        assert (await client.final_head()).status == 101
        getattr(client.stream, how)()
        await trio.testing.wait_all_tasks_blocked()
        assert here.conversations[0].left == trio.current_time()
        record = await here.records.one()
        assert record.outcome is (Outcome.CLIENT_GONE if how == "reset" else Outcome.COMPLETED)


@how_it_leaves
async def test_while_dialling_and_queueing(autojump_clock: Any, handover: bool, how: str) -> None:
    """Nothing upstream is there to be closed; what waited is taken back."""
    only = Upstream("u0", "http://upstream.test", connections=1)
    async with world(silent, handover=handover, upstream=only) as here:

        async def slow(_upstream: Upstream) -> Any:
            await trio.sleep(4)
            raise AssertionError("the dial went on although nobody waits for it")

        here.dialer = slow
        dialling, queueing = here.connect(), here.connect()
        await dialling.send(chat())
        await trio.sleep(1)
        await queueing.send(chat())
        await trio.sleep(1)
        for client, phase in ((queueing, Phase.LEASE), (dialling, Phase.DIAL)):
            getattr(client.stream, how)()
            await trio.testing.wait_all_tasks_blocked()
            record = here.records.all[-1]
            assert record.outcome is Outcome.CLIENT_GONE
            assert record.phase is phase
            assert record.cancel_latency is None
        await trio.sleep(10)


ANSWERS = {
    "length": (request("GET", "/"), b"HTTP/1.1 200 OK\r\nContent-Length: 30000\r\n\r\n" + b"x" * 30_000),
    "small": (request("GET", "/"), b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"),
    "empty": (request("GET", "/"), b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
    "head": (request("HEAD", "/"), b"HTTP/1.1 200 OK\r\nContent-Length: 30000\r\n\r\n"),
    "204": (request("GET", "/"), b"HTTP/1.1 204 No Content\r\n\r\n"),
    "304": (request("GET", "/"), b"HTTP/1.1 304 Not Modified\r\n\r\n"),
    "chunked": (request("GET", "/"), b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"),
    "error": (request("GET", "/", None, "Expect: nothing"), b""),
    "own": (request("OPTIONS", "/", None, "Max-Forwards: 0"), b""),
}


@how_it_leaves
@pytest.mark.parametrize("buffer", [100, 40_000])
@pytest.mark.parametrize("name", ANSWERS)
async def test_client_with_its_whole_answer_was_counted_as_gone(
    autojump_clock: Any, handover: bool, how: str, buffer: int, name: str
) -> None:
    """A client may leave in the very step in which it has the last byte of its answer: that exchange is complete."""
    raw, answer = ANSWERS[name]

    async def answers(upstream: Conversation) -> None:
        for start in range(0, len(answer), 7000):
            await upstream.say(answer[start : start + 7000])

    async with world(answers, handover=handover) as here:
        for count in range(1, 5):  # the order of tasks within a step is drawn anew each time
            client = here.connect(to_client=SimLink(buffer=buffer))
            await client.send(raw)
            await client.response(raw.partition(b" ")[0].decode())
            getattr(client.stream, how)()
            await trio.testing.wait_all_tasks_blocked()
            record = (await here.records.wait(count))[-1]
            assert record.outcome is (Outcome.REJECTED if name == "error" else Outcome.COMPLETED), record
            assert record.failure is None or record.failure.kind is Kind.EXPECTATION


async def test_last_event_counts_once_its_blank_line_is_there(autojump_clock: Any, handover: bool) -> None:
    """`data: [DONE]` without its blank line is no event yet: the body is not ended for the upstream inside of it."""

    async def halts(upstream: Conversation) -> None:
        await upstream.say(SSE)
        await upstream.chunk(EVENT, DONE[:-1])
        await trio.sleep(5)
        await upstream.chunk(b"\n")
        await trio.sleep_forever()

    async with world(halts, handover=handover) as here:
        client, start = here.connect(), trio.current_time()
        await client.send(chat())
        response = await client.response()
        assert response.complete
        assert response.body == EVENT + DONE
        assert trio.current_time() - start == pytest.approx(6, abs=0.01)
        assert (await here.records.one()).flags == ("late_body_end",)


async def test_end_that_becomes_leaving_on_the_way_to_another_upstream(autojump_clock: Any, handover: bool) -> None:
    """An upstream that finishes for a client which has ended its side is left to answer; when it fails, one that
    would not is not asked: for that one the client is gone."""

    async def fails(upstream: Conversation) -> None:
        await trio.sleep(3)
        upstream.stream.close()

    first = Upstream("u0", "http://u0.test", on_client_eof="finish", retry_sent=True)
    second = Upstream("u1", "http://u1.test")
    async with world(fails, handover=handover, upstreams=(first, second)) as here:
        start = trio.current_time()
        client = here.connect()
        await client.send(chat())
        await client.stream.send_eof()  # type: ignore[attr-defined]  # a simulated stream
        assert await client.rest() == b""
        record = await here.records.one()
        assert (record.outcome, record.phase) == (Outcome.CLIENT_GONE, Phase.ROUTE)
        assert trio.current_time() == pytest.approx(start + 3, abs=0.01)
        assert [conversation.upstream for conversation in here.conversations] == ["u0"]


async def test_reset_behind_an_end_was_not_seen(autojump_clock: Any) -> None:
    """In a tunnel an end is no leaving, and nobody reads behind it; the reset that follows still closes the upstream
    in its step. (A simulated connection forgot a reset that came behind an end, where a kernel tells of it.)"""

    async def goes_on(upstream: Conversation) -> None:
        await upstream.say(SWITCH)
        assert await upstream.stream.receive_some() == b""
        await trio.sleep_forever()

    async with world(goes_on, handover=True) as here:
        client = here.connect()
        await client.send(UPGRADE)
        assert (await client.final_head()).status == 101
        await client.stream.send_eof()  # type: ignore[attr-defined]  # a simulated stream
        await trio.sleep(1)
        assert not here.records.all
        record = await leave(here, client, "reset")
        assert (record.outcome, record.phase) == (Outcome.CLIENT_GONE, Phase.STREAM)
        assert record.cancel_latency is not None
        assert here.streams[1].closed


async def test_end_of_a_client_whose_upstream_cannot_be_half_closed(autojump_clock: Any, handover: bool) -> None:
    """Where an end cannot be passed on by itself the tunnel ends with it, behind the bytes before it."""
    seen: list[bytes] = []

    async with world(handover=handover) as here:

        async def dial(_upstream: Upstream) -> Any:
            ours, theirs = sim_stream_pair()
            here.streams.append(ours)
            here.nursery.start_soon(far_end, theirs)
            return OneEnded(ours)

        async def far_end(stream: SimStream) -> None:
            await read_request(stream)
            await stream.send_all(SWITCH)
            with suppress(trio.BrokenResourceError):
                while piece := await stream.receive_some():
                    seen.append(piece)
            stream.close()

        here.dialer = dial
        client = here.connect()
        await client.send(UPGRADE)
        assert (await client.final_head()).status == 101
        await client.send(b"last words")
        await client.stream.send_eof()  # type: ignore[attr-defined]  # a simulated stream
        assert await client.rest() == b""
        assert b"".join(seen) == b"last words"
        assert (await here.records.one()).outcome is Outcome.CLIENT_GONE


@pytest.mark.parametrize("phase", ["first-byte", "plain", "first-event"])
async def test_the_model_was_missing_where_nobody_had_answered(autojump_clock: Any, handover: bool, phase: str) -> None:
    """Whose model it was stands in the record of an exchange that its client left, answered or not."""
    raw, play, _ = PHASES[phase]
    async with world(play, handover=handover) as here:
        client = here.connect()
        await client.send(raw)
        await trio.sleep(1)
        assert (await leave(here, client, "close")).model == "m"


async def test_the_model_was_missing_where_the_upstream_failed(autojump_clock: Any, handover: bool) -> None:
    """Whose model it was stands in the record of an exchange that ended with a 504 of ours."""
    async with world(silent, handover=handover) as here:
        client = here.connect()
        await client.send(chat())
        assert (await client.final_head()).status == 504
        assert (await here.records.one()).model == "m"
