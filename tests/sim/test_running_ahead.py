"""Exchanges that run ahead of their driver, in others' steps: who is woken, and what becomes of them in trouble."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import trio
import trio.testing
from kit import chat, request
from simkit import OK, SSE, Conversation, answer_ok, ended, failed, only_record, world

from canal_trio.errors import Kind, Phase, Side
from canal_trio.gateway.places import Places
from canal_trio.hooks import Outcome
from canal_trio.settings import Deadlines, Upstream
from canal_trio.testing.simstream import HandoverSimStream, SimLink, sim_stream_pair


class DriverSteps(trio.abc.Instrument):
    """Counts how often a task that serves a client runs."""

    def __init__(self) -> None:
        self.count = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """One step of any task."""
        self.count += task.name.endswith(("ClientReader.run", "World._handle"))


@pytest.mark.parametrize("piece", [1, 1000])
async def test_small_exchanges_wake_no_task_of_the_client(autojump_clock: Any, piece: int) -> None:
    """A request that comes whole and an answer with its length need neither the reader's task nor the driver's.

    However the answer's head is cut up, and as often as it is done; the records are as ever.
    """

    async def play(upstream: Conversation) -> None:
        for start in range(0, len(OK) - 2, piece):
            await upstream.say(OK[start : start + piece] if start + piece < len(OK) - 2 else OK[start:])
            await trio.sleep(0.01)

    async with world(play, handover=True) as here:
        client, steps = here.connect(), DriverSteps()
        await client.send(chat())  # which dials
        assert (await client.response()).status == 200
        await trio.testing.wait_all_tasks_blocked()
        trio.lowlevel.add_instrument(steps)
        for _ in range(3):
            await client.send(chat())
            assert (await client.response()).body == b"ok"
        trio.lowlevel.remove_instrument(steps)
        assert steps.count == 0
        assert [record.outcome for record in here.records.all] == [Outcome.COMPLETED] * 4
        assert len(here.conversations) == 1


async def test_a_stream_wakes_its_driver_once(autojump_clock: Any) -> None:
    """What goes on for long gets its task when its head is here, and the events go past that task."""

    async def play(upstream: Conversation) -> None:
        await upstream.say(SSE)
        for number in range(5):
            await trio.sleep(1)
            await upstream.chunk(b"data: %d\n\n" % number)
        await upstream.say(b"0\r\n\r\n")

    async with world(play, handover=True) as here:
        client, steps = here.connect(), DriverSteps()
        await client.send(request("GET", "/"))
        assert (await client.response()).status == 200
        await trio.testing.wait_all_tasks_blocked()
        trio.lowlevel.add_instrument(steps)
        await client.send(request("GET", "/"))
        assert len((await client.response()).body) == 45
        trio.lowlevel.remove_instrument(steps)
        assert steps.count == 2  # its head is here; its end is here
        assert [record.handed_over for record in here.records.all] == [5, 5]


@pytest.mark.parametrize("handover", [True, False])
async def test_an_upstream_that_says_nothing(autojump_clock: Any, handover: bool) -> None:
    """The deadline of an answer runs for an exchange without a task, too: 504, and the connection goes on."""

    async def play(upstream: Conversation) -> None:
        if upstream.number:
            await upstream.say(OK)
        else:
            await trio.sleep(1000)

    async with world(play, handover=handover, deadlines=Deadlines(first_byte=50)) as here:
        client = here.connect()
        await client.send(chat())
        assert (await client.response()).status == 504
        failed(await here.records.one(), Side.UPSTREAM, Phase.FIRST_BYTE, Kind.TIMEOUT)
        await client.send(chat())
        assert (await client.response()).status == 200


async def test_a_client_that_leaves_has_its_upstream_closed_in_that_step(autojump_clock: Any) -> None:
    """Without a task, too, the upstream's connection is closed in the very step that saw it, and that is told."""

    async def play(_: Conversation) -> None:
        await trio.sleep_forever()

    async with world(play, handover=True) as here:
        client = here.connect()
        await client.send(chat())
        await trio.testing.wait_all_tasks_blocked()
        client.stream.close()  # type: ignore[attr-defined]  # a simulated stream
        record = await only_record(here)
        assert record.outcome is Outcome.CLIENT_GONE
        assert record.cancel_latency is not None
        assert here.conversations[0].left == trio.current_time()


