"""The way of a response body out of a stream when the flow is closed, full, or the connection breaks, at either path.

Simulated network, virtual time; nothing but the body, a flow and the two ends of a stream.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from canal_trio.errors import Failure, Kind, Phase, Side
from canal_trio.relay.flow import Aborted, Ended, FlowReceiver, FlowSender, open_flow
from canal_trio.relay.idle import Reaper
from canal_trio.settings import Deadlines
from canal_trio.testing.simstream import SimStream, sim_stream_pair
from canal_trio.upstream.response_body import ResponseBody
from canal_trio.upstream.turns import Turns
from canal_trio.wire.bodies import LengthDecoder

LENGTH = 1000
PATHS = pytest.mark.parametrize("handover", [True, False], ids=["hand-over", "plain"])


class Scene:
    """A body of `LENGTH` bytes between an upstream's end of a stream and a flow of two pieces."""

    def __init__(self, near: SimStream, far: SimStream, reaper: Reaper) -> None:
        self.far = far
        self.near = near
        self.late: list[Failure] = []
        turns = Turns(Deadlines(), reaper, self.late.append)
        self.body = ResponseBody(near, LengthDecoder(LENGTH), turns, piece_bytes=100)
        self.sender: FlowSender
        self.flow: FlowReceiver
        self.sender, self.flow = open_flow(2, piece_bytes=100)
        self.over = False

    async def run(self) -> None:
        """As `Http1Connection.run` does."""
        await self.body.into(self.sender, b"")
        self.over = True
        if self.body.failure is not None:
            self.sender.abort(self.body.failure)


@asynccontextmanager
async def scene(*, handover: bool) -> AsyncIterator[Scene]:
    """The body on its way, in a task of its own."""
    near, far = sim_stream_pair(handover=handover)
    reaper = Reaper()
    async with trio.open_nursery() as nursery:
        await nursery.start(reaper.run)
        it = Scene(near, far, reaper)
        nursery.start_soon(it.run)
        yield it
        await trio.testing.wait_all_tasks_blocked()
        assert it.over
        assert it.late == []
        nursery.cancel_scope.cancel()
    near.close()
    far.close()


@PATHS
async def test_the_flow_is_closed_while_the_body_waits_for_room(
    handover: bool, autojump_clock: trio.testing.MockClock
) -> None:
    """Whoever closed it knows why: the body returns without a failure of its own."""
    async with scene(handover=handover) as it:
        await it.far.send_all(b"x" * 500)  # two pieces for the flow, one in the hand
        await trio.testing.wait_all_tasks_blocked()
        assert not it.over
        it.flow.close()
    assert it.body.failure is None


@PATHS
async def test_the_flow_is_closed_before_more_arrives(handover: bool, autojump_clock: trio.testing.MockClock) -> None:
    """The next piece finds it closed: the body returns without a failure of its own."""
    async with scene(handover=handover) as it:
        await trio.testing.wait_all_tasks_blocked()
        it.flow.close()
        await it.far.send_all(b"x" * 50)
    assert it.body.failure is None


@PATHS
async def test_the_connection_breaks_while_the_body_is_awaited(
    handover: bool, autojump_clock: trio.testing.MockClock
) -> None:
    """What came before it is delivered, then the flow is aborted with the upstream's reset."""
    async with scene(handover=handover) as it:
        await it.far.send_all(b"x" * 50)
        await trio.testing.wait_all_tasks_blocked()
        it.far.reset()
        await trio.testing.wait_all_tasks_blocked()
        assert await it.flow.take() == [b"x" * 50]
        assert await it.flow.take() == []
    failure = it.body.failure
    assert failure is not None
    assert (failure.side, failure.phase, failure.kind) == (Side.UPSTREAM, Phase.STREAM, Kind.RESET)
    assert it.flow.ending == Aborted(failure)


@PATHS
async def test_the_whole_body_through_a_flow_that_is_often_full(
    handover: bool, autojump_clock: trio.testing.MockClock
) -> None:
    """Every byte, and the end behind the last one."""
    async with scene(handover=handover) as it:
        await it.far.send_all(b"x" * LENGTH + b"beyond")
        data = b""
        while it.flow.ending is None:
            await trio.testing.wait_all_tasks_blocked()
            data += b"".join(await it.flow.take())
        assert data == b"x" * LENGTH
        assert isinstance(it.flow.ending, Ended)
        assert it.body.rest in (b"", b"beyond"[: len(it.body.rest)])
    assert it.body.failure is None
