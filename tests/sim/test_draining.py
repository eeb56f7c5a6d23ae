"""`on_disconnect = "drain"`: the client leaves, and the upstream's answer is taken to its end, within limits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import trio
from kit import chat, request
from simkit import EXACT, SSE, URL, Conversation, World, only_record, world

from canal_trio.errors import Kind, Phase
from canal_trio.hooks import ExchangeRecord, Outcome, Usage, UsageSource
from canal_trio.settings import Drain, Key, Model, Target, Upstream
from canal_trio.testing.simstream import HandoverSimStream, SimLink

EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'
CHUNK = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":30,"total_tokens":37}}\n\n'
DONE = b"data: [DONE]\n\n"
END = b"0\r\n\r\n"
WAYS = pytest.mark.parametrize("heartbeat", [None, 50.0], ids=["straight", "pair"])
LEAVING = pytest.mark.parametrize("leaving", ["close", "reset"])


def draining(limits: Drain | None = None, **more: Any) -> dict[str, Any]:
    """Settings of a model that drains."""
    heartbeat = more.pop("heartbeat", None)
    return {
        "upstream": Upstream("u0", URL, heartbeat=heartbeat),
        "models": (Model("*", (Target("u0"),), on_disconnect=limits or Drain()),),
        "count_tokens": True,
    } | more


class Story:
    """An upstream that says an event each second, then its usage; and how far it came."""

    def __init__(self, events: int = 30, first: float = 1.0) -> None:
        self.events = events
        self.first = first
        self.said = 0
        self.ended = False

    async def play(self, peer: Conversation) -> None:
        """Say it."""
        await trio.sleep(self.first)
        await peer.say(SSE)
        for _ in range(self.events):
            await peer.chunk(EVENT)
            self.said += 1
            await trio.sleep(1)
        await peer.chunk(CHUNK, DONE)
        await peer.say(END)
        self.ended = True


async def leave(here: World, after: float, leaving: str = "close") -> ExchangeRecord:
    """A client that leaves; the record of its exchange, however long that takes."""
    client = here.connect()
    await client.send(chat())
    await trio.sleep(after)
    getattr(client.stream, leaving)()
    return await only_record(here)


@WAYS
@LEAVING
async def test_users_who_want_the_final_usage(
    autojump_clock: Any, handover: bool, heartbeat: float | None, leaving: str
) -> None:
    """new-api 4463, sub2api 4408: a client that leaves in mid-stream has the upstream's own counts in its record."""
    story = Story()
    async with world(story.play, handover=handover, **draining(heartbeat=heartbeat)) as here:
        start = trio.current_time()
        record = await leave(here, 5.5, leaving)
        assert trio.current_time() - start == pytest.approx(31, abs=EXACT)
        assert (record.usage, record.usage_source) == (Usage(7, 30), UsageSource.DRAINED)
        assert (record.outcome, record.phase) == (Outcome.CLIENT_GONE, Phase.STREAM)
        assert record.failure is not None
        assert record.failure.kind is Kind.GONE
        assert record.flags == ("drained",)
        assert record.cancel_latency is None
        assert (record.status, record.events, record.response_bytes) == (200, 5, 5 * len(EVENT))
        assert story.ended


@WAYS
async def test_users_who_want_it_cancelled(autojump_clock: Any, handover: bool, heartbeat: float | None) -> None:
    """vllm bifrost 3164: without the policy the upstream is closed at once, as ever; so with a key that says so."""
    for key in (None, Key("k", "a" * 64, on_disconnect=Drain(at_once=0))):
        story = Story()
        more = draining(heartbeat=heartbeat)
        if key is None:
            more["models"] = ()
        else:
            key = replace(key, sha256="2c70e12b7a0646f92279f427c7b38e7334d8e5389cff167a1dc30e73f826b683")  # of "key"
            more["keys"] = (key,)
        async with world(story.play, handover=handover, **more) as here:
            client, start = here.connect(), trio.current_time()
            await client.send(chat("Authorization: Bearer key"))
            await trio.sleep(5.5)
            client.stream.close()  # type: ignore[attr-defined]
            record = await only_record(here)
            assert trio.current_time() - start == pytest.approx(5.5, abs=EXACT)
            assert record.usage_source is UsageSource.ESTIMATED
            assert record.cancel_latency is not None
            assert not story.ended


async def test_a_key_that_drains_where_the_model_does_not(autojump_clock: Any, handover: bool) -> None:
    """The key's word comes before the model's."""
    story = Story()
    digest = "2c70e12b7a0646f92279f427c7b38e7334d8e5389cff167a1dc30e73f826b683"
    keys = (Key("k", digest, on_disconnect=Drain()),)
    async with world(story.play, handover=handover, **draining(keys=keys, models=())) as here:
        client = here.connect()
        await client.send(chat("Authorization: Bearer key"))
        await trio.sleep(5.5)
        client.stream.close()  # type: ignore[attr-defined]
        assert (await only_record(here)).usage_source is UsageSource.DRAINED