async def test_a_client_that_ends_its_side_still_gets_its_answer(autojump_clock: Any) -> None:
    """Where that is no leaving, the reader's end brings the exchange into its task, and it goes on there."""

    async def play(upstream: Conversation) -> None:
        await trio.sleep(5)
        await upstream.say(OK)

    upstream = Upstream("u0", "http://upstream.test/v1", on_client_eof="ignore")
    async with world(play, handover=True, upstream=upstream) as here:
        client = here.connect()
        await client.send(chat())
        await trio.sleep(1)
        await client.stream.send_eof()  # type: ignore[attr-defined]  # a simulated stream
        assert (await client.response()).body == b"ok"
        assert await ended(client) == "fin"
        assert (await only_record(here)).outcome is Outcome.COMPLETED


async def test_a_gateway_that_is_stopped_unwinds_them(autojump_clock: Any) -> None:
    """Cancelled with its connection, an exchange gets its task, to unwind in: one record, and nothing left."""

    async def play(_: Conversation) -> None:
        await trio.sleep_forever()

    async with world(play, handover=True) as here:
        ours, theirs = sim_stream_pair()
        here.streams.append(ours)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(here.gateway.handle, ours)
            await theirs.send_all(chat())
            await trio.testing.wait_all_tasks_blocked()
            assert here.gateway.statistics().in_flight == 1
            nursery.cancel_scope.cancel()
        assert (await here.records.one()).outcome is Outcome.DRAINED
        theirs.close()


async def test_a_drain_while_they_run(autojump_clock: Any) -> None:
    """What runs when the drain begins is answered, and then the connection ends."""

    async def play(upstream: Conversation) -> None:
        await trio.sleep(5)
        await upstream.say(OK)

    async with world(play, handover=True) as here:
        client = here.connect()
        await client.send(chat())
        await trio.sleep(1)
        here.gateway.drain(trio.current_time() + 100)
        assert (await client.response()).body == b"ok"
        assert await ended(client) == "fin"


async def test_a_bug_at_its_end_ends_its_connection_alone(
    autojump_clock: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It ends in the step of another's: what raises there is raised by its own driver, and no other one notices."""
    give = Places.give

    def broken(self: Places, seconds: float) -> None:
        give(self, seconds)
        raise ZeroDivisionError

    async with world(answer_ok, handover=True) as here:
        other = here.connect()
        await other.send(chat())
        assert (await other.response()).status == 200
        client = here.connect()
        with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
            patch.setattr(Places, "give", broken)
            await client.send(chat())
            assert (await client.response()).status == 200
            await ended(client)
        assert "ZeroDivisionError" in caplog.text
        await other.send(chat())
        assert (await other.response()).status == 200
        assert [record.outcome for record in here.records.all] == [Outcome.COMPLETED] * 3


async def test_a_stream_of_the_users_own_that_knows_nothing_of_it(
    autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dialer's streams may hand over without knowing how to sleep without a task: the exchange has one by then."""
    monkeypatch.setattr(HandoverSimStream, "parks", False)

    async with world(answer_ok, handover=True) as here:
        client = here.connect()
        for _ in range(2):
            await client.send(chat())
            assert (await client.response()).status == 200


async def test_nobody_is_left_to_be_invited(autojump_clock: Any) -> None:
    """A client that is gone before `100 Continue` was written has no upstream asked for it."""
    async with world(answer_ok, handover=True) as here:
        # Its end is on its way for a second; that nobody takes what is written is seen at once.
        client = here.connect(to_gateway=SimLink(latency=1), to_client=SimLink(buffer=5))
        await client.send(request("POST", "/", b"x" * 10, "Expect: 100-continue")[:-10])
        await trio.sleep(2)
        client.stream.close()  # type: ignore[attr-defined]  # a simulated stream
        assert (await only_record(here)).outcome is Outcome.CLIENT_GONE
        assert here.conversations == []