@WAYS
async def test_before_the_first_byte(autojump_clock: Any, handover: bool, heartbeat: float | None) -> None:
    """While the upstream thinks, the request was sent whole: its answer is taken, the client was told nothing."""
    story = Story(first=100)
    limits = Drain(seconds=1000)
    async with world(story.play, handover=handover, **draining(limits, heartbeat=heartbeat)) as here:
        record = await leave(here, 5)
        assert story.ended
        assert (record.usage, record.usage_source) == (Usage(7, 30), UsageSource.DRAINED)
        assert (record.status, record.events, record.response_bytes, record.first_byte) == (None, 0, 0, None)
        assert record.phase is Phase.FIRST_BYTE


@WAYS
async def test_a_body_that_is_not_streamed(autojump_clock: Any, handover: bool, heartbeat: float | None) -> None:
    """production-stack 634 the other way round: a JSON answer that nobody waits for tells what it used."""
    body = b'{"usage":{"prompt_tokens":3,"completion_tokens":4}}'

    async def play(peer: Conversation) -> None:
        await trio.sleep(20)
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        await peer.say(head % len(body) + body)

    async with world(play, handover=handover, **draining(heartbeat=heartbeat)) as here:
        record = await leave(here, 5)
        assert (record.usage, record.usage_source) == (Usage(3, 4), UsageSource.DRAINED)
        assert record.outcome is Outcome.CLIENT_GONE


@WAYS
@pytest.mark.parametrize(
    ("limits", "ends"),
    [(Drain(seconds=10), 15.5), (Drain(tokens=7), 13), (Drain(seconds=4, tokens=7), 9.5), (Drain(seconds=3600), 31)],
)
async def test_its_limits(
    autojump_clock: Any, handover: bool, heartbeat: float | None, limits: Drain, ends: float
) -> None:
    """In seconds and in tokens; what was cut at a limit has an estimate, and a flag that says so."""
    story = Story()
    async with world(story.play, handover=handover, **draining(limits, heartbeat=heartbeat)) as here:
        start = trio.current_time()
        record = await leave(here, 5.5)
        assert trio.current_time() - start == pytest.approx(ends, abs=EXACT)
        cut = ends < 31
        assert record.flags == (("drain_cut", "drained") if cut else ("drained",))
        assert record.usage_source is (UsageSource.ESTIMATED if cut else UsageSource.DRAINED)
        assert here.conversations[0].left is not None or not cut


async def test_the_event_whose_send_finds_nobody_is_counted(
    autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client whose leaving shows in a send only: that event is the first that is drained, not one nobody has seen."""
    gone = False
    original = HandoverSimStream.try_send

    def try_send(stream: HandoverSimStream, data: Any) -> int:
        if gone and EVENT in bytes(data):
            raise trio.BrokenResourceError("nobody is there")
        return original(stream, data)

    monkeypatch.setattr(HandoverSimStream, "try_send", try_send)
    async with world(Story().play, handover=True, **draining(Drain(tokens=7))) as here:
        start = trio.current_time()
        await here.connect().send(chat())
        await trio.sleep(5.5)
        gone = True
        record = await only_record(here)
        assert trio.current_time() - start == pytest.approx(13, abs=EXACT), "as if it had been seen to leave at 5.5 s"
        assert record.flags == ("drain_cut", "drained")
        assert (record.events, record.response_bytes) == (5, 5 * len(EVENT))


async def test_how_many_at_once(autojump_clock: Any, handover: bool) -> None:
    """Beyond the number that may drain, a client that leaves cancels its upstream; when one has ended, another may."""
    story = Story()
    async with world(story.play, handover=handover, **draining(Drain(at_once=2))) as here:
        clients = [here.connect() for _ in range(3)]
        for client in clients:
            await client.send(chat())
        await trio.sleep(5.5)
        for client in clients:
            client.stream.close()  # type: ignore[attr-defined]
        records = await here.records.wait(3, seconds=1000)
        assert sorted(record.flags for record in records) == [("drain_refused",), ("drained",), ("drained",)]
        assert here.gateway.generation.drains.count == 0
        record = (await leave_another(here)).flags
        assert record == ("drained",)


async def test_a_drain_is_shown_with_the_time_that_is_left(autojump_clock: Any, handover: bool) -> None:
    """Among the exchanges in flight, one whose client has left says when it is ended."""
    async with world(Story().play, handover=handover, **draining(Drain(seconds=20.0))) as here:
        client = here.connect()
        await client.send(chat())
        await trio.sleep(5.5)
        assert [view.deadline for view in here.gateway.exchanges()] == [None]
        client.stream.close()  # type: ignore[attr-defined]
        await trio.sleep(5.0)
        assert [view.deadline for view in here.gateway.exchanges()] == [15.0]
        await only_record(here)


async def leave_another(here: World) -> ExchangeRecord:
    """One more client that leaves."""
    before = len(here.records.all)
    client = here.connect()
    await client.send(chat())
    await trio.sleep(5.5)
    client.stream.close()  # type: ignore[attr-defined]
    return (await here.records.wait(before + 1, seconds=1000))[-1]


async def test_not_while_it_is_sent(autojump_clock: Any, handover: bool) -> None:
    """A request that was not sent whole is not drained: its upload ends with its client."""

    async def play(peer: Conversation) -> None:
        raise AssertionError("never whole")

    async with world(play, handover=handover, **draining(models=(), keys=())) as here:
        models = (Model("*", (Target("u0"),), on_disconnect=Drain()),)
        here.gateway.reload(replace(here.gateway.settings, models=models))
        client = here.connect()
        head = request("POST", "/v1/files", b"x" * 50, "Content-Type: application/octet-stream")
        await client.send(head[:-10])
        await trio.sleep(2)
        client.stream.close()  # type: ignore[attr-defined]
        record = await only_record(here)
        assert record.outcome is Outcome.CLIENT_GONE
        assert "drained" not in record.flags


@WAYS
async def test_an_upstream_that_fails_meanwhile(autojump_clock: Any, handover: bool, heartbeat: float | None) -> None:
    """It ends the drain; the client left first, so that is what the record says."""

    async def play(peer: Conversation) -> None:
        await peer.say(SSE)
        await peer.chunk(EVENT, EVENT)
        await trio.sleep(10)
        peer.stream.close()

    async with world(play, handover=handover, **draining(heartbeat=heartbeat)) as here:
        record = await leave(here, 5)
        assert record.outcome is Outcome.CLIENT_GONE
        assert (record.usage_source, record.events) == (UsageSource.ESTIMATED, 2)


@WAYS
async def test_shutdown_overrides_it(autojump_clock: Any, handover: bool, heartbeat: float | None) -> None:
    """When the gateway stops, nobody waits for answers that nobody reads."""
    story = Story()
    async with world(story.play, handover=handover, **draining(heartbeat=heartbeat)) as here:
        client, start = here.connect(), trio.current_time()
        await client.send(chat())
        await trio.sleep(5.5)
        client.stream.close()  # type: ignore[attr-defined]
        await trio.sleep(2)
        assert here.gateway.statistics().in_flight == 1
        here.gateway.drain(trio.current_time() + 100)
        record = await only_record(here)
        assert trio.current_time() - start == pytest.approx(7.5, abs=EXACT)
        assert record.flags == ("drain_cut", "drained")


@WAYS
@LEAVING
async def test_a_slow_client_that_leaves(
    autojump_clock: Any, handover: bool, heartbeat: float | None, leaving: str
) -> None:
    """A client that blocked, and leaves while a write waits for it, holds nothing up: the rest is taken."""
    events = [b'data: {"x":"%b"}\n\n' % (b"y" * 3000) for _ in range(60)]

    async def play(peer: Conversation) -> None:
        await peer.say(SSE)
        await peer.chunk(*events, CHUNK, DONE)
        await peer.say(END)

    async with world(play, handover=handover, **draining(heartbeat=heartbeat)) as here:
        client, start = here.connect(to_client=SimLink(buffer=2000)), trio.current_time()
        await client.send(chat())
        await trio.sleep(5)
        getattr(client.stream, leaving)()
        record = await only_record(here)
        assert trio.current_time() - start < 6
        assert (record.usage, record.usage_source) == (Usage(7, 30), UsageSource.DRAINED)
        assert record.events < 10
        assert record.outcome is Outcome.CLIENT_GONE


async def test_leaving_after_the_usage_is_no_drain(autojump_clock: Any, handover: bool) -> None:
    """What was said before the client left was not drained, and leaving after the last event is no leaving."""

    async def play(peer: Conversation) -> None:
        await peer.say(SSE)
        await peer.chunk(EVENT, CHUNK)
        await trio.sleep(5)
        await peer.chunk(DONE)
        await trio.sleep(0.5)
        await peer.say(END)

    async with world(play, handover=handover, **draining()) as here:
        record = await leave(here, 2)
        assert (record.usage_source, record.flags) == (UsageSource.UPSTREAM, ("drained",))
    async with world(play, handover=handover, **draining()) as here:
        record = await leave(here, 5.2)
        assert (record.outcome, record.usage_source) == (Outcome.COMPLETED, UsageSource.UPSTREAM)
        assert record.flags == ("left_after_terminal",)
